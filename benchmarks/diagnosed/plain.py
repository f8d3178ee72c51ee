"""Tables and images: plain trainings, their look-alikes and their faults."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .family import case
from .made import images, table
from .networks import mlp


def fit(
    attach: Callable,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor], Tensor],
    n: int,
    steps: int,
    batch: int = 32,
    seed: int = 0,
    scheduler: object = None,
    clip: float | None = None,
    edit: Callable[[int], None] | None = None,
    val_of: Callable[[], Tensor] | None = None,
    reset: bool = True,
) -> None:
    """The plain loop: draw a batch of indices, step, log."""
    g = torch.Generator().manual_seed(seed)
    watcher = attach(model, optimizer)
    for step in range(steps):
        if edit:
            edit(step)
        if reset:
            optimizer.zero_grad()
        loss = loss_of(torch.randint(0, n, (batch,), generator=g))
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()  # type: ignore[attr-defined]
        watcher.log(train_loss=loss.item())
        if val_of is not None and step % 20 == 19:
            model.eval()
            with torch.no_grad():
                watcher.log(val_loss=val_of().item())
            model.train()
    watcher.close()


# ---- healthy tables, and what can go wrong with them


@case("table")
@case("table-tiny-batch", batch=2, lr=0.003, steps=900)
@case("table-imbalanced", imbalance=0.8)
@case("table-raw-inputs-batchnorm", scale=120.0, norm=True)
@case("table-few-classes", classes=2)
@case("table-deep", sizes=(20, 48, 48, 48, 48, 48))
@case("table-gelu-adam", act=nn.GELU, adam=3e-3)
@case("table-sigmoid-adam", act=nn.Sigmoid, adam=1e-2)
@case("table-adam-hard-clip", adam=3e-3, clip=0.01)
@case("table-warm-up", adam=2e-3, warm=100)
@case("table-restarts", restarts=True)
@case("table-cosine-to-zero", cosine=True)
@case("table-long", steps=1500, cosine=True)
@case("table-momentumless", momentum=0.0, lr=0.2)
@case("table-large-batch", batch=512)
@case("table-rate-x60", "learning_rate_too_high", "not_learning", "nonfinite", "dead_units", lr=4.0)
@case("table-adam-rate-x300", "learning_rate_too_high", "not_learning", "dead_units", adam=1.0)
@case("table-rate-tiny", "learning_rate_too_low", lr=1e-5)
@case("table-dead-layer", "dead_units", bias=-8.0)
@case("table-sigmoid-deep", "vanishing_gradients", act=nn.Sigmoid, sizes=(20, *[32] * 8))
@case("table-never-reset", "stale_gradients", "learning_rate_too_high", "weight_growth", reset=False)
@case("table-shuffled", "not_learning", shuffled=True)
@case("table-overfit", "overfitting", n_train=120, adam=3e-3, steps=600, noise=1.5)
@case("table-clip-tiny", "over_clipping", clip=1e-3)
def train_table(
    attach: Callable,
    seed: int,
    *,
    classes: int = 6,
    sizes: Sequence[int] = (20, 64, 64),
    act: type[nn.Module] = nn.ReLU,
    norm: bool = False,
    lr: float = 0.05,
    momentum: float = 0.9,
    adam: float | None = None,
    steps: int = 400,
    batch: int = 32,
    scale: float = 1.0,
    imbalance: float = 0.0,
    warm: int = 0,
    restarts: bool = False,
    cosine: bool = False,
    clip: float | None = None,
    bias: float | None = None,
    shuffled: bool = False,
    n_train: int = 12000,
    reset: bool = True,
    noise: float = 0.3,
) -> None:
    x, y = table(classes, noise=noise)
    if imbalance:
        keep = (y == 0) | (torch.arange(len(y)) % int(1 / (1 - imbalance)) == 0)
        x, y = x[keep], y[keep]
        n_train = int(0.8 * len(x))
    if shuffled:
        y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(3))]
    x = x * scale
    model = mlp(*sizes, classes, act=act, norm=norm)
    if bias is not None:
        nn.init.constant_([m for m in model if isinstance(m, nn.Linear)][1].bias, bias)
    optimizer = (
        torch.optim.Adam(model.parameters(), lr=adam)
        if adam
        else torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    )
    scheduler = None
    if warm:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / warm))
    elif restarts:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 100)
    elif cosine:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    fit(
        attach,
        model,
        optimizer,
        lambda i: F.cross_entropy(model(x[i]), y[i]),
        n_train,
        steps,
        batch,
        seed,
        scheduler,
        clip,
        None,
        lambda: F.cross_entropy(model(x[n_train:]), y[n_train:]),
        reset,
    )


@case("regression")
@case("regression-low-signal", noise=6.0)
@case("regression-raw-targets", target=(50.0, 10.0), steps=600)
@case("regression-sum-loss", reduction="sum", lr=3e-4)
@case("regression-weight-decay", decay=1e-2)
@case("regression-nan-batch", "nonfinite", broken=200)
def train_regression(
    attach: Callable,
    seed: int,
    *,
    noise: float = 0.3,
    target: tuple[float, float] = (0.0, 1.0),
    steps: int = 400,
    reduction: str = "mean",
    lr: float = 3e-3,
    decay: float = 0.0,
    broken: int | None = None,
) -> None:
    x, y = table(1, noise=noise)
    y = y * target[1] + target[0]
    model = mlp(20, 64, 64, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)

    def edit(step: int) -> None:
        if step == broken:
            x[:] = x * math.inf

    fit(
        attach,
        model,
        optimizer,
        lambda i: F.mse_loss(model(x[i]), y[i], reduction=reduction),
        12000,
        steps,
        seed=seed,
        edit=edit,
        val_of=lambda: F.mse_loss(model(x[12000:]), y[12000:]),
    )


# ---- images


class Residual(nn.Module):
    """A residual block; its last gain starts at zero, as large-batch recipes have it."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


@case("resnet-zero-gain")
@case("resnet-bias-before-norm", bias=True)
@case("resnet-frozen-stem", frozen=True)
@case("resnet-head-only-in-optimizer", "frozen_parameters", head_only=True)
@case("resnet-one-cycle", cycle=True)
@case("resnet-block-left-out", "frozen_parameters", left_out=True)
@case("resnet-spare-head", "unused_parameters", spare=True)
def train_resnet(
    attach: Callable,
    seed: int,
    *,
    bias: bool = False,
    frozen: bool = False,
    head_only: bool = False,
    cycle: bool = False,
    left_out: bool = False,
    spare: bool = False,
    steps: int = 150,
) -> None:
    x, y = images()
    stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=bias), nn.BatchNorm2d(8), nn.ReLU())
    model = nn.Sequential(
        stem, Residual(8), Residual(8), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 8)
    )
    if spare:
        model[1].register_module("aside", nn.Linear(64, 32))
    if frozen:
        stem.requires_grad_(False)
    parameters = [
        p
        for n, p in model.named_parameters()
        if not (left_out and n.startswith("1.")) and (not head_only or n.startswith("5"))
    ]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps) if cycle else None
    fit(
        attach,
        model,
        optimizer,
        lambda i: F.cross_entropy(model(x[i]), y[i]),
        1600,
        steps,
        seed=seed,
        scheduler=scheduler,
        val_of=lambda: F.cross_entropy(model(x[1600:]), y[1600:]),
    )


@case("autoencoder-relu")
@case("vae-sum-loss", variational=True)
def train_autoencoder(attach: Callable, seed: int, *, variational: bool = False) -> None:
    x = images()[0].flatten(1)
    encoder, decoder = mlp(144, 64, 16 if variational else 8), mlp(8, 64, 144)
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def loss_of(i: Tensor) -> Tensor:
        code = encoder(x[i])
        if not variational:
            return F.mse_loss(decoder(code), x[i])
        mean, log_var = code.chunk(2, 1)
        drawn = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum()
        return F.mse_loss(decoder(drawn), x[i], reduction="sum") + 0.05 * kl

    fit(attach, model, optimizer, loss_of, 2000, 300, seed=seed)


@case("gan")
def train_gan(attach: Callable, seed: int) -> None:
    x = 0.5 * table(1)[0][:, :2] + torch.tensor([2.0, -1.0])
    g, d = mlp(4, 32, 32, 2), mlp(2, 32, 32, 1, act=nn.LeakyReLU)
    opt_g, opt_d = (
        torch.optim.Adam(g.parameters(), 1e-3, (0.5, 0.99)),
        torch.optim.Adam(d.parameters(), 1e-3, (0.5, 0.99)),
    )
    watcher = attach([g, d], [opt_g, opt_d])
    for _ in range(400):
        real, fake = x[torch.randint(0, len(x), (64,))], g(torch.randn(64, 4))
        opt_d.zero_grad()
        loss_d = F.softplus(-d(real)).mean() + F.softplus(d(fake.detach())).mean()
        loss_d.backward()
        opt_d.step()
        opt_g.zero_grad()
        loss_g = F.softplus(-d(fake)).mean()
        loss_g.backward()
        opt_g.step()
        watcher.log(train_loss=loss_g.item(), loss_d=loss_d.item())
    watcher.close()
