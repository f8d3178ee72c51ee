"""How a tensor moved from one state to another: sums that add, and what is derived of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import WeightsError
from ..kernels import Kernel
from ..summary import bucket_edges
from .source import BLOCK, Weights, decoded

#: As in `pair_loops`.
_SUM_A, _SUM_B, _SQUARES_A, _SQUARES_B, _SQUARES, _LARGEST = range(6)
_FLIPS, _CHANGED, _BROKEN = range(3)
_BUCKETS = 2048
_INFINITE = 255 << 2

_NO_TABLE = np.empty(0, np.float32)
#: What the loop looks codes of 16 bits up in; bfloat16 it knows by itself.
_TABLES = {
    "bfloat16": np.zeros(1, np.float32),
    "float16": np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32),
}


@dataclass
class Change:
    """Sufficient statistics of b - a; those of disjoint parts add. Pairs of which one is not finite are
    counted in `broken` and left out of all else.

    Attributes:
        numbers: sum a, sum b, |a|^2, |b|^2, |b - a|^2, max |b - a|.
        counters: signs that flipped, elements that changed at all, broken pairs.
        histogram: (2048,) of b - a by the upper 11 bits of its float32.
    """

    elements: int = 0
    numbers: NDArray[np.float64] = field(default_factory=lambda: np.zeros(6))
    counters: NDArray[np.int64] = field(default_factory=lambda: np.zeros(3, np.int64))
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BUCKETS, np.int64))

    def __add__(self, other: Change) -> Change:
        numbers = self.numbers + other.numbers
        numbers[_LARGEST] = max(self.numbers[_LARGEST], other.numbers[_LARGEST])
        return Change(
            self.elements + other.elements, numbers, self.counters + other.counters,
            self.histogram + other.histogram,
        )  # fmt: skip

    @property
    def distance(self) -> float:
        """|b - a|, the Frobenius norm."""
        return math.sqrt(self.numbers[_SQUARES])

    @property
    def norm_a(self) -> float:
        return math.sqrt(self.numbers[_SQUARES_A])

    @property
    def norm_b(self) -> float:
        return math.sqrt(self.numbers[_SQUARES_B])

    def facts(self) -> dict[str, Any]:
        """What a reader wants to know. None where it is not defined: relative to a tensor of zeros, of no
        finite pair."""
        whole = self.elements - int(self.counters[_BROKEN])
        if not whole:
            nothing = dict.fromkeys(_MEASURES)
            return nothing | {"elements": self.elements, "not_finite": int(self.counters[_BROKEN])}
        n = self.numbers
        dot = (n[_SQUARES_A] + n[_SQUARES_B] - n[_SQUARES]) / 2
        both = math.sqrt(n[_SQUARES_A] * n[_SQUARES_B])
        mean_a, mean_b = n[_SUM_A] / whole, n[_SUM_B] / whole
        return {
            "elements": self.elements,
            "not_finite": int(self.counters[_BROKEN]),
            "relative_l2": self.distance / self.norm_a if n[_SQUARES_A] > 0 else None,
            "distance": self.distance,
            "cosine": max(-1.0, min(1.0, dot / both)) if both > 0 else None,
            "max_abs_change": float(n[_LARGEST]),
            "sign_flips": int(self.counters[_FLIPS]),
            "share_changed": int(self.counters[_CHANGED]) / whole,
            "norm_a": self.norm_a,
            "norm_b": self.norm_b,
            "mean_a": float(mean_a),
            "mean_b": float(mean_b),
            "std_a": _std(n[_SQUARES_A], mean_a, whole),
            "std_b": _std(n[_SQUARES_B], mean_b, whole),
        }

    def buckets(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Histogram of b - a over the finite pairs: low, high, count, ascending; the row (0, 0) counts
        elements that did not change. Four buckets an octave, exact but for rounding to float32."""
        counts = self.histogram.copy()
        half = _BUCKETS // 2
        still = self.elements - int(self.counters[_CHANGED]) - int(self.counters[_BROKEN])
        positive, negative = counts[:half], counts[half:]
        # Changes too small for float32, or subnormal, are next to zero, but no zeros: the smallest bucket.
        tiny = int(positive[:4].sum() + negative[:4].sum()) - still - int(self.counters[_BROKEN])
        positive[:4] = negative[:4] = 0
        positive[4] += max(tiny, 0)
        size = np.arange(half)
        numbers = np.concatenate([-size[:0:-1], size])
        found = np.concatenate([negative[:0:-1], positive])
        found[half - 1] = still
        some = found > 0
        low, high = bucket_edges(np.clip(numbers[some], -_INFINITE, _INFINITE))
        return low, high, found[some]


#: What `Change.facts` tells of a tensor, besides counts.
_MEASURES = (
    "relative_l2", "distance", "cosine", "max_abs_change", "sign_flips", "share_changed", "norm_a", "norm_b",
    "mean_a", "mean_b", "std_a", "std_b",
)  # fmt: skip


def _std(squares: float, mean: float, count: int) -> float:
    return math.sqrt(max(squares / count - mean * mean, 0.0))


def _meant(codes: NDArray[Any], table: NDArray[np.float32], kind: type) -> NDArray[np.floating]:
    if table.size == 1:
        return decoded(codes, "bfloat16").astype(kind)
    return (table[codes] if table.size else codes).astype(kind)


def compare_plain(
    a: NDArray[Any], table_a: NDArray, b: NDArray[Any], table_b: NDArray,
    numbers: NDArray[np.float64], counters: NDArray[np.int64], histogram: NDArray[np.int64],
) -> None:  # fmt: skip
    """`pair_loops.compare` in numpy; takes float64, too."""
    x, y = _meant(a, table_a, np.float64), _meant(b, table_b, np.float64)
    whole = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(whole, x, 0.0), np.where(whole, y, 0.0)
    with np.errstate(over="ignore", under="ignore"):
        d = y - x
        small = d.astype(np.float32)
    numbers[:_LARGEST] += [x.sum(), y.sum(), x @ x, y @ y, d @ d]
    numbers[_LARGEST] = max(numbers[_LARGEST], np.abs(d).max(initial=0.0))
    counters += [((x < 0) & (y > 0) | (x > 0) & (y < 0)).sum(), (x != y).sum(), (~whole).sum()]
    histogram += np.bincount(small.view(np.uint32) >> 21, minlength=_BUCKETS)


_compare = Kernel("weights.pair_loops", "compare", compare_plain)


def change_of(a: tuple[NDArray, NDArray], b: tuple[NDArray, NDArray]) -> Change:
    """The change between two blocks of equal size, each with the table that tells what its codes mean."""
    found, pair = Change(len(a[0])), [a, b]
    if a[0].dtype != b[0].dtype:  # the loop is compiled for pairs of one type, and not for float64
        wide = any(values.dtype == np.float64 for values, _ in pair)
        pair = [(_meant(x, table, np.float64 if wide else np.float32), _NO_TABLE) for x, table in pair]
    _compare(*pair[0], *pair[1], found.numbers, found.counters, found.histogram)
    return found


def coded(weights: Weights, name: str, start: int, stop: int) -> tuple[NDArray, NDArray]:
    """Elements of a tensor, as they are stored where the loop can look up what they mean: float32 or float64
    else."""
    kind = weights.entries[name].dtype
    if weights.computed or kind not in _TABLES:
        return weights.values(name, start, stop), _NO_TABLE
    stored = weights.stored(name, start, stop)
    return stored.view(np.uint16) if kind == "float16" else stored, _TABLES[kind]


#: Two tensors to compare, of equal shape: stored names in a and b.
Pair = tuple[str, str]


def changes(
    a: Weights, b: Weights, pairs: Sequence[Pair], threads: int = 2
) -> Iterator[tuple[Pair, Change | WeightsError]]:
    """The change of each pair, in turn, or why it cannot be told: a file became unreadable meanwhile.

    Reads and compares `threads` blocks at a time: no tensor is held.
    """

    def block(pair: Pair, start: int, stop: int) -> Change:
        return change_of(coded(a, pair[0], start, stop), coded(b, pair[1], start, stop))

    blocks = chain.from_iterable(
        ((pair, start, stop) for start, stop in _cut(a.entries[pair[0]].numbers)) for pair in pairs
    )
    waiting: list[tuple[Pair, Future[Change]]] = []
    whole: dict[Pair, Change | WeightsError] = {}
    with ThreadPoolExecutor(threads, "layerwatch-drift") as pool:
        try:
            for pair, start, stop in blocks:
                waiting.append((pair, pool.submit(block, pair, start, stop)))
                if len(waiting) > 2 * threads:
                    yield from _take(waiting, whole)
            while waiting:
                yield from _take(waiting, whole)
            yield from whole.items()
        finally:
            for _, future in waiting:
                future.cancel()


def _take(
    waiting: list[tuple[Pair, Future[Change]]], whole: dict[Pair, Change | WeightsError]
) -> Iterator[tuple[Pair, Change | WeightsError]]:
    """Add the oldest block to its tensor; a tensor is done once a block of the next one comes."""
    pair, future = waiting.pop(0)
    try:
        found: Change | WeightsError = future.result()
    except WeightsError as error:
        found = error
    if whole and pair not in whole:
        yield whole.popitem()
    before = whole.get(pair, Change())
    if isinstance(found, Change) and isinstance(before, Change):
        whole[pair] = before + found
    else:
        whole[pair] = before if isinstance(before, WeightsError) else found


def _cut(numbers: int) -> Iterator[tuple[int, int]]:
    for start in range(0, max(numbers, 1), BLOCK):
        yield start, min(start + BLOCK, numbers)
