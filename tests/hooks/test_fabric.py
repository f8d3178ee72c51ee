"""Fabric: `watch` takes what `fabric.setup` returned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch import nn
from torch.amp.autocast_mode import autocast
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils.clip_grad import clip_grad_norm_
from trainings import assert_same_numbers, batch, loss_of, mlp, weights_of

from layerwatch import Run, watch

STEPS = 4
TYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
OVERFLOWS = (2,)  # steps whose loss is infinite, where there is a loss scaler


def fabric_of(precision: str | None) -> Fabric:
    if precision == "16-mixed":  # Fabric would choose bfloat16 on the CPU
        return Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", device="cpu", scaler=scaler()))
    return Fabric(accelerator="cpu", precision=precision)  # type: ignore[arg-type]


def scaler() -> GradScaler:
    return GradScaler("cpu", init_scale=2.0**10, growth_interval=2)


def by_fabric(path: Path | None, precision: str | None, model: nn.Module) -> dict[str, Any]:
    """Two micro-batches for each step, clipping."""
    fabric = fabric_of(precision)
    inner = torch.optim.AdamW(model.parameters(), 1e-2)
    wrapped, optimizer = fabric.setup(model, inner)
    watcher = watch(wrapped, optimizer, run=path, every=1) if path is not None else None
    for step in range(STEPS):
        for part in range(2):
            loss = loss_of(wrapped(batch(2 * step + part))) / 2
            fabric.backward(loss * factor(step, precision))
        fabric.clip_gradients(wrapped, optimizer, max_norm=0.5, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()
    if watcher is not None:
        watcher.close()
    return weights_of(model)


def factor(step: int, precision: str | None) -> float:
    return torch.inf if precision == "16-mixed" and step in OVERFLOWS else 1.0


def by_hand(path: Path, precision: str | None, model: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    kind = TYPES.get(precision or "")
    scaling = scaler() if precision == "16-mixed" else GradScaler("cpu", enabled=False)
    with watch(model, optimizer, run=path, every=1):
        for step in range(STEPS):
            for part in range(2):
                with autocast("cpu", dtype=kind, enabled=kind is not None, cache_enabled=False):
                    output = model(batch(2 * step + part))
                loss = loss_of(output.float()) / 2
                scaling.scale(loss * factor(step, precision)).backward()
            scaling.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 0.5)
            scaling.step(optimizer)
            scaling.update()
            optimizer.zero_grad()
    return weights_of(model)


def assert_identical(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("precision", [None, *TYPES])
def test_the_log_is_that_of_a_plain_loop(tmp_path: Path, precision: str | None) -> None:
    trained = by_fabric(tmp_path / "fabric", precision, mlp())
    plain = by_hand(tmp_path / "raw", precision, mlp())
    assert_identical(trained, plain)
    assert_identical(by_fabric(None, precision, mlp()), plain)
    run, raw = Run(tmp_path / "fabric"), Run(tmp_path / "raw")
    assert_same_numbers(run, raw)
    for name in ("grad_norm", "clip_ratio", "loss_scale"):
        pd.testing.assert_series_equal(run.scalars(name)["value"], raw.scalars(name)["value"])
    assert [t["names"] for t in run.info["tensors"]] == [[n] for n in plain]
    if precision == "16-mixed":
        weights = run.stats("weight")
        assert set(weights.loc[weights["skipped"], "step"]) == set(OVERFLOWS)
        assert len(run.scalars("loss_scale")) > 1


def test_a_model_set_up_without_its_optimizer(tmp_path: Path) -> None:
    """`fabric.setup_module` and `fabric.setup_optimizers`; the optimizer is found when it steps."""
    fabric, model = Fabric(accelerator="cpu"), mlp()
    wrapped = fabric.setup_module(model)
    optimizer: Any = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), 0.1))
    with watch(wrapped, run=tmp_path / "run", every=1):
        for step in range(STEPS):
            optimizer.zero_grad()
            fabric.backward(loss_of(wrapped(batch(step))))
            optimizer.step()
    run = Run(tmp_path / "run")
    assert set(run.stats("update")["step"]) == set(range(STEPS))
    assert [o["class"] for o in run.info["optimizers"]] == ["SGD"]
    assert run.info["model"] == ["Sequential"]


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model(tmp_path: Path) -> None:
    """Fabric compiles its wrapper anew; the names stay, and the run says what cannot be seen."""
    model = torch.compile(mlp(), backend="eager")
    trained = by_fabric(tmp_path / "fabric", None, model)  # type: ignore[arg-type]
    plain = by_hand(tmp_path / "raw", None, mlp())
    assert_identical({name.removeprefix("_orig_mod."): w for name, w in trained.items()}, plain)
    run = Run(tmp_path / "fabric")
    assert_same_numbers(run, Run(tmp_path / "raw"), ("weight", "gradient", "update"))
    assert any("compiled" in note for note in run.info["notes"])
