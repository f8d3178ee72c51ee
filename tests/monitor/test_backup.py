"""What is safe to copy while it is written: docs/operations.md says how, and this copies so."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from layerwatch.monitor import LogWriter, Run
from tests.monitor.made_logs import TENSORS, counted, info, write_step


class Training:
    """Takes steps whenever a file is copied: parts are made, merged and removed meanwhile. It is far faster
    than a training, so it rests when a copy has begun anew a few times: else that might never end."""

    def __init__(self, path: Path) -> None:
        self.path, self.step, self.resting = path, 0, False
        self.log = LogWriter(path, info(), rotate_seconds=0.001)

    def steps(self, count: int) -> None:
        for _ in range(count):
            write_step(self.log, self.step)
            self.step += 1
            time.sleep(0.003)  # for the thread that makes parts

    def close(self) -> None:
        self.resting = True
        self.log.close()

    def copy_file(self, source: str, target: str) -> str:
        self.steps(0 if self.resting else 3)
        return shutil.copy2(source, target)


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    training = Training(tmp_path / "run")
    training.steps(60)
    yield training
    training.close()


def backup(training: Training, target: Path) -> int:
    """As the page says: the write-ahead files, then all, again while something has vanished. How often."""
    ended = training.resting
    for times in range(1, 100):
        training.resting = ended or times > 5
        if training.resting and not ended:
            until(lambda: not training.log._background.waiting)  # what was begun is ended
        if copied(training.path / "wal", target / "wal", copy_function=training.copy_file) and copied(
            training.path, target, copy_function=training.copy_file
        ):
            training.resting = ended
            return times
    raise AssertionError("something vanishes all the time")


def copied(source: Path, target: Path, **how: Any) -> bool:
    """Whether nothing vanished meanwhile."""
    try:
        shutil.copytree(source, target, dirs_exist_ok=True, **how)
    except (shutil.Error, FileNotFoundError):
        return False
    return True


def until(done: Callable[[], bool]) -> None:
    """Again, a while later, until it is so."""
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def steps_in(path: Path) -> set[int]:
    """The captured steps that are whole; each is there once, and no file is damaged."""
    run = Run(path)
    rows = counted(run)
    assert set(rows.values()) == {1}
    assert run.problems == {}
    return {step for step, _ in rows if all((step, tensor) in rows for tensor in TENSORS)}


def test_a_live_run_copied_in_the_middle_is_whole(training: Training, tmp_path: Path) -> None:
    times: list[int] = []
    while len(times) < 2 or (max(times) == 1 and len(times) < 50):  # until something did vanish meanwhile
        begin, target = training.step, tmp_path / f"backup{len(times)}"
        times.append(backup(training, target))
        assert steps_in(target) >= set(range(begin))
    assert max(times) > 1


def test_a_backup_can_be_brought_up_to_date(training: Training, tmp_path: Path) -> None:
    backup(training, tmp_path / "backup")
    training.steps(30)
    training.close()
    backup(training, tmp_path / "backup")
    assert steps_in(tmp_path / "backup") == set(range(training.step))
    assert Run(tmp_path / "backup").info["closed"]


def test_the_order_matters(training: Training, tmp_path: Path) -> None:
    """Write-ahead files that are copied last are those of later steps: why the page says what it says."""
    target, rotate = tmp_path / "backup", training.log._rotate_seconds
    training.log._rotate_seconds = 1e9
    training.steps(1)
    begin, last = training.step, training.log._journal.span  # the last step is in this file, and stays there
    until(lambda: copied(training.path, target, ignore=shutil.ignore_patterns("wal")))
    training.log._rotate_seconds = rotate
    until(lambda: training.steps(1) or not (training.path / "wal" / f"{last.stem}.wal").exists())
    until(lambda: copied(training.path / "wal", target / "wal"))
    assert set(range(begin)) - steps_in(target)
