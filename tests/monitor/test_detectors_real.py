"""Detectors on real, tiny trainings: healthy ones stay silent at any cadence, faulty ones are named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwatch.hooks import watch
from layerwatch.monitor import Finding, Run

STEPS = 300


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def data() -> tuple[Tensor, Tensor]:
    """Six classes by a noisy teacher, more samples than a run draws."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(12000, 16, generator=g)
    y = torch.tanh(x @ torch.randn(16, 24, generator=g)) @ torch.randn(24, 6, generator=g)
    return x, y.argmax(1)


def layers(act: type[nn.Module] = nn.ReLU, depth: int = 2) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Linear(16, 48), act()]
    for _ in range(depth - 1):
        parts += [nn.Linear(48, 48), act()]
    return nn.Sequential(*parts, nn.Linear(48, 6))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    every: int,
    *,
    activations: bool = True,
    reset: bool = True,
    edit: Callable[[int, Tensor], Tensor] = lambda step, x: x,
) -> list[Finding]:
    """Alarms of the run after the training."""
    x, y = data()
    watcher = watch(model, optimizer, run=Path("run"), every=every, activations=activations)
    g = torch.Generator().manual_seed(2)
    for step in range(STEPS):
        index = torch.randint(0, 10000, (64,), generator=g)
        if reset:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(edit(step, x[index])), y[index])
        loss.backward()
        optimizer.step()
        watcher.log(train_loss=loss)
        if step % 20 == 19:
            with torch.no_grad():
                watcher.log(val_loss=F.cross_entropy(model(x[10000:]), y[10000:]))
    watcher.close()
    run = Run("run")
    assert not [n for n in run.notes() if "failed" in n]
    return [f for f in run.findings() if f.alarm]


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def first(found: list[Finding]) -> str:
    return found[0].problem if found else "silence"


@pytest.mark.parametrize("every", [1, 10, 50])
@pytest.mark.parametrize("activations", [True, False])
def test_a_healthy_training_is_silent(every: int, activations: bool) -> None:
    model = layers()
    assert train(model, sgd(model), every, activations=activations) == []


@pytest.mark.parametrize("make", [lambda m: torch.optim.Adam(m.parameters(), 3e-3), lambda m: sgd(m, 0.01)])
@pytest.mark.parametrize("act", [nn.Tanh, nn.GELU, nn.LeakyReLU])
def test_other_activations_and_optimizers_are_silent(make: Callable, act: type[nn.Module]) -> None:
    model = layers(act)
    assert train(model, make(model), 10) == []


@pytest.mark.parametrize("every", [1, 10, 50])
def test_a_rate_far_too_high(every: int) -> None:
    model = layers()
    found = train(model, sgd(model, 5.0), every)
    assert first(found) == "learning_rate_too_high"
    assert found[0].first_step <= 50


@pytest.mark.parametrize("every", [1, 10, 50])
def test_a_rate_far_too_low(every: int) -> None:
    model = layers()
    assert first(train(model, sgd(model, 1e-6), every)) == "learning_rate_too_low"


@pytest.mark.parametrize("every", [1, 10, 50])
@pytest.mark.parametrize("activations", [True, False])
def test_a_layer_that_never_fires(every: int, activations: bool) -> None:
    model = layers()
    hidden = model[2]
    assert isinstance(hidden, nn.Linear)
    nn.init.constant_(hidden.bias, -30.0)
    found = train(model, sgd(model), every, activations=activations)
    assert [f.problem for f in found] == ["dead_units"]
    assert found[0].layers[0] in ("3", "2.weight")
    assert found[0].first_step == 0


@pytest.mark.parametrize("every", [1, 10, 50])
def test_sigmoids_through_eight_layers(every: int) -> None:
    model = layers(nn.Sigmoid, 8)
    found = train(model, sgd(model), every)
    assert first(found) == "vanishing_gradients"
    assert found[0].layers[0] in ("0.weight", "2.weight")


@pytest.mark.parametrize("every", [1, 10, 50])
def test_parameters_outside_of_loss_and_optimizer(every: int) -> None:
    model = layers()
    model[0].register_module("spare", nn.Linear(48, 48))
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if not n.startswith("2.")], 0.05, 0.9)
    found = train(model, optimizer, every)
    assert {f.problem: f.layers for f in found} == {
        "frozen_parameters": ("2.weight", "2.bias"),
        "unused_parameters": ("0.spare.weight", "0.spare.bias"),
    }


def test_freezing_on_purpose_is_silent() -> None:
    model = layers()
    model[0].requires_grad_(False)
    assert train(model, sgd(model), 10) == []


@pytest.mark.parametrize("every", [1, 10])
def test_gradients_that_are_never_reset(every: int) -> None:
    model = layers()
    assert first(train(model, sgd(model), every, reset=False)) == "stale_gradients"


@pytest.mark.parametrize("every", [1, 10, 50])
def test_one_nan_in_a_batch(every: int) -> None:
    model = layers()
    found = train(model, sgd(model), every, edit=lambda step, x: x * (float("nan") if step == 150 else 1.0))
    assert [f.problem for f in found] == ["nonfinite"]
    assert found[0].first_step == 150
    assert found[0].severity == "critical"


def test_equal_weights() -> None:
    model = layers()
    for module in (m for m in list(model)[:4] if isinstance(m, nn.Linear)):
        nn.init.constant_(module.weight, 0.05)
        nn.init.zeros_(module.bias)
    assert first(train(model, sgd(model), 10)) == "symmetric_units"
