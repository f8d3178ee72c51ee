"""Mixed precision: gradients are unscaled at every stage, skipped steps count and are marked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

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
