"""Long runs are judged by several captures a row, and say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from layerwatch.monitor import Run
from layerwatch.monitor.detectors import thinned
from layerwatch.monitor.detectors.history import History
from layerwatch.monitor.detectors.thinned import Thinned, sparing
from tests.dashboard.tiny import mlp, train


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return train(tmp_path_factory.mktemp("long") / "vanishing", mlp(nn.Sigmoid, 8), 0.05, 320)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log of 320 captures of 16 tensors counts as too long."""
    monkeypatch.setattr(thinned, "MOST_ROWS", 16 * 100)
    monkeypatch.setattr(thinned, "LEAST_POINTS", 10)


def test_an_ordinary_run_is_read_as_it_is(long: Path) -> None:
    run = Run(long)
    assert sparing(run) is run
    assert not any("the log is long" in note for note in run.notes())


@pytest.mark.usefixtures("few")
def test_a_long_run_is_judged_by_few_rows_and_says_so(long: Path) -> None:
    run = Run(long)
    source = sparing(run)
    assert isinstance(source, Thinned)
    history = History(source)
    assert 10 <= history.captures <= 100
    names = history.names()
    for kind in ("gradient", "weight", "drift"):
        column = "relative_l2" if kind == "drift" else "norm"
        assert np.isfinite(history.table(kind, column, names)).all(), kind
    assert any("instead of 320" in note for note in run.notes())


@pytest.mark.usefixtures("few")
def test_findings_of_few_rows_are_those_of_all(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_few = Run(long).findings()
    monkeypatch.setattr(thinned, "MOST_ROWS", 10**9)
    of_all = Run(long).findings()
    alarms: Callable[[list], set[str]] = lambda found: {f.problem for f in found if f.alarm}  # noqa: E731
    assert alarms(of_few) == alarms(of_all)
    assert alarms(of_all)


@pytest.mark.usefixtures("few")
def test_kinds_captured_at_other_steps_share_the_grid(long: Path) -> None:
    source = sparing(Run(long))
    assert isinstance(source, Thinned)
    frame = source.stats("weight", columns=["step", "tensor", "norm"])
    odd = frame.assign(step=frame["step"] + 3)
    put = source._put(odd)
    assert set(put["step"]) <= set(source.grid)
    assert len(put) == len(frame)
