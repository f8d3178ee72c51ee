"""Made-up data: noisy teachers, so that there is something to learn and a floor."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def table(classes: int, features: int = 20, n: int = 14000, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Classes, or a normalised number when `classes` is 1, by a random tanh network."""
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


def textures(n: int = 4000) -> tuple[Tensor, Tensor]:
    """Six kinds of 12 x 12 gratings, by direction and width, in noise; normalised."""
    g = torch.Generator().manual_seed(11)
    y = torch.randint(0, 6, (n,), generator=g)
    angle, width = math.pi * (y % 3).float() / 3, 0.7 + 0.8 * (y // 3).float()
    row, column = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    along = angle.cos()[:, None, None] * row + angle.sin()[:, None, None] * column
    shift = 6.3 * torch.rand(n, 1, 1, generator=g)
    x = torch.sin(width[:, None, None] * along + shift) + 0.9 * torch.randn(n, 12, 12, generator=g)
    return x[:, None], y


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


def text(n: int = 3000, length: int = 20) -> tuple[Tensor, Tensor]:
    """Tokens, and the same tokens one later."""
    x = tokens(n, length + 1)
    return x[:, :-1], x[:, 1:]


def topics(n: int = 6000, length: int = 24, vocab: int = 200) -> tuple[Tensor, Tensor]:
    """Bags of words of five topics with common words."""
    g = torch.Generator().manual_seed(12)
    y = torch.randint(0, 5, (n,), generator=g)
    common = (40 * torch.rand(n, length, generator=g) ** 2).long()
    topical = 40 + 32 * y[:, None] + (32 * torch.rand(n, length, generator=g) ** 2).long()
    return torch.where(torch.rand(n, length, generator=g) < 0.75, common, topical).clamp(max=vocab - 1), y


def waves(n: int = 5000, length: int = 48, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Four wave forms of any phase: sine, saw, square, two sines."""
    g = torch.Generator().manual_seed(13)
    y = torch.randint(0, 4, (n,), generator=g)
    phase = torch.arange(length) / 8 + torch.rand(n, 1, generator=g) * 8
    turn = 2 * math.pi * phase
    forms = torch.stack(
        [turn.sin(), 2 * (phase % 1) - 1, turn.sin().sign(), 0.7 * (turn.sin() + (2 * turn).sin())]
    )
    x = forms[y, torch.arange(n)] + noise * torch.randn(n, length, generator=g)
    return x[:, None], y


def forecasts(n: int = 5000, length: int = 24) -> tuple[Tensor, Tensor]:
    """A noisy oscillation, and its value three steps later."""
    g = torch.Generator().manual_seed(14)
    start, pace = 6.3 * torch.rand(n, 1, generator=g), 0.2 + 0.2 * torch.rand(n, 1, generator=g)
    wave = torch.sin(start + pace * torch.arange(length + 3)) + 0.15 * torch.randn(n, length + 3, generator=g)
    return wave[:, :length, None], wave[:, -1]


def graphs(n: int = 3000, nodes: int = 12, features: int = 6) -> tuple[Tensor, Tensor]:
    """Node features beside a row-normalised adjacency matrix; a node's class follows from its neighbours."""
    g = torch.Generator().manual_seed(15)
    x = torch.randn(n, nodes, features, generator=g)
    link = (torch.rand(n, nodes, nodes, generator=g) < 0.25).float()
    link = ((link + link.transpose(1, 2) + torch.eye(nodes)) > 0).float()
    link = link / link.sum(2, keepdim=True)
    around = link @ x @ torch.randn(features, 8, generator=g)
    y = (torch.tanh(around) @ torch.randn(8, 4, generator=g)).argmax(2)
    return torch.cat([x, link], 2), y


def views(n: int = 8000, features: int = 24) -> tuple[Tensor, Tensor]:
    """Two noisy views of the same hidden thing, (n, 2, features); targets are not used."""
    g = torch.Generator().manual_seed(16)
    hidden = torch.randn(n, 1, 6, generator=g)
    mix = torch.randn(2, 6, features, generator=g) / 2.5
    seen = torch.stack([torch.tanh(hidden[:, 0] @ mix[0]), torch.tanh(hidden[:, 0] @ mix[1])], 1)
    return seen / 0.6 + 0.3 * torch.randn(n, 2, features, generator=g), torch.zeros(n)


def two_branches(n: int = 8000) -> tuple[Tensor, Tensor]:
    """One number in, two possible numbers out."""
    g = torch.Generator().manual_seed(17)
    x = 4 * torch.rand(n, 1, generator=g) - 2
    side = torch.where(torch.rand(n, 1, generator=g) < 0.5, 1.0, -1.0)
    return x, torch.sin(2 * x) + side * (0.5 + 0.3 * x.abs()) + 0.1 * torch.randn(n, 1, generator=g)


def two_tasks(n: int = 10000) -> tuple[Tensor, Tensor]:
    """A table with a normalised number and a binary class as targets, (n, 2)."""
    x, number = table(1, n=n)
    _, kind = table(2, n=n)
    return x, torch.stack([number[:, 0] if number.dim() > 1 else number, kind.float()], 1)
