"""A training that is killed leaves every step that had returned, whole and once."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from layerwatch import Run
from layerwatch.monitor import compact

#: Trains for ever and says which steps have returned.
CHILD = """
import sys
from pathlib import Path
import torch
from layerwatch import watch
from layerwatch.monitor import log
log.SEGMENT_BYTES = 60_000  # rotates and compacts all the time
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), 0.01)
watcher = watch(model, optimizer, run=sys.argv[1], every=2, resume=len(sys.argv) > 2)
for step in range(watcher.step, watcher.step + 100_000):
    optimizer.zero_grad()
    loss = model(torch.randn(4, 8)).square().mean()
    loss.backward()
    optimizer.step()
    watcher.log(train_loss=loss)
    print(step, flush=True)
"""


def kill_at(path: Path, checkout: Path, delay: float, *more: str) -> int:
    """Train in a process and kill it so many seconds after its first step; the last step it reported."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), *more], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )  # fmt: skip
    assert child.stdout is not None
    with child.stdout as lines:
        last, deadline = int(next(lines)), time.monotonic() + delay
        while time.monotonic() < deadline:
            last = int(next(lines))
        child.kill()
        rest = [int(line) for line in lines if line.endswith("\n")]
    child.wait()
    return max([last, *rest])


def assert_nothing_lost(path: Path, last: int) -> None:
    run = Run(path)
    assert run.problems == {}
    for kind in ("weight", "gradient", "update"):
        frame = run.stats(kind)
        steps = sorted(set(frame["step"]))
        whole = list(range(0, last + 1, 2))
        assert steps[: len(whole)] == whole, kind
        assert len(steps) <= len(whole) + 1
        assert len(frame) == 4 * len(steps)  # no half capture, none twice
    losses = run.scalars("train_loss")["step"].tolist()
    assert losses[: last + 1] == list(range(last + 1))
    assert len(losses) <= last + 2


def check(path: Path, checkout: Path, delay: float) -> None:
    last = kill_at(path, checkout, delay)
    assert_nothing_lost(path, last)
    assert not Run(path).live
    before = Run(path).stats("weight")
    compact(path)
    pd.testing.assert_frame_equal(Run(path).stats("weight"), before)


@pytest.mark.parametrize("delay", [0.0, 0.3, 1.0])
def test_a_killed_training_is_readable_up_to_its_last_step(
    tmp_path: Path, checkout: Path, delay: float
) -> None:
    check(tmp_path / "run", checkout, delay)


def killed_and_resumed(path: Path, checkout: Path, delays: list[float]) -> None:
    """Parts, merged parts and roll-ups of several sessions, each of which ended anywhere."""
    returned: set[int] = set()
    last = -1
    for number, delay in enumerate(delays):
        last = kill_at(path, checkout, delay, *["resume"][: number > 0])
        run = Run(path)
        assert run.problems == {}
        # A step in which the process died may have left a scalar: the next session goes on behind it.
        returned |= set(range(run.sessions()["first_step"].iloc[-1], last + 1))
        for kind in ("weight", "gradient", "update"):
            frame = run.stats(kind)
            assert not frame.duplicated(["step", "tensor"]).any(), kind
            steps = set(frame["step"])
            assert {step for step in returned if step % 2 == 0} <= steps, kind
            assert len(frame) == 4 * len(steps), kind
            highest = run.overview(kind, "norm", max_points=8).highest
            assert highest.max() == pytest.approx(frame["norm"].max(), rel=1e-12), kind
        losses = run.scalars("train_loss")["step"].tolist()
        assert returned <= set(losses)
        assert len(losses) == len(set(losses))
    assert len(returned) >= last + 1 - len(delays)
    assert Run(path).sessions()["session"].tolist() == list(range(len(delays)))
    before = Run(path).stats("weight")
    compact(path)
    pd.testing.assert_frame_equal(Run(path).stats("weight"), before)


def test_killed_and_resumed(tmp_path: Path, checkout: Path) -> None:
    killed_and_resumed(tmp_path / "run", checkout, [0.5, 0.1, 1.0])


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_and_resumed_twenty_times(tmp_path: Path, checkout: Path) -> None:
    rng = random.Random(1)
    killed_and_resumed(tmp_path / "run", checkout, [rng.uniform(0.0, 3.0) for _ in range(20)])


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_a_hundred_times(tmp_path: Path, checkout: Path) -> None:
    rng = random.Random(0)
    for number in range(100):
        check(tmp_path / f"run{number}", checkout, rng.uniform(0.0, 3.0))
