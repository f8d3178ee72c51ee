"""SIGTERM and SIGINT: the log is finished, and the process ends as it would have without us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layerwatch import Run

Child = subprocess.Popen[str]
TRAINING = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a shell ignores it
import torch
from layerwatch import watch
from layerwatch.hooks import termination
termination.GRACE_SECONDS = 100.0  # a slow machine may take long to finish a log
{before}
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), 0.01)
watcher = watch(model, optimizer, run=sys.argv[1], every=2)
for step in range(100_000):
    optimizer.zero_grad()
    loss = model(torch.randn(4, 8)).square().mean()
    loss.backward()
    optimizer.step()
    watcher.log(train_loss=loss)
    print(step, flush=True)
    {inside}
"""


@pytest.fixture
def start(tmp_path: Path, checkout: Path) -> Iterator[Callable[..., Child]]:
    """Begins the training."""
    started: list[Child] = []

    def begin(before: str = "", inside: str = "") -> Child:
        code = TRAINING.format(before=before, inside=inside)
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", code, str(tmp_path / "run")], text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(checkout)},
            )
        )  # fmt: skip
        return started[-1]

    yield begin
    for child in started:
        with child:
            child.kill()


def end(child: Child, number: int, after: int = 20) -> tuple[int, str]:
    """Send the signal after so many steps; the last step that was reported, and what was said."""
    assert child.stdout is not None
    assert child.stderr is not None
    last = 0
    for line in child.stdout:
        last = int(line)
        if last == after:
            child.send_signal(number)
    said = child.stderr.read()
    child.wait()
    return last, said


@pytest.mark.parametrize("after", [0, 1, 20])
def test_sigterm_finishes_the_log_and_ends_the_process_by_it(
    tmp_path: Path, start: Callable[..., Child], after: int
) -> None:
    child = start()
    last, said = end(child, signal.SIGTERM, after)
    assert child.returncode == -signal.SIGTERM
    assert said == ""
    run = Run(tmp_path / "run")
    assert run.info["closed"]
    assert not run.live
    assert run.problems == {}
    assert run.events()["event"].tolist()[-1] == "close"
    assert "SIGTERM" in run.events()["message"].tolist()[-1]
    steps = sorted(set(run.stats("weight")["step"]))
    assert steps[: last // 2 + 1] == list(range(0, last + 1, 2))
    assert len(run.scalars("train_loss")) >= last + 1


def test_sigint_is_a_keyboard_interrupt_and_closes(tmp_path: Path, start: Callable[..., Child]) -> None:
    child = start()
    _, said = end(child, signal.SIGINT)
    assert "KeyboardInterrupt" in said
    run = Run(tmp_path / "run")
    assert run.info["closed"]
    assert not list((tmp_path / "run" / "wal").iterdir())  # all is Parquet


def test_a_handler_of_the_user_stays(tmp_path: Path, start: Callable[..., Child]) -> None:
    before = "signal.signal(signal.SIGTERM, lambda *_: (print('99999', flush=True), sys.exit(7)))"
    child = start(before)
    last, _ = end(child, signal.SIGTERM)
    assert last == 99999  # it was called
    assert child.returncode == 7
    assert Run(tmp_path / "run").info["closed"]  # at exit


def test_a_handler_that_the_user_sets_later_has_all_its_time(
    tmp_path: Path, start: Callable[..., Child]
) -> None:
    """One that has the training write a checkpoint and go on to its end, say."""
    before = "termination.GRACE_SECONDS = 0.2\nheard = []"
    inside = """
    if step == 3:
        signal.signal(signal.SIGTERM, lambda *_: heard.append(step))
    if step == 5:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    if step == 30:
        break
"""
    child = start(before, inside + "print(heard)")
    out, said = child.communicate()
    assert (child.returncode, said, out.splitlines()[-2:]) == (0, "", ["30", "[5]"])
    assert Run(tmp_path / "run").info["closed"]


def test_a_process_that_hangs_in_native_code_ends_all_the_same(
    tmp_path: Path, start: Callable[..., Child]
) -> None:
    """A handler in Python would wait for ever."""
    before = """
import ctypes
termination.GRACE_SECONDS = 0.5
hang = ctypes.CDLL(None).sleep"""
    inside = "step == 20 and [hang(3000) for _ in range(100)]"
    child = start(before, inside)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) == 20:
            break
    time.sleep(0.3)
    # A signal to the process may be given to a thread that does not sleep: the sleep goes on.
    child.send_signal(signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM
    run = Run(tmp_path / "run")
    assert sorted(set(run.stats("weight")["step"])) == list(range(0, 21, 2))


def test_a_signal_to_a_forked_child_is_none_to_the_training(
    tmp_path: Path, start: Callable[..., Child]
) -> None:
    """Workers of a data loader are ended by SIGTERM."""
    before = """
termination.GRACE_SECONDS = 0.2
os.register_at_fork(after_in_child=lambda: time.sleep(0.3))  # the signal comes before the child has begun
"""
    inside = """
    if step in (5, 10):
        child = os.fork()
        if child == 0:
            time.sleep(100)
            os._exit(0)
        time.sleep(0.05)
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
        time.sleep(0.5)
    if step == 30:
        break
"""
    child = start(before, inside)
    out, said = child.communicate()
    assert (child.returncode, said) == (0, "")
    assert out.split()[-1] == "30"
    run = Run(tmp_path / "run")
    assert sorted(set(run.stats("weight")["step"])) == list(range(0, 31, 2))
    assert (run.events()["event"] == "close").sum() == 1
