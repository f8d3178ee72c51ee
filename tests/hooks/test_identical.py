"""Same seed, same training, bit for bit: with everything that `watch` can log, at every step, and without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import autocast
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils.clip_grad import clip_grad_norm_
from trainings import failures

from layerwatch import Run, Watcher, watch

STEPS = 6
OVERFLOWS = (3,)  # steps of which the loss is infinite under a loss scaler


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.cells = kind(6, 10, 2, dropout=0.3)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0])


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.encoder(self.embed(x), mask=mask, is_causal=True))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(32, 3),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Tensor]]] = {
    "cnn": (convolutions, lambda g: torch.randn(8, 3, 10, 10, generator=g)),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda g: torch.randn(7, 4, 6, generator=g)),
    "gru": (lambda: Recurrent(nn.GRU), lambda g: torch.randn(7, 4, 6, generator=g)),
    "transformer": (Language, lambda g: torch.randint(0, 12, (4, 9), generator=g)),
}


@dataclass
class Outcome:
    """Everything that a training leaves behind."""

    losses: list[Tensor] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    scale: float = 1.0
    random: Tensor = field(default_factory=torch.get_rng_state)


def assert_identical(a: Outcome, b: Outcome) -> None:
    assert len(a.tensors) == len(b.tensors) > 0
    for x, y in zip([*a.losses, *a.tensors, a.random], [*b.losses, *b.tensors, b.random], strict=True):
        assert x.reshape(-1).view(torch.uint8).equal(y.reshape(-1).view(torch.uint8))
    assert a.scale == b.scale


Start = Callable[[nn.Module, torch.optim.Optimizer], Watcher]


def trained(
    name: str,
    start: Start | None,
    *,
    precision: str = "plain",
    prepare: Callable[[nn.Module], Any] = lambda m: m,
) -> Outcome:
    """Dropout, two micro-batches per step, clipping, a schedule, momentum, a loss that is read."""
    torch.manual_seed(0)
    build, data = MODELS[name]
    model = prepare(build())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS)
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=precision == "scaled float16")
    kind = {"autocast bfloat16": torch.bfloat16, "scaled float16": torch.float16}.get(precision)
    watcher = start(model, optimizer) if start is not None else None
    generator, outcome = torch.Generator().manual_seed(1), Outcome()
    for step in range(STEPS):
        loss = torch.zeros(())
        for _ in range(2):
            with autocast("cpu", dtype=kind, enabled=kind is not None):
                loss = (model(data(generator)).float() - 1).square().mean() / 2
            factor = torch.inf if scaler.is_enabled() and step in OVERFLOWS else 1.0
            scaler.scale(loss * factor).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
        outcome.losses.append(loss.detach())
        if watcher is not None:
            watcher.log(train_loss=loss)
    if watcher is not None:
        watcher.close()
        assert failures(watcher) == ""
    outcome.tensors += list(model.state_dict().values())
    outcome.tensors += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    outcome.scale, outcome.random = scaler.get_scale(), torch.get_rng_state()
    return outcome


def watching(path: Path, **how: Any) -> Start:
    """All that can be logged, at every step."""
    everything = {"every": 1, "step_norms": True, "anchors": 2, **how}
    return lambda model, optimizer: watch(model, optimizer, run=path, **everything)


def assert_logged(path: Path, *, steps: int = STEPS, activations: bool = True) -> None:
    """It was really watched."""
    run = Run(path)
    for kind in ("weight", "gradient", "update", *(["activation"] * activations)):
        assert set(run.stats(kind)["step"]) == set(range(steps)), kind
    assert len(run.scalars("train_loss")) == steps
    assert run.info["closed"]


#: An LSTM in half precision is more than many CPUs can do.
PRECISIONS = [
    (name, precision)
    for name in MODELS
    for precision in ("plain", "autocast bfloat16", "scaled float16")
    if name != "lstm" or precision == "plain"
]


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_every_model_in_every_precision(tmp_path: Path, name: str, precision: str) -> None:
    alone = trained(name, None, precision=precision)
    assert_identical(trained(name, watching(tmp_path / "run"), precision=precision), alone)
    assert_logged(tmp_path / "run")
    if precision == "scaled float16":
        weights = Run(tmp_path / "run").stats("weight")
        assert set(weights.loc[weights["skipped"], "step"]) == set(OVERFLOWS)


@pytest.mark.parametrize(
    "how",
    [{"every": 2}, {"every": "auto"}, {"updates": False, "activations": False}, {"reference": None}],
    ids=str,
)
def test_every_way_to_watch(tmp_path: Path, how: dict[str, Any]) -> None:
    alone = trained("transformer", None)
    assert_identical(trained("transformer", watching(tmp_path / "run", **how)), alone)


def test_without_naming_the_optimizer(tmp_path: Path) -> None:
    alone = trained("cnn", None)
    found = trained("cnn", lambda m, _: watching(tmp_path / "run")(m, None))  # type: ignore[arg-type]
    assert_identical(found, alone)
    assert_logged(tmp_path / "run")


# Compiled ---------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _in_place(backend: str) -> Callable[[nn.Module], nn.Module]:
    def prepare(model: nn.Module) -> nn.Module:
        model.compile(backend=backend)
        return model

    return prepare


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("name", "way"), [("cnn", "wrapped"), ("lstm", "in place"), ("transformer", "in place")]
)
def test_compiled(tmp_path: Path, name: str, way: str) -> None:
    def wrap(model: nn.Module) -> Any:
        return torch.compile(model, backend="aot_eager")

    prepare = wrap if way == "wrapped" else _in_place("aot_eager")
    alone = trained(name, None, prepare=prepare)
    torch.compiler.reset()
    assert_identical(trained(name, watching(tmp_path / "run"), prepare=prepare), alone)
    assert_logged(tmp_path / "run", activations=False)
    assert any("compiled" in note for note in Run(tmp_path / "run").info["notes"])


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_compiled_to_machine_code(tmp_path: Path, name: str) -> None:
    """By inductor, which takes a minute or two."""

    def wrap(model: nn.Module) -> Any:
        return torch.compile(model, backend="inductor")

    alone = trained(name, None, prepare=wrap)
    torch.compiler.reset()
    assert_identical(trained(name, watching(tmp_path / "run"), prepare=wrap), alone)
    assert_logged(tmp_path / "run", activations=False)


class Later(nn.Module):
    """Calls a compiled module, and owns the plain one."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain
        self.__dict__["compiled"] = torch.compile(plain, backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.__dict__["compiled"](x)


@pytest.mark.usefixtures("_fresh_compiler")
def test_watched_before_it_is_compiled(tmp_path: Path) -> None:
    """Our hooks are in the model when the compiler meets it."""
    alone = trained("cnn", None, prepare=Later)
    torch.compiler.reset()
    start = watching(tmp_path / "run")
    found = trained("cnn", lambda m, o: start(m.get_submodule("plain"), o), prepare=Later)
    assert_identical(found, alone)
    assert_logged(tmp_path / "run", activations=False)
