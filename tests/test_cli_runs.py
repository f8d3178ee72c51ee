"""`layerwatch runs`: a look at all runs, from the table of the last scan where they have not changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from layerwatch.cli import main
from layerwatch.monitor import LogWriter
from layerwatch.monitor.fleet import TABLE, reading
from layerwatch.monitor.fleet.places import Place
from tests.monitor.made_fleets import make_fleet, make_sick
from tests.monitor.made_logs import info, make_run


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were read and judged."""
    found: list[str] = []

    def counted(root: str, place: Place) -> dict[str, Any]:
        found.append(place.name)
        return reading.read_below(root, place)

    monkeypatch.setattr("layerwatch.monitor.fleet.scanning.read_below", counted)
    return found


def listed(out: str) -> list[str]:
    """The names in the table of `runs`, which are words here."""
    return [line.split()[0] for line in out.splitlines()[3:] if line.strip()]


def test_each_run_is_judged_once_and_an_unchanged_one_of_the_table_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], read: list[str]
) -> None:
    make_fleet(tmp_path)
    assert main(["runs", str(tmp_path), "--where", "health:critical"]) == 0
    assert listed(capsys.readouterr().out) == ["sick"]
    assert sorted(read) == ["good", "group/other", "sick", "torn"]
    assert not (tmp_path / TABLE).exists()
    main(["scan", str(tmp_path)])
    before = (tmp_path / TABLE).read_bytes()
    make_sick(tmp_path / "late")
    read.clear()
    capsys.readouterr()
    assert main(["runs", str(tmp_path), "--where", "-name:torn"]) == 0
    assert sorted(listed(capsys.readouterr().out)) == ["good", "group/other", "late", "sick"]
    assert sorted(read) == ["late", "torn"]  # what could not be read is tried again
    assert (tmp_path / TABLE).read_bytes() == before


def test_new_and_worse_are_so_since_the_table_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "old")
    main(["scan", str(tmp_path)])
    make_sick(tmp_path / "seen")
    main(["scan", str(tmp_path)])
    make_run(tmp_path / "late")
    capsys.readouterr()
    main(["runs", str(tmp_path), "--where", "is:new"])
    assert sorted(listed(capsys.readouterr().out)) == ["late", "seen"]


def test_what_is_no_table_of_ours_hinders_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a")
    main(["scan", str(tmp_path)])
    found = pq.read_table(tmp_path / TABLE)
    about = json.loads(found.schema.metadata[b"layerwatch_scan"]) | {"version": 99}
    newer = found.replace_schema_metadata({"layerwatch_scan": json.dumps(about)})
    capsys.readouterr()
    for write in (
        lambda path: pq.write_table(newer, path),
        lambda path: path.write_bytes(b"PAR1"),
    ):
        write(tmp_path / TABLE)
        assert main(["runs", str(tmp_path)]) == 0
        out, err = capsys.readouterr()
        assert (listed(out), err) == (["a"], "")


def test_unreadable_and_unknown_runs_are_what_a_scan_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_fleet(tmp_path)
    LogWriter(tmp_path / "begun", info())
    assert main(["runs", str(tmp_path), "--where", "health:unknown,unreadable"]) == 0
    out, err = capsys.readouterr()
    assert listed(out) == ["begun"]
    assert out.splitlines()[3].split()[1] == "unknown"
    assert err.startswith("torn: torn/run.json is damaged")
