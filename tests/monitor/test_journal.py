"""The writer on a disk that is full, slow, removed, read-only or out of power."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from made_logs import TENSORS, info, make_run, stats_batch, write_step

from layerwatch.monitor import LogWriter, Run, RunError, background, journal
from layerwatch.monitor import log as log_module
from layerwatch.monitor.process import waits


@pytest.fixture(autouse=True)
def tries_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(background, "RETRY_SECONDS", 0.01)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], None]]:
    """Called with an error number: every write fails from now on; with None: they work again."""
    real, error = (os.writev, os.write), [0]

    def writev(descriptor: int, pieces: list[bytes]) -> int:
        if error[0]:  # some of it still fits
            return real[1](descriptor, b"".join(pieces)[:7])
        return real[0](descriptor, pieces)

    def write(descriptor: int, data: bytes) -> int:
        if error[0]:
            raise OSError(error[0], os.strerror(error[0]))
        return real[1](descriptor, data)

    monkeypatch.setattr(os, "writev", writev)
    monkeypatch.setattr(os, "write", write)
    yield lambda number: error.__setitem__(0, number or 0)
    error[0] = 0


def gaps(path: Path) -> list[tuple[int, str]]:
    events = Run(path).events()
    events = events[events["event"] == "gap"]
    return list(zip(events["step"], events["message"], strict=True))


def until(done: Callable[[], object]) -> None:
    limit = time.monotonic() + 60
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.01)


def captured(path: Path) -> list[int]:
    return sorted(set(Run(path).stats("weight")["step"]))


# Full, and then not -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [28, 122, 5, 30])  # full, over quota, broken, read-only
def test_a_gap_is_told_once_marked_and_ended(
    tmp_path: Path, disk: Callable[[int | None], None], caplog: pytest.LogCaptureFixture, number: int
) -> None:
    path = tmp_path / "a"
    with caplog.at_level(logging.WARNING, "layerwatch"):
        log = LogWriter(path, info())
        for step in range(10):
            disk(number if step in (3, 4, 7) else None)
            write_step(log, step)
        log.close()
    run = Run(path)
    assert captured(path) == [0, 1, 2, 5, 6, 8, 9]
    assert run.scalars("train_loss")["step"].tolist() == list(range(10))  # these waited
    assert run.problems == {}
    reason = os.strerror(number)
    assert gaps(path) == [
        (5, f"2 captures could not be written from step 3 to 4 ({reason}); written again from step 5"),
        (8, f"1 capture could not be written from step 7 to 7 ({reason}); written again from step 8"),
    ]
    assert len(caplog.records) == 1
    assert "training goes on" in caplog.text
    assert reason in caplog.text


def test_the_disk_is_not_asked_at_every_step(
    tmp_path: Path, disk: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "RETRY_SECONDS", 60.0)
    log = LogWriter(tmp_path / "a", info())
    write_step(log, 0)
    disk(28)
    write_step(log, 1)
    disk(None)
    write_step(log, 2)  # it could, but is not tried yet
    assert captured(tmp_path / "a") == [0]
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    write_step(log, 3)
    monkeypatch.undo()
    assert captured(tmp_path / "a") == [0, 3]


def test_what_waits_in_memory_is_bounded(
    tmp_path: Path, disk: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "HELD_BYTES", 2_000)
    log = LogWriter(tmp_path / "a", info())
    write_step(log, 0)
    disk(28)
    for step in range(1, 200):
        write_step(log, step)
    gap = log._journal._gap
    assert gap is not None
    assert 1_500 < gap.held_bytes <= 2_000
    disk(None)
    write_step(log, 200)
    log.close()
    losses = Run(tmp_path / "a").scalars("train_loss")["step"].tolist()
    assert losses[0] == 0
    assert losses[-1] == 200
    assert 10 < len(losses) < 190
    assert "199 captures" in gaps(tmp_path / "a")[0][1]


LIMITED = """
import resource, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from made_logs import info, write_step
from layerwatch.monitor import LogWriter, journal
journal.RETRY_SECONDS = 0.0
path, hard = Path({path!r}), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
log = LogWriter(path, info())
for step in range(60):
    size = next((path / "wal").glob("*.wal")).stat().st_size
    if step == 20:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
    if step == 40:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    write_step(log, step)
log.close()
"""


def test_a_real_limit_of_the_system(tmp_path: Path, checkout: Path) -> None:
    """Files may not grow any more, in the middle of a write; later they may."""
    code = LIMITED.format(tests=str(Path(__file__).parent), path=str(tmp_path / "a"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stderr.count("training goes on") == 1
    assert captured(tmp_path / "a") == [*range(20), *range(40, 60)]
    assert Run(tmp_path / "a").scalars("train_loss")["step"].tolist() == list(range(60))
    assert Run(tmp_path / "a").problems == {}
    assert [step for step, _ in gaps(tmp_path / "a")] == [40]
    assert Run(tmp_path / "a").info["closed"]


# Removed ----------------------------------------------------------------------------------------------------


def test_a_removed_run_folder_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a"
    log = LogWriter(path, info())
    for step in range(6):
        if step == 3:
            shutil.rmtree(path)
        write_step(log, step)
    log.close()
    assert captured(path) == [3, 4, 5]
    assert Run(path).info["name"] == "made"
    ((step, message),) = gaps(path)
    assert step == 3
    assert "folder was removed" in message


def test_a_folder_whose_parent_went_waits_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A mount that went away is not replaced by a folder on another disk."""
    parent = tmp_path / "mount"
    path = parent / "a"
    log = LogWriter(path, info())
    for step in range(9):
        if step == 3:
            parent.rename(tmp_path / "gone")
            shutil.rmtree(tmp_path / "gone")
        if step == 6:
            assert not parent.exists()
            parent.mkdir()
        write_step(log, step)
    log.close()
    assert captured(path) == [6, 7, 8]
    assert len([r for r in caplog.records if "training goes on" in r.message]) == 1


def test_a_run_that_cannot_be_written_to_at_all_is_an_error(
    tmp_path: Path, disk: Callable[[int | None], None]
) -> None:
    disk(30)
    with pytest.raises(RunError, match=r"cannot be used \(Read-only file system\): choose another run="):
        LogWriter(tmp_path / "a", info())


# Slow -------------------------------------------------------------------------------------------------------


def test_captures_are_thinned_while_parquet_cannot_keep_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "SEGMENT_BYTES", 6_000)
    monkeypatch.setattr(log_module, "BACKLOG_BYTES", 30_000)
    go, real = threading.Event(), log_module.advance

    def slow(*args: object, **named: object) -> None:
        go.wait(60)
        real(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(log_module, "advance", slow)
    log = LogWriter(tmp_path / "a", info())
    written = []
    for step in range(40):
        if log.has_room(step):
            written.append(step)
            write_step(log, step)
    assert 5 < len(written) < 30  # the rest would wait in ever more files
    go.set()
    until(lambda: not log._background.waiting)
    assert log.has_room(40)
    write_step(log, 40)
    log.close()
    assert captured(tmp_path / "a") == [*written, 40]
    events = Run(tmp_path / "a").events().set_index("event")
    assert events.loc["thinned", "step"] == written[-1] + 1
    left_out = 40 - len(written)
    assert events.loc["thinning ended", "message"] == (
        f"{left_out} captures were left out since step {written[-1] + 1}"
    )


def test_waits_are_counted() -> None:
    before = waits()
    time.sleep(0.01)
    assert waits() > before > 0


@pytest.mark.parametrize(("before", "after"), [(7, 8), (0, 0)])  # none at all: nobody counts them
def test_a_slow_write_is_followed_by_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    clock, real, waited = [1000.0], os.writev, [before]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(log_module, "SLOW_SECONDS", 0.25)
    monkeypatch.setattr(log_module, "waits", lambda: waited[0])

    def write(descriptor: int, pieces: list[bytes]) -> int:
        clock[0] += 0.5
        waited[0] = after
        return real(descriptor, pieces)

    log = LogWriter(tmp_path / "a", info())
    monkeypatch.setattr(os, "writev", write)
    log.stats(stats_batch([0]))
    monkeypatch.setattr(os, "writev", real)
    assert not log.has_room(1)
    clock[0] += 4.0
    assert not log.has_room(2)
    clock[0] += 0.6  # half a second is a tenth of five
    assert log.has_room(3)
    monkeypatch.undo()
    log.close()


def test_a_write_that_only_waited_for_a_processor_is_not_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others kept the machine busy: the disk would have taken it at once."""
    clock, real = [1000.0], os.writev
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(log_module, "SLOW_SECONDS", 0.25)
    monkeypatch.setattr(log_module, "waits", lambda: 7)

    def write(descriptor: int, pieces: list[bytes]) -> int:
        clock[0] += 0.5
        return real(descriptor, pieces)

    log = LogWriter(tmp_path / "a", info())
    monkeypatch.setattr(os, "writev", write)
    log.stats(stats_batch([0]))
    assert log.has_room(1)
    monkeypatch.undo()
    log.close()
    assert not set(Run(tmp_path / "a").events()["event"]) & {"thinned", "thinning ended"}


# The background ---------------------------------------------------------------------------------------------


def test_work_that_fails_is_tried_again_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "SEGMENT_BYTES", 5_000)
    real, failures = pq.ParquetWriter.write_table, [0]

    def full(*args: object, **named: object) -> None:
        failures[0] += 1
        if failures[0] % 3:
            raise OSError(28, "No space left on device")
        real(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    log = LogWriter(tmp_path / "a", info())
    for step in range(20):
        write_step(log, step)
    until(lambda: failures[0] > 3)
    assert captured(tmp_path / "a") == list(range(20))
    monkeypatch.undo()
    log.close()
    assert captured(tmp_path / "a") == list(range(20))
    assert not list((tmp_path / "a" / "wal").iterdir())


def test_what_the_background_takes_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "SEGMENT_BYTES", 5_000)
    log = LogWriter(tmp_path / "a", info(), sync_seconds=0.01)
    for step in range(50):
        write_step(log, step)
    until(lambda: not log._background.waiting and log.background_seconds > 0.001)
    assert log.background_seconds < 30
    log.close()


def test_rows_are_forced_to_the_disk_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was appended longer ago than the interval would survive a power cut."""
    synced: dict[int, int] = {}
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        found = os.fstat(descriptor)
        synced[found.st_ino] = found.st_size

    monkeypatch.setattr(os, "fsync", fsync)
    log = LogWriter(tmp_path / "a", info(), sync_seconds=0.05)
    for step in range(3):
        write_step(log, step)
        (wal,) = (tmp_path / "a" / "wal").glob("*.wal")
        until(lambda wal=wal: synced.get(wal.stat().st_ino, 0) >= wal.stat().st_size)
        assert synced[wal.stat().st_ino] == wal.stat().st_size
    log.close()


def test_a_part_is_on_the_disk_before_its_write_ahead_file_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of system calls: sync the part, rename it, sync its folder, then remove the source."""
    calls: list[tuple[str, str]] = []
    originals = (os.fsync, os.replace, Path.unlink)

    def fsync(descriptor: int) -> None:
        calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        originals[0](descriptor)

    def replace(source: str, target: str) -> None:
        calls.append(("rename", str(target)))
        originals[1](source, target)

    def unlink(self: Path, missing_ok: bool = False) -> None:
        calls.append(("remove", str(self)))
        originals[2](self, missing_ok=missing_ok)

    log = LogWriter(tmp_path / "a", info())
    write_step(log, 0)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(Path, "unlink", unlink)
    log.close()
    removed = next(i for i, (what, file) in enumerate(calls) if what == "remove" and file.endswith(".wal"))
    for table in ("stats", "values", "scalars", "events"):
        folder = str(tmp_path / "a" / table)
        renamed = next(i for i, c in enumerate(calls) if c[0] == "rename" and c[1].startswith(folder))
        synced = [i for i, c in enumerate(calls) if c[0] == "sync" and c[1].startswith(f"{folder}/.")]
        assert any(i < renamed for i in synced), table
        assert any(renamed < i < removed for i, c in enumerate(calls) if c == ("sync", folder)), table


# Processes --------------------------------------------------------------------------------------------------


def test_a_forked_child_writes_nothing(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "a", info())
    write_step(log, 0)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            write_step(log, 1)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    write_step(log, 2)
    log.close()
    assert captured(tmp_path / "a") == [0, 2]


def test_a_run_that_is_being_written_cannot_be_resumed_by_another_process(
    tmp_path: Path, checkout: Path
) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from made_logs import info, write_step
from layerwatch.monitor import LogWriter
import os, socket
log = LogWriter(Path({str(tmp_path / "a")!r}), info(host=socket.gethostname(), pid=os.getpid()))
write_step(log, 0)
print("ready", flush=True)
sys.stdin.read()
os._exit(0)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    with pytest.raises(RunError, match=f"process {child.pid} still writes"):
        LogWriter(tmp_path / "a", info(), resume=True)
    child.stdin.close()
    child.wait()
    child.stdout.close()
    log = LogWriter(tmp_path / "a", info(), resume=True)
    write_step(log, 1)
    log.close()
    assert captured(tmp_path / "a") == [0, 1]


def test_a_number_that_another_process_got_is_no_writer(tmp_path: Path) -> None:
    """Process numbers are given again, in containers always the same ones."""
    import socket

    path = make_run(
        tmp_path / "a", 1, close=False, host=socket.gethostname(), pid=os.getppid(), process_started="then"
    )
    run_json = (path / "run.json").read_text()
    assert '"process_started": "then"' not in run_json  # the writer tells it of itself
    (path / "run.json").write_text(run_json.replace(log_module.started() or "?", "an earlier boot:1"))
    log = LogWriter(path, info(), resume=True)
    log.close()


def test_writers_of_one_run_never_share_a_file(tmp_path: Path) -> None:
    """Ranks by their names; two of one name, on machines that do not see each other, by the file system."""
    first = LogWriter(tmp_path / "a", info())
    other = LogWriter(tmp_path / "a", info(), writer="r1")
    again = LogWriter(tmp_path / "a", info(), resume=True)
    again.begin(10)
    for step, log in [(0, first), (1, other), (10, again), (2, first), (3, other), (11, again)]:
        write_step(log, step)
    assert len(list((tmp_path / "a" / "wal").glob("*.wal"))) == 3
    for log in (other, again, first):
        log.close()
    table = Run(tmp_path / "a")._log.table("stats").to_pandas()
    assert sorted(table["step"]) == sorted(step for step in (0, 1, 2, 3, 10, 11) for _ in TENSORS)
    assert set(table["session"]) == {0, 1}
    assert Run(tmp_path / "a").problems == {}


def test_an_error_of_ours_in_the_background_leaves_the_log_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is lost, nothing is left out: what is not Parquet stays in write-ahead files."""
    monkeypatch.setattr(log_module, "SEGMENT_BYTES", 5_000)
    monkeypatch.setattr(log_module, "BACKLOG_BYTES", 5_000)

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(log_module, "advance", broken)
    log = LogWriter(tmp_path / "a", info())
    for step in range(20):
        write_step(log, step)
        until(lambda step=step: log.has_room(step + 1))
    assert captured(tmp_path / "a") == list(range(20))
    assert len([r for r in caplog.records if "compacted later" in r.message]) == 1
    monkeypatch.undo()
    log.close()
    assert captured(tmp_path / "a") == list(range(20))
    assert not list((tmp_path / "a" / "wal").iterdir())
