"""What attention attends to: the entropy of its weights and the size of its logits, per head.

Pure functions on a sample of the attention matrix: a few samples of the batch, all heads, up to 64 queries
spread evenly, all keys. Nothing draws a random number, no result depends on a device's number being read.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: Of each call at most so many samples, queries of each, and scores (more if heads times keys are very many).
SAMPLES, QUERIES, SCORES = 4, 64, 1 << 15
#: Scores (or additive masks) down here are masked: models use -1e4, -1e9, the smallest number or -inf.
HIDDEN = -5000.0
#: Names under which modules keep how many heads they have.
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")


class Sample(NamedTuple):
    """A part of an attention matrix, (samples, heads, queries, keys).

    `logits` scaled q k^T; None where only the weights are known. `weights` sum to one over the keys.
    `visible` marks the keys that a query may attend to (broadcasts), None for all; `keys` counts them.
    """

    logits: Tensor | None
    weights: Tensor
    visible: Tensor | None
    keys: Tensor


class Reading(NamedTuple):
    """Numbers of a sample; tensors stay where they were computed.

    `values` of any shape, zero where they do not count. `heads`: (2, heads) sum and number of the values that
    count, or (1, heads) the largest. `edges`: smallest and largest, and how many do not count.
    """

    values: Tensor
    heads: Tensor
    edges: Tensor


def heads_of(module: nn.Module | None) -> int:
    """How many heads a module says it has; 1 when it does not."""
    for name in _HEADS:
        heads = getattr(module, name, None)
        if isinstance(heads, int) and heads > 0:
            return heads
    return 1


def of_scaled_dot_product(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *, heads: int = 1,
) -> Sample:  # fmt: skip
    """A sample of what `torch.nn.functional.scaled_dot_product_attention` computes from these inputs.

    Args:
        query: (..., heads, L, E), or (N * heads, L, E) with `heads` given. key: (..., heads or fewer, S, E).
        others: as torch documents them; `value` and `dropout_p` do not matter.
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3])
    rows, columns = query.shape[-2], key.shape[-2]
    query, key = (_with_heads(t.detach().expand(*lead, *t.shape[-3:]), heads) for t in (query, key))
    samples, queries = _sizes(query.shape[0], query.shape[1], rows, columns)
    asked = _spread(rows, queries, query.device)
    query = _widened(_thin(query, samples).index_select(-2, asked))
    key = _widened(_thin(key, samples))
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = (query * scale) @ key.transpose(-2, -1)
    visible, total = None, logits
    if is_causal:
        visible = torch.arange(columns, device=asked.device) <= asked[:, None]
    if attn_mask is not None:
        whole = attn_mask.detach().expand(torch.broadcast_shapes(attn_mask.shape, (*lead, 1, rows, columns)))
        mask = _thin(_with_heads(whole, heads), samples).index_select(-2, asked)
        if mask.dtype != torch.bool:
            total = logits + mask
            mask = ~(mask <= HIDDEN)
        visible = mask if visible is None else mask & visible
    return _sample(logits, total, visible)


def of_softmax(scores: Tensor, heads: int = 1) -> Sample:
    """A sample of softmax(scores) over the last dimension; scores below `HIDDEN` are masked."""
    scores = _widened(_part(scores, heads))
    visible = ~(scores <= HIDDEN)  # NaN is no mask
    return _sample(scores, scores, visible)


def of_weights(weights: Tensor, heads: int = 1) -> Sample:
    """A sample of weights whose scores are unknown.

    Masked keys can only be guessed: those that no head and no sampled query of a sample gives any weight, and
    those after the query if all of them have none. A query that seems to see one key only, and is not the
    first of a causal mask, has collapsed on it: it counts as one that sees all.
    """
    rows, columns = weights.shape[-2:]
    part = _widened(_part(weights, heads))
    asked = _spread(rows, part.shape[-2], part.device)
    some = part > 0
    visible = some.any(dim=(1, 2), keepdim=True)
    first = torch.zeros_like(asked, dtype=torch.bool)
    if rows == columns:
        later = torch.arange(columns, device=part.device) > asked[:, None]
        causal = ~(some & later).any()
        visible = visible & ~(later & causal)
        first = (asked == 0) & causal
    keys = visible.expand(part.shape).sum(-1)
    return Sample(None, part, visible, torch.where((keys < 2) & ~first, columns, keys))


def tolerance(dtype: torch.dtype) -> float:
    """Rows of attention weights sum to one, up to this; in half precision each of the weights is rounded."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 2e-2


def sums_to_one(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether no weight is negative and each row sums to one: a boolean on the weights' device."""
    return (weights >= 0).all() & ((weights.sum(-1) - 1).abs() <= tolerance(dtype)).all()


def entropy(sample: Sample) -> Reading:
    """-sum p log p of each query, divided by log(number of keys it may attend to): 0 is a hard choice, 1 is
    uniform. Queries that see fewer than two keys have none.
    """
    values = torch.special.entr(sample.weights).sum(-1) / torch.log(sample.keys)
    values = values.clamp(0.0, 1.0)  # rounding may leave 1.0000001
    counts = sample.keys >= 2
    values = torch.where(counts, values, 0.0)
    finite = counts & values.isfinite()
    heads = torch.stack([torch.where(finite, values, 0.0).sum((0, 2)), finite.sum((0, 2))])
    low, high = (torch.where(finite, values, end) for end in (math.inf, -math.inf))
    return Reading(values, heads, torch.stack([low.amin(), high.amax(), (~counts).sum()]))


def logits(sample: Sample) -> Reading | None:
    """The scaled logits of the keys that each query may attend to; None where only weights are known."""
    values = sample.logits
    if values is None:
        return None
    low = high = values
    hidden = torch.zeros((), device=values.device)
    if sample.visible is not None:
        low, high = (torch.where(sample.visible, values, end) for end in (math.inf, -math.inf))
        values = torch.where(sample.visible, values, 0.0)
        hidden = values.numel() - sample.keys.sum()
    return Reading(values, high.amax((0, 2, 3))[None], torch.stack([low.amin(), high.amax(), hidden]))


def _sample(logits: Tensor, total: Tensor, visible: Tensor | None) -> Sample:
    # torch.special.softmax is no softmax that `functions` listens to.
    if visible is None:
        keys = torch.full((1,), logits.shape[-1], device=logits.device)
        return Sample(logits, torch.special.softmax(total, -1), None, keys.expand(logits.shape[:-1]))
    weights = torch.special.softmax(torch.where(visible, total, -math.inf), -1)
    return Sample(logits, weights, visible, visible.sum(-1).expand(logits.shape[:-1]))


def _with_heads(x: Tensor, heads: int) -> Tensor:
    """(N, heads, rows, columns) of any layout with rows and columns last."""
    if x.ndim == 2:
        return x[None, None]
    if x.ndim == 3:
        split = heads > 1 and x.shape[0] % heads == 0
        return x.unflatten(0, (-1, heads)) if split else x.unsqueeze(1)
    return x if x.ndim == 4 else x.flatten(0, -4)


def _part(matrix: Tensor, heads: int) -> Tensor:
    matrix = _with_heads(matrix.detach(), heads)
    samples, queries = _sizes(*matrix.shape)
    asked = _spread(matrix.shape[-2], queries, matrix.device)
    return _thin(matrix, samples).index_select(-2, asked)


def _sizes(batch: int, heads: int, rows: int, columns: int) -> tuple[int, int]:
    """How many samples and queries of each are looked at: 16 queries of several samples tell more than 64 of
    one. Never fewer than 8 queries of one.
    """
    lines = SCORES // max(1, heads * columns)
    samples = max(1, min(batch, SAMPLES, lines // 16))
    return samples, min(rows, QUERIES, max(8, lines // samples))


def _thin(x: Tensor, samples: int) -> Tensor:
    return x[:: max(1, x.shape[0] // samples)][:samples]


def _spread(rows: int, queries: int, device: torch.device) -> Tensor:
    """Places of the queries, evenly spread, the last one among them: a causal mask hides most from the
    first.
    """
    return torch.arange(1, queries + 1, device=device) * rows // max(1, queries) - 1


def _widened(x: Tensor) -> Tensor:
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def bind(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call of scaled_dot_product_attention by name."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    return dict(zip(names, args, strict=False)) | kwargs
