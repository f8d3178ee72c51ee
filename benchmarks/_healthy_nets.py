"""Healthy trainings of ordinary networks on data that is already installed: digits, tables, Python's manual.

A training is `train(attach, seed) -> quality`; it registers with the quality that it must reach, so that
"healthy" is measured. `attach(model, optimizer)` gives the watcher.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

Attach = Callable[..., Any]
Evaluate = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Training:
    """One healthy training: `measure` must reach `least` (or, when `lower` is better, stay below)."""

    name: str
    train: Callable[[Attach, int], float]
    measure: str
    least: float
    lower: bool = False

    def reached(self, quality: float) -> bool:
        return quality <= self.least if self.lower else quality >= self.least


TRAININGS: dict[str, Training] = {}


def healthy(name: str, measure: str, least: float, *, lower: bool = False) -> Callable[[Callable], Callable]:
    """Register a training."""

    def register(train: Callable[[Attach, int], float]) -> Callable:
        TRAININGS[name] = Training(name, train, measure, least, lower)
        return train

    return register


def split(x: Any, y: Any, share: float = 0.75) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y for training and for validation; the same split whatever the seed."""
    order = np.random.default_rng(0).permutation(len(x))
    x = torch.as_tensor(np.asarray(x)[order]).float()
    y = torch.as_tensor(np.asarray(y)[order])
    n = int(share * len(x))
    return x[:n], y[:n], x[n:], y[n:]


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scanned digits, (n, 1, 8, 8) of about unit variance."""
    pixels, labels = load_digits(return_X_y=True)
    return split((pixels.reshape(-1, 1, 8, 8) - 4.9) / 6.0, labels)


def fit(
    attach: Attach,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor], Tensor],
    n: int,
    steps: int,
    *,
    batch: int = 64,
    schedule: Any = None,
    clip: float | None = None,
    evaluate: Evaluate | None = None,
    accumulate: int = 1,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """The usual loop over random batches of indices; validation every 20 steps."""
    watcher = attach(model, optimizer)
    for step in range(steps):
        losses = []
        optimizer.zero_grad()
        for _ in range(accumulate):
            loss = loss_of(torch.randperm(n)[:batch]) / accumulate
            loss.backward()
            losses.append(loss.detach())
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        after(step)
        watcher.log(train_loss=torch.stack(losses).sum())
        if evaluate is not None and step % 20 == 19:
            watcher.log(**evaluated(model, evaluate))
    watcher.close()


def evaluated(model: nn.Module, evaluate: Evaluate) -> dict[str, Tensor]:
    model.eval()
    with torch.no_grad():
        found = evaluate()
    model.train()
    return found


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(1) == y).float().mean()


def classify(
    attach: Attach,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor, Tensor, Tensor],
    steps: int,
    **options: Any,
) -> float:
    """Cross-entropy on (x, y, x_valid, y_valid); gives the accuracy on validation data at the end."""
    x, y, x_valid, y_valid = data

    def evaluate() -> dict[str, Tensor]:
        logits = model(x_valid)
        return {"val_loss": F.cross_entropy(logits, y_valid), "val_accuracy": accuracy(logits, y_valid)}

    fit(
        attach, model, optimizer, lambda i: F.cross_entropy(model(x[i]), y[i]), len(x), steps,
        evaluate=evaluate, **options,
    )  # fmt: skip
    return float(evaluated(model, evaluate)["val_accuracy"])


def mlp(*sizes: int, act: type[nn.Module] = nn.ReLU, norm: bool = False, drop: float = 0.0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), act()]
        layers += [nn.Dropout(drop)] if drop else []
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def warm_cosine(optimizer: torch.optim.Optimizer, steps: int, warm: int) -> LambdaLR:
    """Linear warm-up, then half a cosine to zero."""
    return LambdaLR(
        optimizer,
        lambda s: (
            min(1.0, (s + 1) / warm) * 0.5 * (1 + math.cos(math.pi * max(0, s - warm) / (steps - warm)))
        ),
    )


# ---- tables


@healthy("breast-cancer-mlp", "accuracy", 0.93)
def breast_cancer(attach: Attach, seed: int) -> float:
    x, y = load_breast_cancer(return_X_y=True)
    model = mlp(30, 64, 64, 2, drop=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    data = split((x - x.mean(0)) / x.std(0), y)
    return classify(attach, model, optimizer, data, 200, batch=32)


@healthy("wine-raw-batchnorm", "accuracy", 0.9)
def wine(attach: Attach, seed: int) -> float:
    """Raw columns from 0.1 to 1,700: a batch norm at the entrance takes care of them."""
    x, y = load_wine(return_X_y=True)
    model = nn.Sequential(nn.BatchNorm1d(13), *mlp(13, 32, 3, act=nn.SiLU))
    return classify(attach, model, torch.optim.SGD(model.parameters(), 0.05, 0.9), split(x, y), 200, batch=32)


@healthy("diabetes-raw-targets", "share of variance explained", 0.3)
def diabetes(attach: Attach, seed: int) -> float:
    """Targets from 25 to 346, little signal: the squared error falls from 29,000 to 3,000."""
    x, y = load_diabetes(return_X_y=True)
    x, y, x_valid, y_valid = split(x / x.std(0), y.astype(np.float32)[:, None])
    model = mlp(10, 64, 1, act=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)

    def evaluate() -> dict[str, Tensor]:
        return {"val_loss": F.mse_loss(model(x_valid), y_valid)}

    fit(
        attach, model, optimizer, lambda i: F.mse_loss(model(x[i]), y[i]), len(x), 400, evaluate=evaluate,
        schedule=CosineAnnealingLR(optimizer, 400),
    )  # fmt: skip
    return 1 - float(evaluated(model, evaluate)["val_loss"] / y_valid.var())


# ---- images


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(x + self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x))))))


def resnet(width: int = 12) -> nn.Sequential:
    stem = [nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks = [Residual(width), nn.MaxPool2d(2), Residual(width), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*stem, *blocks, nn.Linear(4 * width, 10))


@healthy("resnet-onecycle", "accuracy", 0.95)
def onecycle(attach: Attach, seed: int) -> float:
    model, steps = resnet(), 160
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = OneCycleLR(optimizer, 0.2, total_steps=steps)
    return classify(attach, model, optimizer, digits(), steps, schedule=schedule)


@healthy("resnet-swa", "accuracy of the averaged weights", 0.95)
def swa(attach: Attach, seed: int) -> float:
    """Stochastic weight averaging: a high constant rate in the last third of the run."""
    model, steps, start = resnet(), 180, 120
    data = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    averaged = swa_utils.AveragedModel(model)
    cosine = CosineAnnealingLR(optimizer, start, eta_min=0.01)
    high = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=5)

    def after(step: int) -> None:
        (cosine if step < start else high).step()
        if step >= start:
            averaged.update_parameters(model)

    classify(attach, model, optimizer, data, steps, after=after)
    swa_utils.update_bn(data[0].split(64), averaged)
    averaged.eval()
    with torch.no_grad():
        return float(accuracy(averaged(data[2]), data[3]))


@healthy("cnn-dropout-smoothing-augmented", "accuracy", 0.9)
def augmented(attach: Attach, seed: int) -> float:
    """Dropout, label smoothing and shifted images keep the training loss above the validation loss."""
    x, y, x_valid, y_valid = digits()
    model = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(24, 48, 3, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Dropout(0.4), nn.Linear(48 * 16, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss_of(i: Tensor) -> Tensor:
        shifted = torch.roll(x[i], tuple(torch.randint(-1, 2, (2,)).tolist()), (2, 3))
        return F.cross_entropy(model(shifted), y[i], label_smoothing=0.1)

    def evaluate() -> dict[str, Tensor]:
        logits = model(x_valid)
        return {"val_loss": F.cross_entropy(logits, y_valid), "val_accuracy": accuracy(logits, y_valid)}

    fit(attach, model, optimizer, loss_of, len(x), 240, evaluate=evaluate)
    return float(evaluated(model, evaluate)["val_accuracy"])


class Attention(nn.Module):
    """Separate projections, so that the key's bias, whose gradient is zero, is a tensor of its own."""

    def __init__(self, dim: int, heads: int = 4, causal: bool = False):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.out, self.heads, self.causal = nn.Linear(dim, dim), heads, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, causal: bool = False, drop: float = 0.0):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, causal=causal)
        self.norm2, self.up, self.act = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU()
        self.down, self.drop = nn.Linear(4 * dim, dim), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.down(self.act(self.up(self.norm2(x)))))


class VisionTransformer(nn.Module):
    def __init__(self, dim: int = 32, depth: int = 3):
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 2, 2)
        self.place = nn.Parameter(0.02 * torch.randn(16, dim))
        self.blocks = nn.Sequential(*(Block(dim, drop=0.0) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.blocks(x)).mean(1))


@healthy("vit-adamw-warmup-cosine", "accuracy", 0.87)
def vit(attach: Attach, seed: int) -> float:
    model, steps = VisionTransformer(), 240
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = warm_cosine(optimizer, steps, 30)
    return classify(attach, model, optimizer, digits(), steps, schedule=schedule, clip=1.0)


@healthy("vae-sum-loss", "squared error over variance", 0.55, lower=True)
def vae(attach: Attach, seed: int) -> float:
    x, _, x_valid, _ = digits()
    x, x_valid = x.flatten(1), x_valid.flatten(1)
    model = nn.ModuleDict({"encoder": mlp(64, 128, 32), "decoder": mlp(16, 128, 64)})
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def loss_of(batch: Tensor) -> Tensor:
        mean, log_var = model["encoder"](batch).chunk(2, 1)
        drawn = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        divergence = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum()
        return F.mse_loss(model["decoder"](drawn), batch, reduction="sum") + 0.5 * divergence

    fit(
        attach, model, optimizer, lambda i: loss_of(x[i]), len(x), 400,
        evaluate=lambda: {"val_loss": loss_of(x_valid) / len(x_valid) * 64},
    )  # fmt: skip
    with torch.no_grad():
        drawn = model["decoder"](model["encoder"](x_valid).chunk(2, 1)[0])
    return float(F.mse_loss(drawn, x_valid) / x_valid.var())


@healthy("simclr", "accuracy of the nearest neighbour", 0.9)
def simclr(attach: Attach, seed: int) -> float:
    """Two noisy views of an image attract, the other images of the batch repel (NT-Xent)."""
    x, y, x_valid, y_valid = digits()
    body = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 16, 64),
    )  # fmt: skip
    model = nn.Sequential(body, nn.Sequential(nn.ReLU(), nn.Linear(64, 32)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def view(images: Tensor) -> Tensor:
        moved = torch.roll(images, tuple(torch.randint(-1, 2, (2,)).tolist()), (2, 3))
        return moved + 0.3 * torch.randn_like(moved)

    def loss_of(i: Tensor) -> Tensor:
        codes = F.normalize(model(torch.cat([view(x[i]), view(x[i])])), dim=1)
        similar = (codes @ codes.T / 0.2).masked_fill(torch.eye(len(codes), dtype=torch.bool), -math.inf)
        partner = torch.arange(len(codes)).roll(len(i))
        return F.cross_entropy(similar, partner)

    fit(attach, model, optimizer, loss_of, len(x), 180)
    body.eval()
    with torch.no_grad():
        known, asked = (F.normalize(body(part), dim=1) for part in (x, x_valid))
    return float((y[(asked @ known.T).argmax(1)] == y_valid).float().mean())


@healthy("frozen-body-new-head-ema", "accuracy of the averaged weights", 0.88)
def transfer(attach: Attach, seed: int) -> float:
    """A network that knows the digits 0 to 4 gets a new head for all ten; the body goes slower; EMA."""
    data = digits()
    model = mlp(64, 96, 96, 5)
    x, y, x_valid, y_valid = data[0].flatten(1), data[1], data[2].flatten(1), data[3]
    few = torch.nonzero(y < 5)[:, 0]
    first = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(200):  # not watched
        i = few[torch.randint(0, len(few), (64,))]
        first.zero_grad()
        F.cross_entropy(model(x[i]), y[i]).backward()
        first.step()
    model[-1] = nn.Linear(96, 10)
    model[0].requires_grad_(False)
    groups: Sequence[Any] = [
        {"params": list(model[2].parameters()), "lr": 2e-4},
        {"params": list(model[-1].parameters()), "lr": 3e-3},
    ]
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.97))
    classify(
        attach, model, torch.optim.AdamW(groups), (x, y, x_valid, y_valid), 250,
        after=lambda step: averaged.update_parameters(model),
    )  # fmt: skip
    with torch.no_grad():
        return float(accuracy(averaged(x_valid), y_valid))
