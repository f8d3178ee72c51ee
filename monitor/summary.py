"""Summaries that add: sufficient statistics of one tensor, and the signed log-bucket histogram.

A summary holds no mean, norm or ratio: those are derived when read. Two summaries of disjoint parts merge by
adding (min and max by min and max, the set of active units by union), so shards, ranks, layers, steps and
runs all merge with `merge`. Counts are exact; sums are exact to the rounding of a double.

Buckets: a finite value with 2^e (1 + j/4) <= |x| < 2^e (1 + (j+1)/4), j = 0..3 and e >= -126, has the bucket
number sign * (4 (e + 127) + j). Bucket numbers are ordered as the values are. Zeros and subnormals (|x| <
2^-126) are counted apart, as are NaN and infinities.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

#: Smallest magnitude that has a bucket: the smallest normal float32.
SMALLEST_NORMAL = 2.0**-126

Ints = NDArray[np.integer]
Floats = NDArray[np.floating]


def _no_buckets() -> Ints:
    return np.empty(0, np.int16)


def _no_counts() -> Ints:
    return np.empty(0, np.int64)


@dataclass(slots=True)  # not frozen: making one is on the hot path, and frozen ones take four times as long
class Summary:
    """Statistics of one tensor. `schema.STATS` describes every field; None where it does not apply."""

    count: int = 0
    sum: float = 0.0
    sum_sq: float = 0.0
    min: float = math.inf
    max: float = -math.inf
    zeros: int = 0
    subnormals: int = 0
    nans: int = 0
    pos_infs: int = 0
    neg_infs: int = 0
    buckets: Ints = field(default_factory=_no_buckets)
    counts: Ints = field(default_factory=_no_counts)
    captures: int = 1
    ref_sum_sq: float | None = None
    dot: float | None = None
    residual_sq: float | None = None
    sign_flips: int | None = None
    lost: int | None = None
    samples: int | None = None
    units: int | None = None
    active: bytes | None = None

    @property
    def finite(self) -> int:
        """Number of finite elements."""
        return self.count - self.nans - self.pos_infs - self.neg_infs

    @property
    def mean(self) -> float:
        """Mean of the finite elements; NaN when there is none."""
        return self.sum / self.finite if self.finite else math.nan

    @property
    def std(self) -> float:
        """Standard deviation of the finite elements, divided by n; NaN when there is none."""
        return math.sqrt(max(0.0, self.sum_sq / self.finite - self.mean**2)) if self.finite else math.nan

    @property
    def norm(self) -> float:
        """L2 norm of the finite elements; of several pooled captures the root mean square of their norms."""
        return math.sqrt(self.sum_sq / max(self.captures, 1))

    def __add__(self, other: Summary) -> Summary:
        return merge([self, other])


def summarise(values: Floats) -> Summary:
    """Summary of an array of any shape, in numpy: the plain definition that the compiled kernels are tested
    against.

    >>> summarise(np.array([1.0, -2.0, 0.0])).norm ** 2
    5.000000000000001
    """
    x = np.asarray(values, np.float64).ravel()
    finite = x[np.isfinite(x)]
    buckets, counts = np.unique(bucket_of(finite[np.abs(finite) >= SMALLEST_NORMAL]), return_counts=True)
    zeros = int((finite == 0).sum())
    return Summary(
        count=x.size,
        sum=float(finite.sum()),
        sum_sq=float(np.square(finite).sum()),
        min=float(finite.min()) if finite.size else math.inf,
        max=float(finite.max()) if finite.size else -math.inf,
        zeros=zeros,
        subnormals=int((np.abs(finite) < SMALLEST_NORMAL).sum()) - zeros,
        nans=int(np.isnan(x).sum()),
        pos_infs=int(np.isposinf(x).sum()),
        neg_infs=int(np.isneginf(x).sum()),
        buckets=buckets.astype(np.int16),
        counts=counts.astype(np.int64),
    )


def bucket_of(values: Floats) -> Ints:
    """Bucket number of each finite value with |x| >= 2^-126 (int64, same shape)."""
    mantissa, exponent = np.frexp(np.abs(values))  # |x| = m 2^e, 1/2 <= m < 1
    sub = np.floor((2 * mantissa - 1) * 4).astype(np.int64)
    return np.sign(values).astype(np.int64) * (4 * (exponent.astype(np.int64) - 1 + 127) + sub)


def bucket_edges(buckets: Ints) -> tuple[Floats, Floats]:
    """Lower and upper edge of each bucket, low < high; bucket 0 stands for zero: (0, 0)."""
    b = np.asarray(buckets, np.int64)
    size = np.abs(b)
    scale = np.ldexp(1.0, (size >> 2) - 127)
    inner = scale * (1 + (size & 3) / 4)
    # The outermost bucket of float64 would end at 2^1024: stop at the largest double.
    with np.errstate(over="ignore"):
        outer = np.minimum(scale * (1 + ((size & 3) + 1) / 4), np.finfo(np.float64).max)
    zero = b == 0
    low = np.where(zero, 0.0, np.where(b > 0, inner, -outer))
    high = np.where(zero, 0.0, np.where(b > 0, outer, -inner))
    return low, high


def merge(parts: Iterable[Summary], *, captures: bool = False) -> Summary:
    """The summary of the union of disjoint parts.

    Args:
        parts: summaries of shards of one tensor, or of several tensors.
        captures: the parts are captures of the same tensor at different steps: pool them (`captures` adds
            up).

    Raises:
        ValueError: there is no part.
    """
    items = list(parts)
    if not items:
        raise ValueError("expected at least one summary to merge, got none")
    numbers = np.concatenate([s.buckets for s in items]).astype(np.int64)
    counts = np.concatenate([s.counts for s in items]).astype(np.int64)
    buckets, where = np.unique(numbers, return_inverse=True)
    pooled = np.zeros(buckets.size, np.int64)
    np.add.at(pooled, where, counts)
    added = {
        name: sum(getattr(s, name) for s in items)
        for name in ("count", "sum", "sum_sq", "zeros", "subnormals", "nans", "pos_infs", "neg_infs")
    }
    optional = {
        name: _add([getattr(s, name) for s in items])
        for name in ("ref_sum_sq", "dot", "residual_sq", "sign_flips", "lost", "samples")
    }
    units, active = _units(items)
    return replace(
        items[0],
        **added,
        **optional,
        min=min(s.min for s in items),
        max=max(s.max for s in items),
        buckets=buckets.astype(np.int16),
        counts=pooled,
        captures=sum(s.captures for s in items) if captures else max(s.captures for s in items),
        units=units,
        active=active,
    )


def _add(values: list) -> float | int | None:
    return None if any(v is None for v in values) else sum(values)


def _units(items: list[Summary]) -> tuple[int | None, bytes | None]:
    """Parts that saw the same units: a unit is active when it was in any part."""
    if any(s.active is None or s.units != items[0].units for s in items):
        return None, None
    bits = np.bitwise_or.reduce([np.frombuffer(s.active or b"", np.uint8) for s in items])
    return items[0].units, bits.tobytes()


def quantiles(row: Ints, bucket: Ints, count: Ints, rows: int, shares: Iterable[float]) -> Floats:
    """Quantiles of many histograms at once, by linear interpolation inside a bucket.

    Args:
        row, bucket, count: one entry per non-empty bucket, of equal length, sorted by row, then bucket.
        rows: number of histograms. shares: the wanted shares in [0, 1].

    Returns:
        float64 (rows, len(shares)); NaN for an empty histogram. The error is at most the bucket's width (a
        factor 1.25).
    """
    wanted = np.asarray(list(shares), np.float64)
    totals = np.bincount(row, weights=count, minlength=rows)
    result = np.full((rows, wanted.size), np.nan)
    if bucket.size == 0:
        return result
    upto = np.cumsum(count).astype(np.float64)
    before = np.concatenate([[0.0], np.cumsum(totals)[:-1]])
    last = np.searchsorted(row, np.arange(rows), side="right") - 1
    low, high = bucket_edges(bucket)
    for column, share in enumerate(wanted):
        target = before + share * totals
        # Right of ties: a quantile that falls between two buckets belongs to the upper one, except at the
        # end.
        index = np.minimum(np.searchsorted(upto, target, side="right"), np.maximum(last, 0))
        inside = np.clip((target - (upto[index] - count[index])) / count[index], 0.0, 1.0)
        value = low[index] + inside * (high[index] - low[index])
        result[:, column] = np.where(totals > 0, value, np.nan)
    return result
