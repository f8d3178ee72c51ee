"""Mixed precision: gradients are unscaled at every stage, skipped steps count and are marked."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from trainings import batch, failures, loss_of, mlp, norm, weights_of

from layerwatch import Run, watch

OVERFLOW = 3


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", ["no", "unscaled", "scaled"])
def test_gradients_are_unscaled_and_overflows_marked(tmp_path: Path, fused: bool, clip: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)
    scaler = GradScaler("cpu", init_scale=2.0**12)
    watcher = watch(model, optimizer, run=tmp_path / "run", every=1)
    true = []
    for step in range(6):
        loss = model(torch.randn(32, 16)).square().mean()
        true.append(
            float(torch.autograd.grad(loss, model.get_parameter("0.weight"), retain_graph=True)[0].norm())
        )
        scaler.scale(loss * float("inf") if step == OVERFLOW else loss).backward()
        if clip == "unscaled":
            scaler.unscale_(optimizer)
        if clip != "no":
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    watcher.close()

    run = Run(tmp_path / "run")
    gradients = run.stats("gradient", "0.weight")
    assert gradients["step"].tolist() == list(range(6))
    finite = gradients["step"] != OVERFLOW
    assert gradients["norm"][finite].tolist() == pytest.approx(
        [t for i, t in enumerate(true) if i != OVERFLOW], rel=1e-4
    )
    assert set(gradients["stage"]) == {"at_step" if clip == "no" else "before_clip"}
    assert gradients["skipped"].tolist() == [step == OVERFLOW for step in range(6)]
    update = run.stats("update", "0.weight", ["step", "norm"])
    assert (update["norm"] == 0).tolist() == [step == OVERFLOW for step in range(6)]
    assert run.scalars("loss_scale")[["step", "value"]].to_numpy().tolist() == [
        [0, 4096],
        [OVERFLOW + 1, 2048],
    ]
    events = run.events()
    assert events.loc[events["event"] == "skipped", "step"].tolist() == [OVERFLOW]


def test_the_scaler_is_left_as_it_was(tmp_path: Path) -> None:
    before = GradScaler.step, GradScaler.scale
    first, second = (watch(nn.Linear(2, 2), run=tmp_path / name) for name in "ab")
    first.close()
    assert GradScaler.step is not before[0]
    second.close()
    assert (GradScaler.step, GradScaler.scale) == before


def test_a_disabled_scaler_changes_nothing(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = GradScaler("cpu", enabled=False)
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        for _ in range(3):
            scaler.scale(model(torch.ones(1, 2)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    run = Run(tmp_path / "run")
    assert run.last_step == 2
    assert "loss_scale" not in run.scalar_names()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-3),
    "adam fused": lambda p: torch.optim.Adam(p, 1e-3, fused=True),
}
CLIPS: dict[str, Callable[[Any, float], object]] = {
    "none": lambda p, scale: None,
    "norm": lambda p, scale: nn.utils.clip_grad_norm_(p, 0.05 * scale),
    "value": lambda p, scale: nn.utils.clip_grad_value_(p, 1e-3 * scale),
}


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("micro", [1, 3])
def test_every_way_to_scale_clip_and_accumulate(
    tmp_path: Path, optimizer_name: str, clip: str, unscale: bool, micro: int
) -> None:
    """The gradient: summed over micro-batches, without the scale, before clipping. Updates: what moved."""
    model = mlp()
    parameters = list(model.parameters())
    optimizer = OPTIMIZERS[optimizer_name](parameters)
    scaler = GradScaler("cpu", init_scale=2.0**12)
    weights = [weights_of(model)]
    true: list[list[Tensor]] = []
    clipped: list[float] = []
    with watch(model, optimizer, run=tmp_path / "run", every=1) as watcher:
        for step in range(5):
            optimizer.zero_grad()
            true.append([torch.zeros_like(p) for p in parameters])
            scale = scaler.get_scale()
            for part in range(micro):
                loss = loss_of(model(batch(10 * step + part))) / micro
                parts = torch.autograd.grad(loss, parameters, retain_graph=True)
                true[-1] = [a + b for a, b in zip(true[-1], parts, strict=True)]
                scaler.scale(loss * (float("inf") if step == OVERFLOW else 1.0)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            factor = 1.0 if unscale else scale
            CLIPS[clip](parameters, factor)
            clipped.append(math.hypot(*(norm(p.grad) for p in parameters if p.grad is not None)) / factor)
            scaler.step(optimizer)
            scaler.update()
            weights.append(weights_of(model))
            assert watcher.step == step
        assert failures(watcher) == ""
    run = Run(tmp_path / "run")
    good = [s for s in range(5) if s != OVERFLOW]
    for i, name in enumerate(weights[0]):
        gradients = run.stats("gradient", name)
        assert gradients["step"].tolist() == list(range(5))
        assert gradients["norm"][gradients["step"] != OVERFLOW].tolist() == pytest.approx(
            [norm(true[s][i]) for s in good], rel=1e-4
        )
        assert gradients["skipped"].tolist() == [s == OVERFLOW for s in range(5)]
        assert set(gradients["stage"]) == {"at_step" if clip == "none" else "before_clip"}
        moved = [norm(weights[s + 1][name] - weights[s][name]) for s in range(5)]
        assert run.stats("update", name)["norm"].tolist() == pytest.approx(moved, rel=1e-6)
        assert moved[OVERFLOW] == 0
    whole = [math.hypot(*map(norm, true[s])) for s in good]
    norms = run.scalars("grad_norm")
    assert norms["value"][norms["step"] != OVERFLOW].tolist() == pytest.approx(whole, rel=1e-4)
    ratios = run.scalars("clip_ratio")
    if clip == "none":
        assert ratios.empty
    else:
        found = ratios["value"][ratios["step"] != OVERFLOW].tolist()
        assert found == pytest.approx([clipped[s] / w for s, w in zip(good, whole, strict=True)], rel=1e-3)
