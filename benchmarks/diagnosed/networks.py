"""Small networks of many kinds."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*sizes: int, act: type[nn.Module] = nn.ReLU, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), act()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


class SelfAttention(nn.Module):
    """Multi-head self-attention, its weights made by torch's fused function or by a softmax and a dropout."""

    def __init__(self, dim: int, heads: int = 4, causal: bool = False, fused: bool = True, drop: float = 0.0):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.out, self.heads, self.causal, self.fused = nn.Linear(dim, dim), heads, causal, fused
        self.drop = nn.Dropout(drop)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def weights(self, x: Tensor) -> Tensor:
        """(batch, heads, queries, keys)"""
        q, k = self.split(self.q(x)), self.split(self.k(x))
        score = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        if self.causal:
            score = score + torch.full(score.shape[2:], -math.inf).triu(1)
        return F.softmax(score, -1)

    def forward(self, x: Tensor) -> Tensor:
        v = self.split(self.v(x))
        if self.fused:
            y = F.scaled_dot_product_attention(
                self.split(self.q(x)), self.split(self.k(x)), v, is_causal=self.causal
            )
        else:
            y = self.drop(self.weights(x)) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A transformer layer, normalised before or after."""

    def __init__(self, dim: int, post: bool = False, act: type[nn.Module] = nn.GELU, **attention: object):
        super().__init__()
        self.attention = SelfAttention(dim, **attention)  # type: ignore[arg-type]
        self.up, self.act, self.down = nn.Linear(dim, 3 * dim), act(), nn.Linear(3 * dim, dim)
        self.norm1, self.norm2, self.post = nn.LayerNorm(dim), nn.LayerNorm(dim), post

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.down(self.act(self.up(x))))
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.act(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """3 x 3 patches of a 12 x 12 image, the mean of all tokens."""

    def __init__(self, classes: int, dim: int = 32, depth: int = 2):
        super().__init__()
        self.patch, self.place = nn.Conv2d(1, dim, 3, 3), nn.Parameter(0.02 * torch.randn(16, dim))
        self.layers = nn.ModuleList(Layer(dim) for _ in range(depth))
        self.norm, self.logits = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.logits(self.norm(x).mean(1))


class Reader(nn.Module):
    """Tokens through transformer layers: a class for the text, or the next token everywhere."""

    def __init__(
        self, vocab: int, out: int, dim: int = 32, depth: int = 2, post: bool = False,
        causal: bool = False, fused: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.token, self.place = nn.Embedding(vocab, dim), nn.Embedding(32, dim)
        nn.init.normal_(self.token.weight, std=0.3)
        nn.init.normal_(self.place.weight, std=0.3)
        self.layers = nn.ModuleList(Layer(dim, post, causal=causal, fused=fused) for _ in range(depth))
        self.norm, self.to_out, self.pooled = nn.LayerNorm(dim), nn.Linear(dim, out), not causal

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.place(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return self.to_out(x.mean(1) if self.pooled else x)


class Recurrent(nn.Module):
    """Tokens or numbers through a recurrent layer; its last state, or all of them."""

    def __init__(self, cell: str, inputs: int, hidden: int, out: int, vocab: int = 0, every: bool = False):
        super().__init__()
        self.token = nn.Embedding(vocab, inputs) if vocab else nn.Identity()
        self.cell = getattr(nn, cell)(inputs, hidden, batch_first=True)
        self.to_out, self.every = nn.Linear(hidden, out), every

    def forward(self, x: Tensor) -> Tensor:
        states = self.cell(self.token(x))[0]
        return self.to_out(states if self.every else states[:, -1])


class ResidualMLP(nn.Module):
    """x + W2 act(W1 norm(x)), deep."""

    def __init__(self, inputs: int, out: int, dim: int = 48, depth: int = 8):
        super().__init__()
        self.stem, self.end = nn.Linear(inputs, dim), nn.Linear(dim, out)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x) / math.sqrt(len(self.blocks))
        return self.end(x)


def wave_net(classes: int = 4, norm: bool = True) -> nn.Sequential:
    """Strided 1-d convolutions."""
    layers: list[nn.Module] = []
    for a, b in ((1, 12), (12, 24), (24, 24)):
        layers += [nn.Conv1d(a, b, 5, 2, 2, bias=not norm), *([nn.BatchNorm1d(b)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(48, classes))


def plain_convolutions(classes: int = 6) -> nn.Sequential:
    """2-d convolutions without any normalisation."""
    layers: list[nn.Module] = []
    for a, b in ((1, 12), (12, 16), (16, 24), (24, 24)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
    layers[4:4] = [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, classes))


class MessagePassing(nn.Module):
    """Nodes listen to the mean of their neighbours, three times."""

    def __init__(self, features: int = 6, dim: int = 32, classes: int = 4):
        super().__init__()
        self.features, self.enter = features, nn.Linear(features, dim)
        self.own = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))
        self.heard = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.act, self.leave = nn.ReLU(), nn.Linear(dim, classes)

    def forward(self, graph: Tensor) -> Tensor:
        x, link = graph[..., : self.features], graph[..., self.features :]
        x = self.act(self.enter(x))
        for own, heard in zip(self.own, self.heard, strict=True):
            x = self.act(own(x) + heard(link @ x))
        return self.leave(x)


class Hourglass(nn.Module):
    """A small U-Net with group norm: the noise-free image of a noisy one."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.down1, self.down2 = self._block(1, width), self._block(width, 2 * width, 2)
        self.middle = self._block(2 * width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join, self.paint = self._block(2 * width, width), nn.Conv2d(width, 1, 1)

    @staticmethod
    def _block(a: int, b: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(4, b), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.middle(self.down2(fine))
        return self.paint(self.join(torch.cat([fine, self.up(coarse)], 1)))


class BagOfWords(nn.Module):
    def __init__(self, vocab: int = 200, dim: int = 24, classes: int = 5):
        super().__init__()
        self.words = nn.EmbeddingBag(vocab, dim, mode="mean")
        self.hidden, self.act, self.topic = nn.Linear(dim, 32), nn.ReLU(), nn.Linear(32, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.topic(self.act(self.hidden(self.words(ids))))


class TwoTasks(nn.Module):
    """One trunk, a number and a class."""

    def __init__(self, features: int = 20):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(features, 64), nn.ELU(), nn.Linear(64, 64), nn.ELU())
        self.number = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
        self.kind = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return torch.cat([self.number(x), self.kind(x)], 1)
