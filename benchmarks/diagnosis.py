"""How often do the detectors alarm on healthy trainings, and do they name what is wrong with faulty ones?

    python benchmarks/diagnosis.py --seeds 3 --every 1 10 50      # train the cases below, judge them python
    benchmarks/diagnosis.py --runs FOLDER                  # judge runs; FOLDER/labels.json: {"run": ["code",
    ...]}

Every case is an ordinary short training on made-up data. Faulty cases differ from a healthy one by one
change. A case's label lists the codes that are right; none means healthy. An alarm is a finding of severity
warning or critical.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwatch.hooks import watch
from layerwatch.monitor import Finding, Run

Train = Callable[[Callable, int], None]
CASES: dict[str, tuple[tuple[str, ...], Train]] = {}


def case(name: str, *codes: str, **knobs: object) -> Callable[[Callable], Callable]:
    """Register a training under a name; `codes` are the right findings (none: healthy)."""

    def register(train: Callable) -> Callable:
        CASES[name] = (codes, partial(train, **knobs))
        return train

    return register


# ---- data: a noisy teacher, so that there is something to learn and a floor


def table(classes: int, features: int = 20, n: int = 14000, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    x = torch.randn(n, features, generator=g)
    teacher = torch.randn(features, 32, generator=g) / features**0.5
    out = torch.randn(32, classes, generator=g)
    y = torch.tanh(2 * x @ teacher) @ out + noise * torch.randn(n, classes, generator=g)
    return x, (y.argmax(1) if classes > 1 else (y - y.mean()) / y.std())


def images(n: int = 2000) -> tuple[Tensor, Tensor]:
    """Blobs at one of eight places of a 12 x 12 image with blank borders."""
    g = torch.Generator().manual_seed(8)
    y = torch.randint(0, 8, (n,), generator=g)
    x = torch.zeros(n, 1, 12, 12)
    x[:, :, 2:10, 2:10] = 0.3 * torch.rand(n, 1, 8, 8, generator=g)
    for i, label in enumerate(y.tolist()):
        row, column = 2 + 4 * (label // 4), 2 + 2 * (label % 4)
        x[i, 0, row : row + 3, column : column + 2] += 1.0
    return x, y


def tokens(n: int, length: int, vocab: int = 40) -> Tensor:
    """A second-order Markov text: the next token follows from the last two, mostly; some tokens are rare."""
    g = torch.Generator().manual_seed(9)
    frequent = 1.0 / torch.arange(1, vocab + 1).float()
    table_ = torch.multinomial(frequent.repeat(vocab * vocab, 1), 1, generator=g).view(vocab, vocab)
    x = torch.randint(0, vocab, (n, length), generator=g)
    for t in range(2, length):
        follow = table_[x[:, t - 2] % 6, x[:, t - 1] % 6]
        x[:, t] = torch.where(torch.rand(n, generator=g) < 0.85, follow, x[:, t])
    return x


def mlp(*sizes: int, act: type[nn.Module] = nn.ReLU, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), act()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


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


# ---- sequences


class Block(nn.Module):
    def __init__(self, dim: int, post: bool):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.ln1, self.ln2, self.post = nn.LayerNorm(dim), nn.LayerNorm(dim), post

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = x if self.post else self.ln1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        x = self.ln1(x) if self.post else x
        x = x + self.down(F.gelu(self.up(x if self.post else self.ln2(x))))
        return self.ln2(x) if self.post else x


class Transformer(nn.Module):
    def __init__(self, vocab: int, dim: int = 32, depth: int = 2, tied: bool = False, post: bool = False):
        super().__init__()
        self.token, self.place = nn.Embedding(vocab, dim), nn.Parameter(0.02 * torch.randn(24, dim))
        self.blocks = nn.ModuleList(Block(dim, post) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        mask = torch.full((ids.shape[1], ids.shape[1]), -math.inf).triu(1)
        x = self.token(ids) + self.place[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


@case("transformer")
@case("transformer-tied", tied=True)
@case("transformer-post-norm", post=True)
@case("transformer-deep", depth=6, steps=150)
@case("transformer-bfloat16-autocast", autocast=True)
@case("transformer-rate-x100", "learning_rate_too_high", "not_learning", "weight_growth", lr=0.3)
def train_transformer(
    attach: Callable,
    seed: int,
    *,
    tied: bool = False,
    post: bool = False,
    depth: int = 2,
    lr: float = 3e-3,
    steps: int = 250,
    autocast: bool = False,
) -> None:
    x = tokens(2000, 24)
    model = Transformer(40, depth=depth, tied=tied, post=post)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 20) * 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps)))
    )

    def loss_of(i: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(x[i, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), x[i, 1:].flatten())

    fit(
        attach,
        model,
        optimizer,
        loss_of,
        1700,
        steps,
        16,
        seed,
        scheduler,
        clip=1.0,
        val_of=lambda: loss_of(torch.arange(1700, 2000)),
    )


@case("lstm-classifier")
@case("gru-classifier", cell="GRU")
def train_recurrent(attach: Callable, seed: int, *, cell: str = "LSTM") -> None:
    x = tokens(2000, 20)
    y = (x[:, :6] < 4).sum(1).clamp(max=4)
    model = nn.ModuleDict(
        {
            "token": nn.Embedding(40, 16),
            "rnn": getattr(nn, cell)(16, 32, batch_first=True),
            "head": nn.Linear(32, 5),
        }
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    fit(
        attach,
        model,
        optimizer,
        lambda i: F.cross_entropy(model["head"](model["rnn"](model["token"](x[i]))[0][:, -1]), y[i]),
        2000,
        400,
        seed=seed,
        clip=1.0,
    )


class LowRank(nn.Module):
    """A frozen linear layer with a trainable low-rank addition; B starts at zero (LoRA)."""

    def __init__(self, base: nn.Linear, rank: int = 4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


@case("finetune-lora", lora=True)
@case("finetune-full")
@case("finetune-far", "excessive_drift", "learning_rate_too_high", "dead_units", lr=0.05)
def train_finetune(attach: Callable, seed: int, *, lora: bool = False, lr: float = 5e-4) -> None:
    x, y = table(6)
    model = mlp(20, 64, 64, 64, 6)
    first = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):  # the pretraining, unwatched
        i = torch.randint(0, 1500, (64,))
        first.zero_grad()
        F.cross_entropy(model(x[i]), y[i]).backward()
        first.step()
    model[-1] = nn.Linear(64, 3)
    if lora:
        for at in (0, 2, 4):
            model[at] = LowRank(model[at])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3 if lora else lr)
    fit(attach, model, optimizer, lambda i: F.cross_entropy(model(x[i]), y[i] % 3), 12000, 250, seed=seed)


@case("policy-gradient")
def train_policy(attach: Callable, seed: int) -> None:
    """REINFORCE on a contextual bandit: the loss changes sign and means nothing."""
    x, y = table(4)
    model = mlp(20, 32, 4, act=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def loss_of(i: Tensor) -> Tensor:
        chosen = torch.distributions.Categorical(logits=model(x[i]))
        action = chosen.sample()
        reward = (action == y[i]).float()
        return -((reward - reward.mean()) * chosen.log_prob(action)).mean()

    fit(attach, model, optimizer, loss_of, 3000, 400, 64, seed)


@case("q-learning-target-network")
def train_q(attach: Callable, seed: int) -> None:
    """Fitted values against a slow copy of the network: targets move, so the loss need not fall."""
    x, y = table(4)
    model = nn.ModuleDict({"online": mlp(20, 32, 4), "target": mlp(20, 32, 4)})
    optimizer = torch.optim.Adam(model["online"].parameters(), lr=2e-3)

    def edit(step: int) -> None:
        if step % 50 == 0:
            model["target"].load_state_dict(model["online"].state_dict())

    def loss_of(i: Tensor) -> Tensor:
        action = torch.randint(0, 4, (len(i),))
        with torch.no_grad():
            goal = (action == y[i]).float() + 0.8 * model["target"](x[(i + 1) % len(x)]).max(1).values
        return F.smooth_l1_loss(model["online"](x[i])[torch.arange(len(i)), action], goal)

    fit(attach, model, optimizer, loss_of, 3000, 500, 64, seed, edit=edit)


@case("mixture-of-experts")
def train_experts(attach: Callable, seed: int) -> None:
    x, y = table(6)
    model = nn.ModuleDict(
        {"gate": nn.Linear(20, 4), "experts": nn.ModuleList(mlp(20, 32, 6) for _ in range(4))}
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def loss_of(i: Tensor) -> Tensor:
        weight, chosen = F.softmax(model["gate"](x[i]), 1).max(1)
        out = torch.zeros(len(i), 6)
        for k, expert in enumerate(model["experts"]):
            here = chosen == k
            if here.any():
                out[here] = expert(x[i][here]) * weight[here, None]
        return F.cross_entropy(out, y[i])

    fit(attach, model, optimizer, loss_of, 3000, 400, 16, seed)


@case("lbfgs")
def train_lbfgs(attach: Callable, seed: int) -> None:
    x, y = table(1)
    model = mlp(20, 16, 1, act=nn.Tanh)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    watcher = attach(model, optimizer)
    for _ in range(60):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        watcher.log(train_loss=optimizer.step(closure))  # type: ignore[arg-type]
    watcher.close()


# ---- judging


def judge(run: Path, codes: Sequence[str]) -> tuple[list[Finding], bool]:
    """The alarms of a run, and whether they are right: none for a healthy run, the first one right for a
    faulty one.
    """
    alarms = [f for f in Run(run).findings() if f.alarm]
    right = not alarms if not codes else bool(alarms) and alarms[0].problem in codes
    return alarms, right


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share."""
    if n == 0:
        return 0.0, 1.0
    p, d = hits / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return max(0.0, (p + z * z / (2 * n)) / d - half), min(1.0, (p + z * z / (2 * n)) / d + half)


def report(rows: Sequence[tuple[str, Sequence[str], list[Finding], bool]]) -> None:
    for name, codes, alarms, right in rows:
        if not right:
            print(
                f"  {name}: expected {' or '.join(codes) or 'silence'}, got "
                f"{', '.join(f.problem for f in alarms) or 'silence'}"
            )
            for f in alarms:
                print(f"      {f.severity} {f.problem} from step {f.first_step}: {f.summary}")
    healthy = [r for r in rows if not r[1]]
    faulty = [r for r in rows if r[1]]
    alarmed = sum(not right for *_, right in healthy)
    low, high = wilson(alarmed, len(healthy))
    print(f"healthy runs with an alarm: {alarmed} of {len(healthy)} ({low:.1%} to {high:.1%})")
    print(f"faulty runs whose first alarm is right: {sum(r[3] for r in faulty)} of {len(faulty)}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, help="judge the runs of this folder instead of training")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--every", type=int, nargs="+", default=[10], help="capture every N-th step")
    parser.add_argument("--only", default="", help="regular expression on the names of cases")
    parser.add_argument("--keep", type=Path, help="keep the runs here")
    options = parser.parse_args()
    if options.runs:
        labels: dict[str, list[str]] = json.loads((options.runs / "labels.json").read_text())
        report([(name, codes, *judge(options.runs / name, codes)) for name, codes in labels.items()])
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = options.keep or Path(scratch)
        for every in options.every:
            rows, start = [], time.perf_counter()
            for name, (codes, train) in CASES.items():
                for seed in range(options.seeds if re.search(options.only, name) else 0):
                    run = root / f"{name}-every{every}-seed{seed}"
                    torch.manual_seed(seed)
                    train(lambda m, o, run=run, every=every: watch(m, o, run=run, every=every), seed)
                    rows.append((run.name, codes, *judge(run, codes)))
            print(f"capturing every {every} steps, {time.perf_counter() - start:.0f} s:")
            report(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
