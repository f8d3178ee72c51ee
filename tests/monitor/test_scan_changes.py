"""Scans one after the other: what is read again, what became worse, who is live, whose clock is wrong."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layerwatch.monitor import LogWriter, RunError
from layerwatch.monitor.description import write_json
from layerwatch.monitor.fleet import NotKeptError, ScanTable, read_table, scan, scan_and_keep, worsened
from layerwatch.monitor.fleet import scanning as module
from layerwatch.monitor.labels import edit_labels
from layerwatch.monitor.run import LIVE_SECONDS, Run
from layerwatch.monitor.store import Store
from tests.monitor.made_fleets import make_fleet, make_sick
from tests.monitor.made_logs import info, make_run, write_step


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of runs as they are read."""
    seen: list[str] = []
    plain = module.read_below

    def noted(root: str, place: Any) -> Any:
        seen.append(place.name)
        return plain(root, place)

    monkeypatch.setattr(module, "read_below", noted)
    return seen


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock of who scans; a scan takes no time."""

    def set_to(moment: float) -> None:
        monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: moment, monotonic=lambda: 0.0))

    return set_to


def by_run(table: ScanTable) -> dict[str, dict[str, Any]]:
    return {row["run"]: row for row in table.rows}


def test_every_run_is_a_row_and_what_is_unchanged_is_not_read_again(tmp_path: Path, read: list[str]) -> None:
    make_fleet(tmp_path)
    first = scan_and_keep(tmp_path)
    assert sorted(read) == ["good", "group/other", "sick", "torn"]
    health = {name: row["health"] for name, row in by_run(first).items()}
    assert health == {
        "good": "healthy", "group/other": "healthy", "sick": "critical", "torn": "unreadable"
    }  # fmt: skip
    read.clear()
    second = scan_and_keep(tmp_path)
    assert read == ["torn"]  # it may have been mended
    assert second.before == first.scanned
    same = ("run", "scanned", "key", "findings", "scalars")
    kept, before = by_run(second)["sick"], by_run(first)["sick"]
    assert repr([kept[k] for k in same]) == repr([before[k] for k in same])
    make_run(tmp_path / "new")
    edit_labels(Store(tmp_path / "good"), Run(tmp_path / "good").info, add=["final"])
    shutil.rmtree(tmp_path / "group")
    read.clear()
    third = by_run(scan_and_keep(tmp_path))
    assert sorted(read) == ["good", "new", "torn"]
    assert third["good"]["tags"] == ["base", "final"]
    assert "group/other" not in third


def test_what_became_worse_is_told_once(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    first = scan_and_keep(tmp_path)
    assert worsened(first) == []
    shutil.rmtree(tmp_path / "a")
    make_sick(tmp_path / "a")
    make_sick(tmp_path / "b")
    second = scan_and_keep(tmp_path)
    found = {row["run"]: (row["health_before"], [f["problem"] for f in new]) for row, new in worsened(second)}
    assert found == {"a": ("healthy", ["nonfinite"]), "b": (None, ["nonfinite"])}
    third = scan_and_keep(tmp_path)
    assert worsened(third) == []
    assert {row["run"] for row, _ in worsened(third, since=second.scanned)} == {"a", "b"}
    assert by_run(third)["a"]["worse"] == second.scanned
    assert by_run(third)["a"]["findings"][0]["noticed"] == second.scanned


def test_what_the_first_scan_finds_is_as_old_as_the_run(tmp_path: Path) -> None:
    for file in make_sick(tmp_path / "old").rglob("*"):
        os.utime(file, (1e9, 1e9))
    make_sick(tmp_path / "young")
    scan_and_keep(tmp_path)
    table = scan_and_keep(tmp_path)
    assert [row["run"] for row, _ in worsened(table, since=table.scanned - 86400)] == ["young"]
    assert [row["run"] for row, _ in worsened(table, since=0.0)] == ["young", "old"]


def test_a_run_that_cannot_be_read_any_more_keeps_what_was_known(tmp_path: Path) -> None:
    make_sick(tmp_path / "a")
    scan_and_keep(tmp_path)
    (tmp_path / "a" / "run.json").write_text('{"schema_version": 99}')
    row = by_run(scan_and_keep(tmp_path))["a"]
    assert row["health"] == "unreadable"
    assert "upgrade" in row["error"]
    assert row["steps"] == 8
    assert row["findings"][0]["problem"] == "nonfinite"


def test_copies_of_a_training_are_told(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 5, id="one")
    shutil.copytree(tmp_path / "a", tmp_path / "backup" / "a")
    make_run(tmp_path / "b", id="two")
    table = scan(tmp_path)
    assert {row["run"]: row["copy_of"] for row in table.rows} == {"a": None, "backup/a": "a", "b": None}
    assert any("1 run is a copy of others, such as backup/a of a" in note for note in table.notes)


def test_a_root_that_is_mounted_elsewhere_is_the_same_root(tmp_path: Path, read: list[str]) -> None:
    make_run(tmp_path / "here" / "a")
    scan_and_keep(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    read.clear()
    (row,) = scan_and_keep(tmp_path / "there").rows
    assert read == []
    assert row["health_before"] == "healthy"
    assert Run(row["url"]).last_step == 4


@pytest.mark.parametrize("when", ["it was listed", "a run was read"])
def test_a_root_that_goes_away_while_it_is_scanned_is_not_one_without_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    make_fleet(tmp_path / "runs")
    list_, read = module.places, module.read_below

    def away() -> None:
        if (tmp_path / "runs").exists():
            (tmp_path / "runs").rename(tmp_path / "away")

    def listed(store: Store, private: list[str]) -> Any:
        away()
        return list_(store, private)

    def read_late(root: str, place: Any) -> Any:
        away()
        return read(root, place)

    if when == "it was listed":
        monkeypatch.setattr(module, "places", listed)
    else:
        monkeypatch.setattr(module, "read_below", read_late)
    with pytest.raises(RunError, match="check the path"):
        scan_and_keep(tmp_path / "runs")
    assert not (tmp_path / "runs").exists()  # where the share is mounted again


def test_half_copied_runs_are_runs_still(tmp_path: Path) -> None:
    make_run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    (tmp_path / "half" / "run.json").unlink()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    part = next((tmp_path / "cut" / "stats").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    rows = by_run(scan(tmp_path))
    assert rows["half"]["steps"] == 5
    assert any("run.json" in note for note in rows["half"]["notes"])
    assert any(part.name in note for note in rows["cut"]["notes"])


def test_a_live_run_is_live_and_one_that_was_killed_is_not(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "mine", {**info(), "host": os.uname().nodename, "pid": os.getpid()})
    write_step(log, 0)
    make_run(tmp_path / "dead", close=False, host=os.uname().nodename, pid=2**22 + 7)
    rows = by_run(scan(tmp_path))
    assert rows["mine"]["live"]
    assert not rows["dead"]["live"]
    again = by_run(scan(tmp_path, before=scan(tmp_path)))
    assert again["mine"]["live"]
    log.close()
    assert not by_run(scan(tmp_path))["mine"]["live"]


@pytest.mark.parametrize("skew", [-7200.0, 0.0, 7200.0])
def test_who_is_silent_is_seen_whatever_the_writers_clock_says(
    tmp_path: Path, at: Callable[[float], None], skew: float
) -> None:
    """The host is another one: nothing but the times of its files tells."""
    path = make_run(tmp_path / "far", close=False)
    now = time.time()

    def writes(moment: float) -> None:
        (wal,) = (path / "wal").glob("*.wal")
        for file in path.rglob("*"):
            os.utime(file, (moment + skew, moment + skew))
        os.utime(wal, (moment + skew, moment + skew))

    table: ScanTable | None = None
    for moment in (0, 30, 60):
        writes(now + moment)
        at(now + moment + 1)
        table = scan(tmp_path, before=table)
    assert table is not None
    assert table.rows[0]["live"]
    for moment in (80, 100, 140, 200):
        at(now + moment)
        table = scan(tmp_path, before=table)
        silent = table.scanned - table.rows[0]["heard"]
        assert silent == pytest.approx(moment - 60, abs=2)
        assert table.rows[0]["live"] == (silent < LIVE_SECONDS)
    told = [note for note in table.notes if "dated" in note]
    assert bool(told) == (skew > 0)


def test_since_reads_no_old_runs(tmp_path: Path, read: list[str]) -> None:
    old, new = make_run(tmp_path / "old"), make_run(tmp_path / "new")
    for file in old.rglob("*"):
        os.utime(file, (1e9, 1e9))
    table = scan_and_keep(tmp_path, since="1d")
    assert read == ["new"]
    assert [row["run"] for row in table.rows] == ["new"]
    assert "1 run was not written to" in table.notes[0]
    scan_and_keep(tmp_path)
    read.clear()
    (new / "labels.json").write_text("{}")
    kept = scan_and_keep(tmp_path, since="2026-01-01")
    assert read == ["new"]
    assert {row["run"] for row in kept.rows} == {"old", "new"}


def test_a_damaged_table_is_made_anew_and_a_newer_one_is_left(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    scan_and_keep(tmp_path)
    place = tmp_path / "layerwatch-scan.parquet"
    place.write_bytes(place.read_bytes()[:100])
    table = scan_and_keep(tmp_path)
    assert "read anew" in table.notes[0]
    assert read_table(place).rows[0]["run"] == "a"


def test_a_file_that_is_no_table_is_never_replaced(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a")
    exported = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"x": [1]}), exported)
    for place in (run / "run.json", exported, tmp_path / "runs"):
        before = place.read_bytes() if place.is_file() else b""
        with pytest.raises(RunError, match="choose another --out"):
            scan_and_keep(tmp_path / "runs", out=place)
        assert (place.read_bytes() if place.is_file() else b"") == before


def test_a_table_that_cannot_be_written_loses_nothing(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotKeptError, match="another --out") as failed:
        scan_and_keep(tmp_path / "runs", out=tmp_path / "file" / "t.parquet")
    assert [row["run"] for row in failed.value.table.rows] == ["a"]


def test_a_scan_of_a_run_itself_does_not_change_it(tmp_path: Path, read: list[str]) -> None:
    make_run(tmp_path / "a")
    assert [row["run"] for row in scan_and_keep(tmp_path / "a").rows] == ["a"]
    scan_and_keep(tmp_path / "a")
    assert read == ["a"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"engine": "spark"}, "serial, processes, dask"),
        ({"scheduler": "tcp://x:1"}, "no scheduler"),
        ({"workers": 2}, "workers"),
        ({"engine": "processes", "workers": 0}, "above 0"),
        ({"since": "yesterday"}, "7d"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        scan_and_keep(tmp_path, **arguments)


def test_a_root_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="check the path"):
        scan(tmp_path / "none")
    assert scan(tmp_path).rows == []


def test_run_json_without_a_number_is_no_trouble(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    about = {"schema_version": 2, "created": None, "host": None, "tensors": []}
    write_json(path / "run.json", about)
    (row,) = scan(tmp_path).rows
    assert (row["error"], row["created"], row["steps"], row["id"]) == (None, None, 5, None)
