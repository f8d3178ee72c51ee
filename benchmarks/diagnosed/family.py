"""Families of trainings: an architecture with its data and optimizer, trained well or with one fault."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

#: attach(model, optimizer) -> an object with log(**scalars) and close().
Attach = Callable[..., Any]
Train = Callable[[Attach, int], None]


@dataclass(frozen=True)
class Case:
    """One training. `codes`: what is right to say, the first of them is the fault; () is healthy."""

    codes: tuple[str, ...]
    train: Train
    twin: Train | None  # the same without the fault
    layers: str = ""  # regular expression on the names of the guilty parameters or modules
    onset: int = 0
    held_out: bool = False  # not looked at while the detectors were written


CASES: dict[str, Case] = {}


def case(name: str, *codes: str, **knobs: object) -> Callable[[Callable], Callable]:
    """Register a training function under a name; without its knobs it is the twin of a faulty one."""

    def register(train: Callable) -> Callable:
        CASES[name] = Case(codes, partial(train, **knobs), partial(train) if codes else None)
        return train

    return register


@dataclass
class Recipe:
    """How one training differs from its family's."""

    steps: int = 0
    batch: int = 0
    faster: float = 1.0  # times the learning rate
    optimizer: Callable[[Any, float], torch.optim.Optimizer] | None = None
    groups: Callable[[nn.Module, float], Iterable[Any]] | None = None
    clip: float | None = None
    edit: Callable[[nn.Module], None] | None = None
    data: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    source: Callable[[], tuple[Tensor, Tensor]] | None = None  # other data, for validation too
    unit: tuple[float, float] = (1.0, 0.0)  # inputs are multiplied by the first and moved by the second
    disturb: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    rate: Callable[[int], float] | None = None
    penalty: Callable[[nn.Module, Tensor], Tensor] | None = None
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    model: Callable[[], nn.Module] | None = None
    samples: int | None = None
    in_order: bool = False
    reset: bool = True
    accumulate: int = 1
    divide: float = 1.0  # the loss, before its gradient is taken
    log_every: int = 1
    precision: str = "full"  # or "scaled", "float16", "bfloat16 weights"
    before: int = 0  # steps of an unwatched training on half of the data
    after: Callable[[nn.Module], None] | None = None  # what is changed between the two


@dataclass
class Family:
    """An architecture, its data and how it is trained well.

    Attributes:
        model: makes a fresh model. data: () -> inputs and targets. loss: (model, x, y) -> scalar.
        optimizer: (parameters or groups, learning rate) -> optimizer. lr: the rate that works.
        rate: step -> factor of the learning rate.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    optimizer: Callable[[Any, float], torch.optim.Optimizer]
    lr: float
    steps: int = 300
    batch: int = 32
    clip: float | None = None
    rate: Callable[[int], float] | None = None
    held_out: bool = False

    def healthy(self, name: str, **knobs: Any) -> None:
        self._add(name, (), knobs, "", 0)

    def faulty(self, name: str, *codes: str, layers: str = "", onset: int = 0, **knobs: Any) -> None:
        self._add(name, codes, knobs, layers, onset)

    def _add(self, name: str, codes: tuple[str, ...], knobs: dict[str, Any], layers: str, onset: int) -> None:
        twin = partial(self.train, **knobs.pop("twin", {})) if codes else None
        train = partial(self.train, **knobs)
        CASES[f"{self.name}-{name}"] = Case(codes, train, twin, layers, onset, self.held_out)

    def train(self, attach: Attach, seed: int, **knobs: Any) -> None:
        """The plain loop, with the changes that `Recipe` lists."""
        recipe = Recipe(**knobs)
        torch.manual_seed(seed)
        (x, y), val = self._data(recipe)
        net = self._network(recipe, x, y)
        speed = self.lr * recipe.faster
        parameters = recipe.groups(net, speed) if recipe.groups else _trainable(net)
        opt = (recipe.optimizer or self.optimizer)(parameters, speed)
        factor = recipe.rate or self.rate
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, factor) if factor else None
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, enabled=recipe.precision == "scaled")
        g = torch.Generator().manual_seed(seed + 1)
        watcher = attach(net, opt)
        net.train()
        for step in range(recipe.steps or self.steps):
            if recipe.reset:
                opt.zero_grad()
            total = self._backward(net, recipe, scaler, step, x, y, g)
            if recipe.clip or self.clip:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(net.parameters(), recipe.clip or self.clip or 1.0)
            scaler.step(opt)
            scaler.update()
            if scheduler:
                scheduler.step()
            if step % recipe.log_every == 0:
                scale = {"loss_scale": scaler.get_scale()} if recipe.precision == "scaled" else {}
                watcher.log(train_loss=total, **scale)
            if step % 20 == 19:
                net.eval()
                with torch.no_grad():
                    watcher.log(val_loss=self._loss(net, recipe, *val).item())
                net.train()
        watcher.close()

    def _data(self, recipe: Recipe) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        x, y = (recipe.source or self.data)()
        if recipe.unit != (1.0, 0.0):
            x = x * recipe.unit[0] + recipe.unit[1]
        cut = int(0.85 * len(x))
        val, (x, y) = (x[cut:], y[cut:]), (x[:cut], y[:cut])
        if recipe.data:
            x, y = recipe.data(x, y)
        return (x[: recipe.samples], y[: recipe.samples]), val

    def _network(self, recipe: Recipe, x: Tensor, y: Tensor) -> nn.Module:
        net = (recipe.model or self.model)()
        if recipe.edit:
            recipe.edit(net)
        if recipe.before:
            self._pretrain(net, x[: len(x) // 2], y[: len(x) // 2], recipe.before)
            if recipe.after:
                recipe.after(net)
        return net.bfloat16() if recipe.precision == "bfloat16 weights" else net

    def _loss(self, net: nn.Module, recipe: Recipe, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=recipe.precision in ("scaled", "float16")):
            return (recipe.loss or self.loss)(net, _as(net, x), y)

    def _backward(
        self, net: nn.Module, recipe: Recipe, scaler: torch.amp.GradScaler, step: int,
        x: Tensor, y: Tensor, g: torch.Generator,
    ) -> float:  # fmt: skip
        """The gradient of one step, over its micro-batches; returns their mean loss."""
        total, batch = 0.0, recipe.batch or self.batch
        for _ in range(recipe.accumulate):
            index = torch.randint(0, len(x), (batch,), generator=g)
            if recipe.in_order:
                index = (torch.arange(batch) + step * batch) % len(x)
            xb, yb = x[index], y[index]
            if recipe.disturb:
                xb, yb = recipe.disturb(step, xb, yb)
            part = self._loss(net, recipe, xb, yb)
            total += part.item() / recipe.accumulate
            if recipe.penalty:
                part = part + recipe.penalty(net, _as(net, xb))
            scaler.scale(part / recipe.divide / recipe.accumulate).backward()
        return total

    def _pretrain(self, net: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
        opt = self.optimizer(net.parameters(), self.lr)
        for _ in range(steps):
            index = torch.randint(0, len(x), (self.batch,))
            opt.zero_grad()
            self.loss(net, x[index], y[index]).backward()
            opt.step()


def _trainable(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


def _as(net: nn.Module, x: Tensor) -> Tensor:
    return x.to(next(net.parameters()).dtype) if x.is_floating_point() else x


# ---- changes of a model before its training


def scaled(pattern: str, factor: float) -> Callable[[nn.Module], None]:
    """Multiply the matrices of these names."""

    def edit(net: nn.Module) -> None:
        for name, p in net.named_parameters():
            if re.search(pattern, name) and p.dim() >= 2:
                p.data.mul_(factor)

    return edit


def constant(pattern: str, value: float) -> Callable[[nn.Module], None]:
    """The matrices of these names start at one number, their biases at zero."""

    def edit(net: nn.Module) -> None:
        for name, p in net.named_parameters():
            if re.search(pattern, name):
                p.data.fill_(value if p.dim() >= 2 else 0.0)

    return edit


def biased(pattern: str, value: float) -> Callable[[nn.Module], None]:
    """The vectors of these names start at this number."""

    def edit(net: nn.Module) -> None:
        for name, p in net.named_parameters():
            if re.search(pattern, name) and p.dim() == 1:
                p.data.fill_(value)

    return edit


def cut(name: str) -> Callable[[nn.Module], None]:
    """No gradient passes back through this module's output."""
    return lambda net: _drop(net.get_submodule(name).register_forward_hook(lambda m, a, out: out.detach()))


def spare(width: int = 48) -> Callable[[nn.Module], None]:
    """A layer that forward() leaves out."""
    return lambda net: net.register_module("projection", nn.Linear(width, width))


def frozen(pattern: str) -> Callable[[nn.Module], None]:
    """requires_grad=False, on purpose."""

    def edit(net: nn.Module) -> None:
        for name, p in net.named_parameters():
            p.requires_grad_(not re.search(pattern, name))

    return edit


def _drop(_: object) -> None:
    return None


def without(pattern: str) -> Callable[[nn.Module, float], Iterable[Any]]:
    """The optimizer is not given these parameters."""
    return lambda net, lr: [p for n, p in net.named_parameters() if not re.search(pattern, n)]


def paced(pattern: str, factor: float) -> Callable[[nn.Module, float], Iterable[Any]]:
    """These parameters have a learning rate of their own."""

    def groups(net: nn.Module, lr: float) -> list[dict[str, Any]]:
        named = list(net.named_parameters())
        chosen = [p for n, p in named if re.search(pattern, n)]
        return [
            {"params": chosen, "lr": lr * factor},
            {"params": [p for n, p in named if not re.search(pattern, n)]},
        ]

    return groups


# ---- changes of the data


def mislabelled(share: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """So many targets are those of another row (1.0: all)."""

    def change(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(3)
        wrong = torch.rand(len(y), generator=g) < share
        y = y.clone()
        y[wrong] = y[torch.randint(0, len(y), (int(wrong.sum()),), generator=g)]
        return x, y

    return change


def by_label(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by their class."""
    order = torch.argsort(y if y.dim() == 1 else y[:, 0], stable=True)
    return x[order], y[order]


def repeated(kept: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Only so many different rows, again and again."""
    return lambda x, y: (x[torch.arange(len(x)) % kept], y[torch.arange(len(y)) % kept])


def blurred(y: Tensor, noise: float) -> Tensor:
    """With normal noise."""
    return y + noise * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))


def shuffled(x: Tensor) -> Tensor:
    """Rows in another order."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]


Batches = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def times(factor: float, at: Sequence[int]) -> Batches:
    """The batches of these steps are so many times larger (NaN: broken)."""
    return lambda step, x, y: (x * factor, y) if step in at else (x, y)


# ---- changes of the learning rate


def warm(steps: int, total: int = 0) -> Callable[[int], float]:
    """Linear warm-up, then a cosine to zero (or constant)."""

    def rate(step: int) -> float:
        down = (
            0.5 * (1 + torch.cos(torch.tensor(3.14159265 * min(1.0, step / total))).item()) if total else 1.0
        )
        return min(1.0, (step + 1) / steps) * down

    return rate


def jump(at: int, factor: float, usual: Callable[[int], float] = lambda step: 1.0) -> Callable[[int], float]:
    """From this step on the rate is so many times what it should be (0: nothing more is learnt)."""
    return lambda step: usual(step) * (factor if step >= at else 1.0)
