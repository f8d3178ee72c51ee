"""Writing a run: claiming a folder, resuming, rotation, compaction that may be interrupted at any point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from made_logs import TENSORS, assert_complete, counted, info, make_run, stats_batch, write_step

from layerwatch.monitor import LogWriter, Run, RunError, RunExistsError, compact
from layerwatch.monitor import log as log_module
from layerwatch.monitor.description import write_json
from layerwatch.monitor.schema import SCHEMA_VERSION
from layerwatch.monitor.spans import Span, spans

# Claiming a folder ------------------------------------------------------------------------------------------


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(RunExistsError, match=r"exists already: pass resume=True .* or another run="):
        LogWriter(path, info())
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(RunError, match="is a file: choose another run="):
        LogWriter(tmp_path / "a", info())
    assert (tmp_path / "a").read_text() == "mine"


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="found none"):
        LogWriter(tmp_path / "a", info(), resume=True)


@pytest.mark.parametrize("closed", [True, False])
def test_a_resumed_run_goes_on_in_new_files(tmp_path: Path, closed: bool) -> None:
    path = make_run(tmp_path / "a", 3, close=closed)
    created = Run(path).info["created"]
    log = LogWriter(path, info(pid=2), resume=True)
    for step in (3, 4):
        write_step(log, step)
    assert_complete(path, 5)  # before and after the close
    assert not Run(path).info["closed"]
    log.close()
    assert_complete(path, 5)
    assert Run(path).info["created"] == created
    assert Run(path).info["closed"]


def test_closing_twice_changes_nothing(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "a", info())
    write_step(log, 0)
    log.close()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    log.close()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_run_json_is_replaced_whole(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "a", info())
    log.update_info(notes=["x"])
    assert json.loads((tmp_path / "a" / "run.json").read_text())["notes"] == ["x"]
    assert not list((tmp_path / "a").glob(".*"))


# Rotation and compaction ------------------------------------------------------------------------------------


def test_a_long_run_rotates_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "SEGMENT_BYTES", 20_000)
    path = tmp_path / "a"
    log = LogWriter(path, info())
    for step in range(60):
        write_step(log, step)
        if step % 20 == 19:
            assert_complete(path, step + 1)
    limit = time.monotonic() + 60
    while log._background.waiting and time.monotonic() < limit:
        time.sleep(0.01)
    assert len(list((path / "stats").glob("*.parquet"))) > 1  # compacted while the training ran
    log.close()
    assert_complete(path, 60)
    assert [p.suffix for p in (path / "stats").iterdir()] == [".parquet"]
    assert not list((path / "wal").iterdir())


def test_a_full_disk_stops_the_background_work_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "SEGMENT_BYTES", 5_000)
    real = pq.ParquetWriter

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "ParquetWriter", full)
    log = LogWriter(tmp_path / "a", info())
    for step in range(10):
        write_step(log, step)
    assert_complete(tmp_path / "a", 10)
    monkeypatch.setattr(pq, "ParquetWriter", real)
    log.close()
    assert_complete(tmp_path / "a", 10)


def test_empty_scalars_and_values_leave_a_readable_log(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "a", info())
    log.scalars(0, 0.0, {})
    log.values([])
    log.scalars(0, 0.0, {"loss": 1.0})
    log.close()
    assert Run(tmp_path / "a").problems == {}
    assert Run(tmp_path / "a").scalar_names() == ["loss"]


@pytest.mark.parametrize(
    ("name", "span"),
    [
        ("r0-000003.wal", Span("r0", 3, 3)),
        ("r0-000001-000042.parquet", Span("r0", 1, 42)),
        ("r1-x-000002.parquet", Span("r1-x", 2, 2)),
        ("notes.txt", None),
        (".r0-000001.parquet.tmp", None),
    ],
)
def test_a_file_name_says_what_it_holds(name: str, span: Span | None) -> None:
    assert Span.of(Path(name)) == span


def test_a_covered_file_does_not_count(tmp_path: Path) -> None:
    for name in ("r0-000001", "r0-000002", "r0-000001-000002", "r0-000003", "r1-000001"):
        (tmp_path / f"{name}.parquet").touch()
    assert [s.stem for s in spans(tmp_path, ".parquet")] == ["r0-000001-000002", "r0-000003", "r1-000001"]


# A process that dies ----------------------------------------------------------------------------------------

CHILD = """
import sys, os, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from made_logs import info, write_step
from layerwatch.monitor import LogWriter, log
log.SEGMENT_BYTES = 20_000
writer = LogWriter(Path({path!r}), info())
for step in range(100_000):
    write_step(writer, step)
    print(step, flush=True)
"""


def test_a_killed_writer_leaves_every_written_step(tmp_path: Path, checkout: Path) -> None:
    path = tmp_path / "a"
    code = CHILD.format(tests=str(Path(__file__).parent), path=str(path))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=checkout)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) == 150:
            child.kill()
            break
    reported = [int(line) for line in child.stdout if line.endswith("\n")]
    child.stdout.close()
    child.wait()
    done = max([150, *reported])
    run = Run(path)
    found = counted(run)
    steps = {step for step, _ in found}
    assert set(range(done + 1)) <= steps <= set(range(done + 2))
    assert set(found.values()) == {1}
    assert len(found) == len(steps) * len(TENSORS)
    assert run.problems == {}
    compact(path)
    assert counted(Run(path)) == found


def test_a_batch_is_the_unit_of_writing(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "a", info())
    log.stats(stats_batch([0]))
    (wal,) = (tmp_path / "a" / "wal").glob("*.wal")
    size = wal.stat().st_size
    log.stats(stats_batch([1]))
    os.truncate(wal, size + (wal.stat().st_size - size) * 3 // 4)
    assert set(Run(tmp_path / "a").stats("weight")["step"]) == {0}


def test_a_run_without_run_json_is_a_run(tmp_path: Path) -> None:
    """It is neither mixed with another one nor given up."""
    path = make_run(tmp_path / "a", 2)
    (path / "run.json").unlink()
    with pytest.raises(RunExistsError):
        LogWriter(path, info())
    log = LogWriter(path, info(), resume=True)
    write_step(log, 2)
    log.close()
    assert log.session == 1
    assert_complete(path, 3)


def test_a_run_of_a_newer_layerwatch_is_not_resumed(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", 1)
    write_json(path / "run.json", {**Run(path).info, "schema_version": SCHEMA_VERSION + 1})
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="upgrade"):
        LogWriter(path, info(), resume=True)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_a_session_rotates_by_its_own_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by that of a run that was begun last year."""
    path = make_run(tmp_path / "a", 1)
    write_json(path / "run.json", {**Run(path).info, "created": 1.0})
    log = LogWriter(path, info(), resume=True)
    write_step(log, 1)
    later = time.monotonic() + log_module.SEGMENT_SECONDS + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    write_step(log, 2)
    assert log._journal.span.last == 3
    monkeypatch.undo()
    log.close()
    assert Run(path).info["created"] == 1.0
