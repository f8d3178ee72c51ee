"""Roots as they are after a year: half-copied runs, old and newer formats, other clocks, copies, stores that
refuse. The scan says what it could not read, and reads the rest."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from layerwatch.cli import main
from layerwatch.monitor.fleet.scanning import scan
from layerwatch.monitor.fleet.table import TABLE, read_table
from tests.monitor.made_logs import make_run
from tests.object_server import CREDENTIALS, ObjectServer

DATA = Path(__file__).parents[1] / "data"
GOOD = ("good", "odd [bold] <b> %41", "v1-closed", "v1-interrupted", "v2-closed", "v2-interrupted")
#: run -> what is said of it.
UNREADABLE = {"newer": "upgrade layerwatch", "empty": "damaged"}


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """A root with everything in it."""
    root = tmp_path / "runs"
    for name in GOOD[:2]:
        make_run(root / name)
    for version in ("v1", "v2"):
        for state in ("closed", "interrupted"):
            shutil.copytree(DATA / version / state, root / f"{version}-{state}")
    (make_run(root / "newer") / "run.json").write_text('{"schema_version": 99}')
    (root / "empty").mkdir()
    (root / "empty" / "run.json").write_text("")
    make_run(root / "half")
    for place in ("scalars", "run.json"):
        victim = root / "half" / place
        shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    cut = next((make_run(root / "cut") / "stats").glob("*.parquet"))
    cut.write_bytes(cut.read_bytes()[:-40])
    shutil.copytree(root / "good", root / "archive" / "good")
    tomorrow = time.time() + 86400
    for file in make_run(root / "ahead", created=tomorrow).rglob("*"):
        os.utime(file, (tomorrow, tomorrow))
    (root / "notes.txt").write_text("no run")
    (root / "figures").mkdir()
    return root


def scanned(
    root: Path | str, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[int, dict[str, Any], str]:
    """Exit code, the runs by name, stderr."""
    code = main(["scan", str(root), "--format", "json", *more])
    out = capsys.readouterr()
    runs = json.loads(out.out)["runs"] if out.out else []
    return code, {row["run"]: row for row in runs}, out.err


def assert_messy(rows: dict[str, Any]) -> None:
    """What can be read is read, and the rest is a row with the reason."""
    assert set(rows) == {*GOOD, *UNREADABLE, "half", "cut", "archive/good", "ahead"}
    for name in GOOD:
        assert rows[name]["error"] is None
        assert rows[name]["steps"] > 0
    for name, words in UNREADABLE.items():
        assert (rows[name]["health"], words in rows[name]["error"]) == ("unreadable", True), rows[name][
            "error"
        ]
    assert any("run.json" in note for note in rows["half"]["notes"])
    assert any("stats/" in note for note in rows["cut"]["notes"])
    copies = [rows[name]["copy_of"] for name in ("good", "archive/good")]
    assert copies in ([None, "good"], ["archive/good", None])  # nothing tells which was first


def test_a_messy_root(messy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows, err = scanned(messy, capsys)
    assert (code, err) == (0, "")
    assert_messy(rows)
    table = read_table(messy / TABLE)
    assert any("ahead" in note and "clocks" in note for note in table.notes)
    assert main(["scan", str(messy)]) == 0  # and as text
    text = capsys.readouterr().out
    assert "newer: " in text
    assert "could not be read" in text


def test_odd_names_links_and_pipes_neither_loop_nor_hang(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    make_run(root / "good")
    make_run(root / "two\nlines")
    (root / "loop").symlink_to(root)
    (root / "nowhere").symlink_to(root / "gone")
    os.mkfifo(make_run(root / "piped") / "wal" / "r0-000099.wal")
    os.mkfifo(make_run(root / "pipe") / "pipe")
    (root / "pipe" / "run.json").unlink()
    os.mkfifo(root / "pipe" / "run.json")
    code, rows, err = scanned(root, capsys)
    assert (code, err) == (0, "")
    assert set(rows) == {"good", "two\nlines", "piped", "pipe"}
    assert rows["good"]["error"] is None
    assert rows["piped"]["steps"] == rows["two\nlines"]["steps"] == 5


# Object stores ----------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(messy: Path, object_server: ObjectServer) -> str:
    """The same on S3."""
    url = object_server.make_bucket()
    store = object_server.files()
    for file in messy.rglob("*"):
        if file.is_file():
            with store.open_output_stream(f"bucket/runs/{file.relative_to(messy).as_posix()}") as sink:
                sink.write(file.read_bytes())
    return f"{url}/runs"


def test_a_messy_bucket(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows, err = scanned(bucket, capsys)
    assert (code, err) == (0, "")
    assert_messy(rows)
    assert read_table(f"{bucket}/{TABLE}").root == bucket


def test_a_store_that_goes_away_in_the_middle_keeps_what_was_read(
    bucket: str, object_server: ObjectServer
) -> None:
    before = scan(bucket)
    unread = [row | {"key": "another"} for row in before.rows[:3]]
    before.rows[:3] = unread
    table = scan(bucket, before=before, progress=lambda done, _: object_server.stop() if done == 1 else None)
    rows = {row["run"]: row for row in table.rows}
    assert len(rows) == len(before.rows)
    lost = [row for row in rows.values() if row["error"] and row["run"] not in UNREADABLE]
    assert 1 <= len(lost) <= 2
    assert all("cannot be reached" in row["error"] for row in lost)
    assert all(row["steps"] for row in lost)  # what was known is kept
    object_server.start()
    again = {row["run"]: row for row in scan(bucket, before=table).rows}
    assert {run for run, row in again.items() if row["error"]} == set(UNREADABLE)


@pytest.fixture(autouse=True)
def _no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """On stderr, when the machine is slow."""
    monkeypatch.setattr("layerwatch.scan_command.LINE_SECONDS", 1e9)


def refused(url: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The one line that is said."""
    began = time.monotonic()
    code, rows, err = scanned(url, capsys, *more)
    assert (code, rows) == (2, {})
    assert len(err.splitlines()) == 1
    assert time.monotonic() - began < 40
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in err
    return err


def test_buckets_that_cannot_be_read_are_one_line(
    object_server: ObjectServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no such bucket" in refused("s3://gone/runs", capsys)
    assert "no credentials in the URL" in refused("s3://key:not-to-be-shown@bucket/runs", capsys)
    with ObjectServer(unchecked=0) as strict:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", strict.endpoint)
        said = refused("s3://bucket/runs", capsys)
        assert "access" in said
    assert "cannot be reached" in refused("s3://bucket/runs", capsys)  # that server has ended


def test_a_table_that_cannot_be_written_costs_no_row(
    messy: Path, object_server: ObjectServer, capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows, err = scanned(messy, capsys, "--out", "s3://gone/scan.parquet")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "no such bucket" in err
    assert_messy(rows)
