"""The tracker for Accelerate: its log equals that of a plain loop, whatever `prepare` wraps."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.amp.autocast_mode import autocast
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils.clip_grad import clip_grad_norm_
from torch.optim.lr_scheduler import StepLR
from trainings import assert_same_numbers, batch, failures, hooks_of, loss_of, mlp, train, weights_of

from layerwatch import Run, watch
from layerwatch.hooks.accelerate import LayerwatchTracker
from layerwatch.hooks.wrappers import inner_optimizer

STEPS = 5
OVERFLOW = 2  # the step of which the loss is infinite under a loss scaler


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Its state is global, and outlives an Accelerator."""
    yield
    forget()


def forget() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def prepared_training(
    tracker: LayerwatchTracker | None, *, accumulate: int = 1, precision: str = "no",
    scale: float | None = None, clip: float | None = None,
) -> nn.Module:  # fmt: skip
    """A loop as Accelerate's guide writes it."""
    accelerator = Accelerator(
        cpu=True, log_with=tracker, gradient_accumulation_steps=accumulate, mixed_precision=precision
    )
    if scale is not None:  # Accelerate makes one for accelerators only, and unscales in float16 only
        accelerator.scaler = GradScaler("cpu", init_scale=scale, growth_interval=2)
    plain = mlp()
    bare = torch.optim.AdamW(plain.parameters(), 1e-2)
    model, optimizer, schedule = accelerator.prepare(plain, bare, StepLR(bare, 2))
    if scale is not None:
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    accelerator.init_trackers("exp1", config={"batch_size": 32, "layers": [1, 2]})
    if tracker is not None:
        tracker.watch(model, optimizer)
    for micro in range(STEPS * accumulate):
        with accelerator.accumulate(model):
            loss = loss_of(model(batch(micro)))
            factor = torch.inf if scale is not None and micro // accumulate == OVERFLOW else 1.0
            accelerator.backward(loss * factor)
            if accelerator.sync_gradients and clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        accelerator.log({"loss": loss.item(), "text": "left out"}, step=1000 + micro)
    accelerator.end_training()
    return plain


def raw_training(
    path: Path, *, accumulate: int = 1, scale: float | None = None, clip: float | None = None,
    context: Callable[[], Any] = nullcontext,
) -> tuple[Run, nn.Module]:  # fmt: skip
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = StepLR(optimizer, 2)
    scaler = GradScaler("cpu", init_scale=scale or 1.0, growth_interval=2, enabled=scale is not None)
    with watch(model, optimizer, run=path, every=1) as watcher:
        for step in range(STEPS):
            loss = torch.zeros(())
            for micro in range(step * accumulate, (step + 1) * accumulate):
                with context():
                    output = model(batch(micro))
                loss = loss_of(output.float())
                factor = torch.inf if scale is not None and step == OVERFLOW else 1.0
                scaler.scale(loss * factor / accumulate).backward()
            if clip is not None:
                scaler.unscale_(optimizer)
                clip_grad_norm_(model.parameters(), clip)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= before:
                schedule.step()
            optimizer.zero_grad()
            watcher.log(train_loss=loss.detach())
    return Run(path), model


def bf16() -> Any:
    return autocast("cpu", dtype=torch.bfloat16)


HOW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as it comes": ({}, {}),
    "accumulation": ({"accumulate": 2}, {"accumulate": 2}),
    "bf16": ({"precision": "bf16"}, {"context": bf16}),
    "loss scaler": ({"scale": 1024.0}, {"scale": 1024.0}),
    "everything": (
        {"accumulate": 2, "precision": "bf16", "scale": 1024.0, "clip": 0.1},
        {"accumulate": 2, "context": bf16, "scale": 1024.0, "clip": 0.1},
    ),
}


@pytest.mark.parametrize("how", HOW)
def test_the_log_is_that_of_a_plain_loop(tmp_path: Path, how: str) -> None:
    prepared, loop = HOW[how]
    alone = prepared_training(None, **prepared)
    forget()
    tracker = LayerwatchTracker(run=tmp_path / "run", every=1)
    model = prepared_training(tracker, **prepared)
    plain, raw_model = raw_training(tmp_path / "raw", **loop)
    assert weights_of(model).keys() == weights_of(alone).keys()
    for name, weight in weights_of(model).items():
        assert weight.equal(weights_of(alone)[name])
        assert weight.equal(weights_of(raw_model)[name])
    run = Run(tmp_path / "run")
    assert_same_numbers(run, plain)
    for scalar in ("lr", "grad_norm", "loss_scale", "clip_ratio"):
        ours, theirs = (r.scalars(scalar)[["step", "value"]] for r in (run, plain))
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True, obj=scalar)
    assert tracker.tracker is not None
    assert failures(tracker.tracker) == ""


def test_what_is_logged_and_the_config(tmp_path: Path) -> None:
    tracker = LayerwatchTracker(tmp_path / "run", every=2, activations=False, config={"note": "x"})
    prepared_training(tracker, accumulate=2)
    run = Run(tmp_path / "run")
    losses = run.scalars("train_loss")
    # A micro-step that does not step belongs to the step that was made before it.
    assert losses["step"].tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert not {"loss", "text"} & set(run.scalar_names())
    assert run.info["config"] == {"batch_size": 32, "note": "x"}
    assert run.info["closed"]
    assert sorted(set(run.stats("gradient")["step"])) == [0, 2, 4]
    assert len(run.stats("activation")) == 0


def test_the_config_may_come_later(tmp_path: Path) -> None:
    tracker = LayerwatchTracker(tmp_path / "run", every=1)
    accelerator = Accelerator(cpu=True, log_with=tracker)
    model, optimizer = mlp(), torch.optim.SGD(mlp().parameters(), 0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watcher = tracker.watch(*accelerator.prepare(model, optimizer))
    accelerator.init_trackers("exp1", config={"width": 16})
    assert accelerator.get_tracker("layerwatch", unwrap=True) is watcher
    accelerator.end_training()
    assert Run(tmp_path / "run").info["config"] == {"width": 16}


def test_a_checkpoint_goes_on_in_its_run(tmp_path: Path) -> None:
    def train(first: int, steps: int) -> nn.Module:
        forget()
        tracker = LayerwatchTracker(tmp_path / "run", every=1)
        accelerator = Accelerator(cpu=True, log_with=tracker)
        plain = mlp()
        model, optimizer = accelerator.prepare(plain, torch.optim.Adam(plain.parameters(), 1e-2))
        if first:
            accelerator.load_state(str(tmp_path / "checkpoint"))
        tracker.watch(model, optimizer, step=first)
        for step in range(first, steps):
            optimizer.zero_grad()
            accelerator.backward(loss_of(model(batch(step))))
            optimizer.step()
            if step == 1 and not first:
                accelerator.save_state(str(tmp_path / "checkpoint"))
        tracker.finish()
        return plain

    train(0, 4)
    end = train(2, 6)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with watch(model, optimizer, run=tmp_path / "raw", every=1):
        for step in range(6):
            optimizer.zero_grad()
            loss_of(model(batch(step))).backward()
            optimizer.step()
    for name, weight in weights_of(model).items():
        assert weight.equal(weights_of(end)[name])
    assert_same_numbers(Run(tmp_path / "run"), Run(tmp_path / "raw"))


def test_plain_watch_finds_the_optimizer_inside_the_prepared_one(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    bare = torch.optim.SGD((plain := mlp()).parameters(), 0.1)
    model, optimizer = accelerator.prepare(plain, bare)
    assert inner_optimizer(optimizer) is bare
    assert inner_optimizer(bare) is bare
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        for micro in range(6):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model(batch(micro))))
                optimizer.step()
                optimizer.zero_grad()
    assert sorted(set(Run(tmp_path / "run").stats("update")["step"])) == [0, 1, 2]


class Hiding(torch.optim.Optimizer):
    """As DeepSpeed wraps: an optimizer by its class only, and what is inside is not told."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self._inner = inner
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self._inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._inner.zero_grad(set_to_none)


def test_an_optimizer_that_takes_no_hooks_is_found_when_it_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, wrap in (("run", Hiding), ("raw", lambda optimizer: optimizer)):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with watch(model, wrap(optimizer), run=tmp_path / name, every=1):
            train(model, wrap(optimizer), 3)
    assert_same_numbers(Run(tmp_path / "run"), Run(tmp_path / "raw"))
    assert [r.message for r in caplog.records if "takes no hooks" in r.message] == [
        "Hiding takes no hooks: optimizers are found when they step"
    ]


def test_several_models(tmp_path: Path) -> None:
    tracker = LayerwatchTracker(tmp_path / "run", every=1)
    accelerator = Accelerator(cpu=True, log_with=tracker)
    models = [mlp(0), mlp(1)]
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in models]
    models, optimizers = list(accelerator.prepare(*models)), list(accelerator.prepare(*optimizers))
    tracker.watch(models, optimizers)
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            accelerator.backward(loss_of(model(batch(step))))
            optimizer.step()
            optimizer.zero_grad()
    tracker.finish()
    stats = Run(tmp_path / "run").stats("update")
    assert set(stats["step"]) == {0, 1, 2}
    assert {name.partition(".")[0] for name in stats["tensor"]} == {"Sequential0", "Sequential1"}


def test_a_tracker_that_watches_nothing_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = LayerwatchTracker(tmp_path / "run")
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("exp1")
    for _ in range(2):
        accelerator.log({"loss": 1.0})
    accelerator.end_training()
    told = [r.message for r in caplog.records if r.name == "layerwatch"]
    assert len(told) == 1
    assert "call watch(model, optimizer) of the LayerwatchTracker" in told[0]
    assert not (tmp_path / "run").exists()


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    model = prepared_training(LayerwatchTracker(tmp_path / "run", every=1))
    assert hooks_of(model) == []


def test_two_ranks(tmp_path: Path) -> None:
    """Of the gradient of both, the log of one rank holds the mean."""
    script = Path(__file__).with_name("hugging_face_ranks.py")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("errors.log")) == []
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, run=tmp_path / "raw", every=1):
        for step in range(3):
            loss_of(model(torch.cat([batch(2 * step), batch(2 * step + 1)]))).backward()
            optimizer.step()
            optimizer.zero_grad()
    run, raw = Run(tmp_path / "accelerate"), Run(tmp_path / "raw")
    for kind in ("weight", "gradient", "update"):
        ours, theirs = (r.stats(kind)[["step", "tensor", "norm"]] for r in (run, raw))
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-5, obj=kind)
    assert run.scalars("train_loss")["step"].tolist() == [0, 1, 2]
    assert run.info["config"] == {"ranks": 2}
    trainer = Run(tmp_path / "trainer")
    assert trainer.scalars("train_loss")["step"].tolist() == [0, 1, 2, 3]
    assert sorted(set(trainer.stats("gradient")["step"])) == [0, 1, 2, 3]
    assert not trainer.stats("gradient").duplicated(["step", "tensor"]).any()
