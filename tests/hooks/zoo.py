"""Models of every common make, each with a batch and an optimizer that suits it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

Optimizer = torch.optim.Optimizer


@dataclass(frozen=True)
class Entry:
    """How to build a model, its data for a step, and its optimizer."""

    build: Callable[[], nn.Module]
    data: Callable[[torch.Generator], Any]
    optimizer: Callable[[Any], Optimizer] = lambda p: torch.optim.AdamW(p, 1e-2)


class Net(nn.Module):
    """A model from its parts and a function of them."""

    def __init__(self, forward: Callable[[Any, Any], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Any) -> Tensor:
        return self._forward(self, x)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(5, dtype=torch.cfloat))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=8))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            self.encoder(
                self.embed(x), is_causal=True, mask=nn.Transformer.generate_square_subsequent_mask(6)
            )
        )


class LoRA(nn.Module):
    """A frozen layer with a trained low-rank addition whose second half starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.lora_A = nn.Linear(8, 2, bias=False)
        self.lora_B = nn.Linear(2, 8, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


class Quantised(nn.Module):
    """Stored in eight bits, frozen, with a trained scale: only counted."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = nn.Parameter((torch.randn(8, 8) * 20).clamp(-100, 100).to(dtype), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(0.05))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x @ self.packed.float() * self.scale)


class Views(nn.Module):
    """Parameters whose memory is not in order: transposed, with gaps, and one value for all (frozen)."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(6, 8).t())
        self.gaps = nn.Parameter(torch.randn(6, 12)[:, ::3])
        self.shared = nn.Parameter(torch.randn(1, 4).expand(16, 4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.turned @ self.gaps + self.shared


class Small(nn.Module):
    """A scalar, one element, and none at all."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.one = nn.Parameter(torch.ones(1))
        self.none = nn.Parameter(torch.empty(0, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.scalar + self.one) + (x @ self.none.t()).sum()


class Tied(nn.Module):
    """The embedding is the output layer as well: two gradients add up in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)))


def _vector(g: torch.Generator) -> Tensor:
    return torch.randn(16, 8, generator=g)


def _image(g: torch.Generator) -> Tensor:
    return torch.randn(4, 3, 10, 10, generator=g)


def _tokens(g: torch.Generator) -> Tensor:
    return torch.randint(0, 20, (4, 6), generator=g)


def _mlp(**kind: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16, **kind), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2, **kind))


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 2)
    )


def _sgd(p: Any) -> Optimizer:
    return torch.optim.SGD(p, 1e-2, momentum=0.9)


def _lstm() -> nn.Module:
    parts = {"lstm": nn.LSTM(8, 6, 2, dropout=0.1), "head": nn.Linear(6, 2)}
    return Net(lambda m, x: m.head(m.lstm(x)[0]), **parts)


def _mixed() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4).double(), Net(lambda m, x: x.float()), nn.Linear(4, 2))


def _around(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.ReLU(), nn.Linear(4, 2))


def _old(normalise: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return _around(normalise(nn.Linear(8, 4)))


def _checkpointed() -> nn.Module:
    body = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    return Net(
        lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=False)), body=body, head=nn.Linear(8, 2)
    )


def _sparse_embedding() -> nn.Module:
    return Net(lambda m, x: m.embed(x), embed=nn.Embedding(20, 4, sparse=True))


def _embedding_bag() -> nn.Module:
    return Net(lambda m, x: m.bag(x), bag=nn.EmbeddingBag(20, 4, sparse=True))


ZOO = {
    "mlp with dropout": Entry(_mlp, _vector),
    "conv with batch norm": Entry(_conv, _image),
    "channels last": Entry(
        lambda: _conv().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        lambda g: _image(g).to(memory_format=torch.channels_last),
        _sgd,
    ),
    "lstm": Entry(_lstm, lambda g: torch.randn(5, 4, 8, generator=g)),
    "transformer": Entry(Attention, _tokens),
    "sparse embedding": Entry(_sparse_embedding, _tokens, lambda p: torch.optim.SparseAdam(p, 1e-2)),
    "embedding bag": Entry(_embedding_bag, _tokens, lambda p: torch.optim.SGD(p, 0.1)),
    "complex": Entry(Complex, _vector),
    "complex128": Entry(lambda: Complex().double(), lambda g: _vector(g).double()),
    "float64": Entry(lambda: _mlp(dtype=torch.float64), lambda g: _vector(g).double()),
    "bfloat16": Entry(lambda: _mlp(dtype=torch.bfloat16), lambda g: _vector(g).bfloat16()),
    "float16": Entry(lambda: _mlp(dtype=torch.float16), lambda g: _vector(g).half(), _sgd),
    "mixed": Entry(_mixed, lambda g: _vector(g).double()),
    "lazy": Entry(lambda: nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2)), _vector, _sgd),
    "spectral norm": Entry(lambda: _around(parametrizations.spectral_norm(nn.Linear(8, 4))), _vector),
    "weight norm": Entry(lambda: _around(parametrizations.weight_norm(nn.Linear(8, 4))), _vector),
    "old spectral norm": Entry(lambda: _old(spectral_norm), _vector),
    "old weight norm": Entry(lambda: _old(weight_norm), _vector),
    "orthogonal": Entry(lambda: _around(parametrizations.orthogonal(nn.Linear(8, 4))), _vector),
    "tied": Entry(Tied, _tokens),
    "views": Entry(Views, _vector),
    "small": Entry(Small, _vector),
    "int8": Entry(lambda: Quantised(torch.int8), _vector),
    "float8": Entry(lambda: Quantised(torch.float8_e4m3fn), _vector),
    "lora": Entry(LoRA, _vector),
    "checkpointed": Entry(_checkpointed, _vector),
}


def train_entry(
    entry: Entry, steps: int = 5, *, seed: int = 0, model: nn.Module | None = None,
    on_ready: Callable[[nn.Module, Optimizer], Any] | None = None,
) -> nn.Module:  # fmt: skip
    """Build (or take) the model and train it: the same seed gives the same weights."""
    torch.manual_seed(seed)
    model = entry.build() if model is None else model
    optimizer = entry.optimizer(model.parameters())
    if on_ready is not None:
        on_ready(model, optimizer)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(entry.data(generator))
        (output.float() - 1).square().mean().backward()
        optimizer.step()
    return model
