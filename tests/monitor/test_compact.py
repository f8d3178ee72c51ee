"""Compaction: what is written ahead becomes Parquet, and parts are merged; it may be interrupted anywhere."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from made_logs import TENSORS, assert_complete, counted, info, make_run, write_step

from layerwatch.monitor import LogWriter, Run, compact
from layerwatch.monitor.process import started
from layerwatch.monitor.schema import TABLES
from layerwatch.monitor.wal import WalWriter, encode


class Interrupted(BaseException):
    """The process dies here."""


def dying_at(number: int) -> Callable[..., Any]:
    """Wraps a file operation: its `number`-th call happens no more."""
    calls = iter(range(number))

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if next(calls, None) is None:
                raise Interrupted
            return real(*args, **kwargs)

        return operation

    return wrap


@pytest.fixture
def die_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Interrupts the n-th rename, removal or Parquet file from now on."""
    originals = (os.replace, Path.unlink, pq.ParquetWriter)

    def arm(number: int) -> None:
        wrap = dying_at(number)
        monkeypatch.setattr(os, "replace", wrap(originals[0]))
        monkeypatch.setattr(Path, "unlink", wrap(originals[1]))
        monkeypatch.setattr(pq, "ParquetWriter", wrap(originals[2]))

    yield arm
    monkeypatch.undo()


def several_files(path: Path) -> Path:
    """A run that was interrupted twice: a merged part per table, then two write-ahead files."""
    log = LogWriter(path, info())
    write_step(log, 0)
    log.close()
    for step in (1, 2):
        log = LogWriter(path, info(), resume=True)
        write_step(log, step)
    return path


def test_compaction_interrupted_at_any_point_loses_and_doubles_nothing(
    tmp_path: Path, die_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = several_files(tmp_path / "template")
    completed, number = False, 0
    for number in range(200):
        path = tmp_path / f"run{number}"
        shutil.copytree(template, path)
        live = Run(path)  # a reader that was there before
        die_at(number)
        try:
            compact(path)
            completed = True
        except Interrupted:
            pass
        monkeypatch.undo()
        assert_complete(path, 3)
        live.refresh()
        assert counted(live) == {(s, t): 1 for s in range(3) for t in TENSORS}, number
        compact(path)  # the next attempt finishes the work
        assert_complete(path, 3)
        assert [len(list((path / t).glob("*.parquet"))) for t in TABLES] == [1, 1, 1, 1]
        assert not list((path / "wal").iterdir())
        if completed:
            break
    assert completed
    assert number > 20


def test_large_tables_are_left_to_the_compact_command(tmp_path: Path) -> None:
    path = several_files(tmp_path / "a")
    compact(path, limit=1)
    assert len(list((path / "stats").glob("*.parquet"))) == 3
    assert_complete(path, 3)
    assert compact(path) == 12
    assert len(list((path / "stats").glob("*.parquet"))) == 1
    assert_complete(path, 3)


def test_a_damaged_part_does_not_stop_the_compaction_of_the_others(tmp_path: Path) -> None:
    path = several_files(tmp_path / "a")
    compact(path, limit=1)
    damaged = sorted((path / "stats").glob("*.parquet"))[1]
    damaged.write_bytes(b"PAR1" + bytes(100))
    compact(path)
    run = Run(path)
    assert set(run.stats("weight")["step"]) == {0, 2}
    assert run.scalars("train_loss")["step"].tolist() == [0, 1, 2]
    assert f"stats/{damaged.name}" in run.problems  # kept, and still reported
    assert damaged.exists()


def test_compacting_a_damaged_write_ahead_file_says_so(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", 3, close=False)
    (wal,) = (path / "wal").glob("*.wal")
    data = bytearray(wal.read_bytes())
    data[len(data) // 2] ^= 0xFF
    wal.write_bytes(data)
    before = Run(path)
    before.last_step  # noqa: B018  (reads)
    assert f"wal/{wal.name}" in before.problems
    compact(path)
    after = Run(path)
    assert counted(after) == counted(before)
    assert any(wal.name in message for message in after.events()["message"])


# Files that another process may still write -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "pid", "age", "absorbed"),
    [
        ("here", "alive", 0, False),
        ("here", "alive, with this number since", 0, True),
        ("here", "gone", 0, True),
        ("elsewhere", "gone", 0, False),  # it cannot be asked
        ("elsewhere", "gone", 4000, True),
    ],
)
def test_a_writer_leaves_the_files_of_another_process_of_its_name_alone(
    tmp_path: Path, host: str, pid: str, age: float, absorbed: bool
) -> None:
    path = make_run(tmp_path / "a", 2, close=False)
    header = {
        "host": socket.gethostname() if host == "here" else host,
        "pid": 2**22 + 1 if pid == "gone" else os.getppid(),
        "process_started": "another time" if "since" in pid else started(os.getppid()),
        "session": 0,
    }
    (old,) = (path / "wal").glob("*.wal")
    theirs = WalWriter(path / "wal" / "r0-000000.wal", header)
    theirs.close()
    (path / "wal" / "r0-000000.wal").write_bytes(
        (path / "wal" / "r0-000000.wal").read_bytes() + old.read_bytes()
    )
    old.unlink()
    changed = time.time() - age
    os.utime(path / "wal" / "r0-000000.wal", (changed, changed))
    log = LogWriter(path, info(), resume=True)
    write_step(log, 2)
    log.close()
    assert (path / "wal" / "r0-000000.wal").exists() != absorbed
    assert_complete(path, 3)  # it is read all the same


# What is not understood stays -------------------------------------------------------------------------------


def test_a_write_ahead_file_of_a_newer_version_stays_as_it_is(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", 3, close=False)
    wal = path / "wal" / "r0-000009.wal"
    wal.write_bytes(
        b"".join([*encode(("header", b'{"schema_version": 99}')), *encode(("stats", b"who knows"))])
    )
    before = wal.read_bytes()
    compact(path)
    assert [p.read_bytes() for p in (path / "wal").iterdir()] == [before]
    assert_complete(path, 3)


def test_a_damaged_write_ahead_file_is_kept_apart(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", 3, close=False)
    (wal,) = (path / "wal").glob("*.wal")
    data = bytearray(wal.read_bytes())
    data[len(data) // 2] ^= 0xFF
    wal.write_bytes(data)
    compact(path)
    assert not any((path / "wal").iterdir())
    assert (path / "damaged" / wal.name).read_bytes() == data


def test_a_torn_frame_at_the_end_is_no_damage(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", 3, close=False)
    (wal,) = (path / "wal").glob("*.wal")
    wal.write_bytes(
        wal.read_bytes() + b"".join(encode(("events", bytes(100))))[:-50]
    )  # killed while it wrote
    compact(path)
    assert not any((path / "wal").iterdir())
    assert not (path / "damaged").exists()
    assert set(Run(path).stats("weight")["step"]) == {0, 1, 2}
    assert any("torn bytes" in message for message in Run(path).events()["message"])
