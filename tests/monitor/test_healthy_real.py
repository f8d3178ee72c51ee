"""Real trainings that are well alarm nobody: while they run, at the end, however they were captured.

A sample of `benchmarks/healthy.py`, the fastest of its trainings.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from layerwatch.monitor import Run

FAST = ("wine-raw-batchnorm", "diabetes-raw-targets", "frozen-body-new-head-ema")


@pytest.fixture(scope="module")
def healthy(checkout: Path) -> Iterator[Any]:
    """The benchmark as a module. Scripts find their neighbours in their own folder."""
    folder = str(checkout / "benchmarks")
    sys.path.insert(0, folder)
    yield import_module("healthy")
    sys.path.remove(folder)


@pytest.mark.parametrize("name", FAST)
def test_silent_at_every_tenth_in_every_way_of_capturing(healthy: Any, name: str, tmp_path: Path) -> None:
    training = healthy.TRAININGS[name]
    run, quality = healthy.record(training, 0, tmp_path)
    assert training.reached(quality), f"{training.measure}: {quality:.3f}"
    found = list(healthy.judged(run, name, 0, tenths=(1, 2, 4, 7, 10)))
    assert len(found) == 3 * 2 * 5
    assert [f.summary for judged in found for f in judged.alarms] == []
    assert healthy.live_alarms(run) == []


def test_auto_cadence_itself(healthy: Any, tmp_path: Path) -> None:
    run, _ = healthy.record(healthy.TRAININGS["wine-raw-batchnorm"], 1, tmp_path, "auto")
    assert [f.summary for f in run.findings() if f.alarm] == []
    assert 3 <= len(run.stats("gradient", run.names("gradient")[0])) < run.last_step


def test_a_part_of_a_run_is_the_run_as_it_was(healthy: Any, tmp_path: Path) -> None:
    """Captured every tenth step, the log holds what a tenth of the captures of every step hold."""
    training = healthy.TRAININGS["wine-raw-batchnorm"]
    dense, _ = healthy.record(training, 0, tmp_path)
    sparse, _ = healthy.record(training, 0, tmp_path, 10)
    part = healthy.Part(dense, dense.last_step, "10")
    for kind in ("gradient", "weight", "update", "activation"):
        seen, expected = part.stats(kind), Run(sparse.path).stats(kind)
        expected = expected[expected["step"] % 10 == 0]  # the steps after an accident are captured too
        columns = ["step", "tensor", "norm", "mean", "zeros"]
        assert seen[columns].reset_index(drop=True).equals(expected[columns].reset_index(drop=True))
    assert healthy.Part(dense, 50, "1", activations=False).stats("activation").empty
    assert healthy.Part(dense, 50).stats("weight")["step"].max() == 50
