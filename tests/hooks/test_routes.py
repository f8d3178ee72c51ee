"""The same training by each of the three routes: one sweep, tensor by tensor, and as on an accelerator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from layerwatch import Run, watch
from layerwatch.hooks import measure
from layerwatch.hooks.capture import Capture
from layerwatch.hooks.device import DeviceBatch


class Model(nn.Module):
    """Large enough for a bf16 reference and for counting by pairs; one layer is never used, one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 300, sparse=True)
        self.body = nn.Linear(300, 450)
        self.head = nn.Linear(450, 4).bfloat16()
        self.dead = nn.Linear(4, 4)
        self.frozen = nn.Linear(450, 450).requires_grad_(False)
        self.zero = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.frozen(self.body(self.embed(x)).relu()))
        return self.head(h.bfloat16()).float() + (self.zero * 0).sum()


def train(path: Path, *, clip: bool, steps: int = 6) -> Run:
    torch.manual_seed(0)
    model = Model()
    dense = [p for n, p in model.named_parameters() if not n.startswith("embed") and p.requires_grad]
    optimizers = [torch.optim.SGD(dense, 0.1), torch.optim.SparseAdam(model.embed.parameters(), 0.01)]
    with watch(model, optimizers, run=path, every=2, step_norms=True) as watcher:
        for _ in range(steps):
            x = torch.randint(0, 50, (16,))
            loss = nn.functional.cross_entropy(model(x), x % 4)
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(dense, 0.05)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            watcher.log(train_loss=loss)
    assert not (path / "errors.log").exists()
    return Run(path)


def force(monkeypatch: pytest.MonkeyPatch, route: str) -> None:
    monkeypatch.setattr(measure, "route_of", lambda _: route)


def assert_same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    timeless = [c for c in a.columns if c != "time"]
    assert len(a)
    pd.testing.assert_frame_equal(a[timeless], b[timeless], rtol=1e-6, atol=1e-12, check_dtype=False)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("route", [measure.SINGLE, measure.DEVICE])
def test_every_route_writes_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str, clip: bool
) -> None:
    run = train(tmp_path / "sweep", clip=clip)
    force(monkeypatch, route)
    other = train(tmp_path / "other", clip=clip)
    for kind in ("initial_weight", "weight", "gradient", "update", "gradient_norm"):
        assert_same(run.stats(kind), other.stats(kind))
    assert_same(run.drift(), other.drift())
    for tensor in ("body.weight", "head.weight", "embed.weight"):
        for kind in ("weight", "gradient", "update"):
            assert_same(run.histograms(kind, tensor), other.histograms(kind, tensor))
    for scalar in ("grad_norm", "clip_ratio", "lr"):
        assert len(run.scalars(scalar)) == (0 if scalar == "clip_ratio" and not clip else 3)
        pd.testing.assert_series_equal(run.scalars(scalar)["value"], other.scalars(scalar)["value"])
    states = other.tensors().set_index("tensor")["state"]
    assert states["zero"] == "zero_gradient" and states["dead.weight"] == "unused"  # noqa: PT018
    assert states["frozen.bias"] == "frozen"


def test_what_the_device_sends_late_is_written_when_it_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next hook after it has arrived; waited for when the next capture begins, and at the end."""
    force(monkeypatch, measure.DEVICE)
    arrived, waits, written = [False], [0], []

    def wait(batch: DeviceBatch) -> None:
        waits[0] += 1

    settle = Capture.settle

    def spy(capture: Capture, **how: Any) -> None:
        before = len(capture.pending)
        settle(capture, **how)
        written.append(before - len(capture.pending))

    monkeypatch.setattr(DeviceBatch, "ready", lambda _: arrived[0])
    monkeypatch.setattr(DeviceBatch, "wait", wait)
    monkeypatch.setattr(Capture, "settle", spy)
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watcher = watch(model, optimizer, run=tmp_path / "run", every=3)

    def step() -> int:
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return len(Run(tmp_path / "run").stats("weight"))

    assert [step(), step(), step()] == [0, 0, 0]  # captured, and on its way
    assert step() == 2  # the next capture has waited for it
    arrived[0] = True
    assert step() == 4
    assert waits[0] >= 2
    watcher.close()
    run = Run(tmp_path / "run")
    assert run.stats("weight")["step"].tolist() == [0, 3, 4, 0, 3, 4]
    assert run.scalars("grad_norm")["step"].tolist() == [0, 3]
