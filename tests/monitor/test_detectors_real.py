"""Detectors on real, tiny trainings: healthy ones stay silent at any cadence, faulty ones are named."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwatch.hooks import watch
from layerwatch.monitor import Finding, Run

STEPS = 300
#: Dense captures and rare ones; the trainings further down capture every fifth step.
EVERY = [2, 50]


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
    watcher = watch(model, optimizer, run=Path("run"), every=every, activations=activations, live=False)
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


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("activations", [True, False])
def test_a_healthy_training_is_silent(every: int, activations: bool) -> None:
    model = layers()
    assert train(model, sgd(model), every, activations=activations) == []


@pytest.mark.parametrize("make", [lambda m: torch.optim.Adam(m.parameters(), 3e-3), lambda m: sgd(m, 0.01)])
@pytest.mark.parametrize("act", [nn.Tanh, nn.GELU, nn.LeakyReLU])
def test_other_activations_and_optimizers_are_silent(make: Callable, act: type[nn.Module]) -> None:
    model = layers(act)
    assert train(model, make(model), 10) == []


@pytest.mark.parametrize("every", EVERY)
def test_a_rate_far_too_high(every: int) -> None:
    model = layers()
    found = train(model, sgd(model, 5.0), every)
    assert first(found) == "learning_rate_too_high"
    assert found[0].first_step <= 50


@pytest.mark.parametrize("every", EVERY)
def test_a_rate_far_too_low(every: int) -> None:
    model = layers()
    assert first(train(model, sgd(model, 1e-6), every)) == "learning_rate_too_low"


@pytest.mark.parametrize("every", EVERY)
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


@pytest.mark.parametrize("every", EVERY)
def test_sigmoids_through_eight_layers(every: int) -> None:
    model = layers(nn.Sigmoid, 8)
    found = train(model, sgd(model), every)
    assert first(found) == "vanishing_gradients"
    assert found[0].layers[0] in ("0.weight", "2.weight")


@pytest.mark.parametrize("every", EVERY)
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


@pytest.mark.parametrize("every", EVERY)
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


# ---- other losses, other architectures, poorer logs


def numbers(noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """A normalised number by a random network."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(8000, 12, generator=g)
    y = torch.tanh(x @ torch.randn(12, 16, generator=g)) @ torch.randn(16, 1, generator=g)
    return x, y / y.std() + noise * torch.randn(8000, 1, generator=g)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor], Tensor],
    val_of: Callable[[], Tensor] | None = None,
    *,
    every: int = 5,
    log_every: int = 1,
    reset: bool = True,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> list[Finding]:
    """Alarms after a training on batches of 48 of the first 6,000 rows."""
    watcher = watch(model, optimizer, run=Path("run"), every=every, live=False)
    g = torch.Generator().manual_seed(3)
    for step in range(STEPS):
        if reset:
            optimizer.zero_grad()
        loss = loss_of(torch.randint(0, 6000, (48,), generator=g))
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if step % log_every == 0:
            watcher.log(train_loss=loss)
        if val_of is not None and step % 20 == 19:
            with torch.no_grad():
                watcher.log(val_loss=val_of())
    watcher.close()
    return [f for f in Run("run").findings() if f.alarm]


def stack(*sizes: int, bias: bool = True) -> nn.Sequential:
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        parts += [nn.Linear(a, b, bias=bias), nn.Tanh()]
    return nn.Sequential(*parts[:-1])


@pytest.mark.parametrize("reset", [True, False])
def test_a_regression_whose_gradients_are_never_reset(reset: bool) -> None:
    x, y = numbers()
    model = stack(12, 32, 32, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    found = fit(model, optimizer, lambda i: F.mse_loss(model(x[i]), y[i]), reset=reset)
    assert first(found) == ("silence" if reset else "stale_gradients")


@pytest.mark.parametrize("constant", [True, False])
def test_equal_weights_without_a_bias(constant: bool) -> None:
    x, y = numbers()
    model = stack(12, 32, 32, 1, bias=False)
    for layer in (model[0], model[2]):
        assert isinstance(layer, nn.Linear)
        nn.init.constant_(layer.weight, 0.1) if constant else nn.init.xavier_normal_(layer.weight)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    found = fit(model, optimizer, lambda i: F.mse_loss(model(x[i]), y[i]))
    assert first(found) == ("symmetric_units" if constant else "silence")
    assert not constant or found[0].layers[0] == "0.weight"


@pytest.mark.parametrize("noise", [3.0, 0.3])
def test_training_targets_noisier_than_those_of_validation(noise: float) -> None:
    x, y = numbers()
    blurred = y + noise * torch.randn(y.shape)
    model = stack(12, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    found = fit(
        model,
        optimizer,
        lambda i: F.mse_loss(model(x[i]), blurred[i]),
        lambda: F.mse_loss(model(x[6000:]), y[6000:]),
    )
    assert first(found) == ("data_fault" if noise > 1 else "silence")


@pytest.mark.parametrize(("rate", "problem"), [(0.05, "silence"), (1e-6, "learning_rate_too_low")])
def test_losses_that_are_logged_every_tenth_step(rate: float, problem: str) -> None:
    x, y = data()
    model = layers()
    assert (
        first(fit(model, sgd(model, rate), lambda i: F.cross_entropy(model(x[i]), y[i]), log_every=10))
        == problem
    )


@pytest.mark.parametrize("factor", [1.0, 12.0])
def test_a_wide_start_is_seen_with_and_without_a_guess(factor: float) -> None:
    x, y = data()
    model = layers(depth=2)
    for p in model.parameters():
        p.data *= factor
    found = fit(
        model, torch.optim.Adam(model.parameters(), 3e-3), lambda i: F.cross_entropy(model(x[i]), y[i])
    )
    assert first(found) == ("silence" if factor == 1 else "bad_init_scale")


class Words(nn.Module):
    """Token ids (n, 8) to classes, by one attention layer or a GRU."""

    def __init__(self, attention: bool):
        super().__init__()
        self.token = nn.Embedding(16, 24)
        self.mix = (
            nn.TransformerEncoderLayer(24, 4, 48, 0.0, batch_first=True, norm_first=True)
            if attention
            else nn.GRU(24, 24, batch_first=True)
        )
        self.out = nn.Linear(24, 4)

    def forward(self, ids: Tensor) -> Tensor:
        mixed = self.mix(self.token(ids))
        return self.out((mixed[0] if isinstance(mixed, tuple) else mixed).mean(1))


@pytest.mark.parametrize("attention", [True, False])
def test_words_by_attention_or_recurrence_are_silent(attention: bool) -> None:
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 16, (6000, 8), generator=g)
    y = (ids < 4).sum(1).clamp(max=3)
    model = Words(attention)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, s / 30) * (1 - s / STEPS))
    assert fit(model, optimizer, lambda i: F.cross_entropy(model(ids[i]), y[i]), scheduler=schedule) == []


def test_a_contrastive_loss_is_silent() -> None:
    g = torch.Generator().manual_seed(6)
    hidden, mix = torch.randn(6000, 4, generator=g), torch.randn(2, 4, 16, generator=g)
    a, b = torch.tanh(hidden @ mix[0]), torch.tanh(hidden @ mix[1])
    model = layers()

    def loss_of(i: Tensor) -> Tensor:
        p, q = F.normalize(model(a[i]), dim=1), F.normalize(model(b[i]), dim=1)
        return F.cross_entropy(p @ q.T / 0.2, torch.arange(len(i)))

    assert fit(model, torch.optim.Adam(model.parameters(), 2e-3), loss_of) == []
