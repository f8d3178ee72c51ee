"""Compiled loops (numba, cached on disk) for what `sweep` does not do: float64, references, quantiles.

All kernels take flat, contiguous arrays. Sums are accumulated in double.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

BLOCK = 2048
#: Indices per sign of the float64 histogram: 4 * (exponent + 127) + sub-bucket, exponents -127 .. 1024.
WIDE = 4608

#: Sums may be reordered; NaN and infinities must stay what they are.
_FLAGS = {"reassoc", "contract", "nsz", "arcp"}


def _compiled(fastmath: set[str] | bool = False) -> Callable[[Kernel], Kernel]:
    """Compile when first called; kept on disk, unless no folder can be written."""

    def compile_(kernel: Kernel) -> Kernel:
        try:
            return njit(cache=True, nogil=True, fastmath=fastmath)(kernel)  # type: ignore[return-value]
        except RuntimeError:  # a read-only installation without a home: compile in every process
            return njit(nogil=True, fastmath=fastmath)(kernel)  # type: ignore[return-value]

    return compile_


@_compiled()
def _slow_moments(x: NDArray, start: int, end: int, out: NDArray) -> None:
    """Add the moments of x[start:end] to out (see `summarise64`), NaN and infinities counted apart."""
    for i in range(start, end):
        v = np.float64(x[i])
        if np.isnan(v):
            out[5] += 1
        elif np.isinf(v):
            if v > 0:
                out[6] += 1
            else:
                out[7] += 1
        else:
            out[0] += v
            out[1] += v * v
            out[2] = min(out[2], v)
            out[3] = max(out[3], v)
            if v == 0.0:
                out[4] += 1


@_compiled()
def summarise64(x: NDArray, keys: NDArray, histogram: NDArray, out: NDArray) -> None:
    """Add the statistics of a float64 array to `out` and `histogram`; of float32 `sweep` does it.

    Args:
        x: float64 (n,). keys: the same memory as int64. histogram: int64 (2 * WIDE,), second half negative.
        out: float64 (8,): sum, sum of squares, min, max, zeros, nans, +infs, -infs. min/max must start at
            +inf/-inf.
    """
    for start in range(0, x.size, BLOCK):
        end = min(start + BLOCK, x.size)
        for i in range(start, end):
            k = keys[i]
            exponent = ((k >> 52) & 0x7FF) - 1023
            if exponent >= -126:
                index = 4 * (exponent + 127) + ((k >> 50) & 3)
                histogram[index + (WIDE if k < 0 else 0)] += 1
        _slow_moments(x, start, end, out)


@_compiled(_FLAGS)
def _pair_sums(difference: NDArray, reference: NDArray) -> tuple[float, float]:
    dot = 0.0
    squares = 0.0
    for i in range(difference.size):
        r = np.float64(reference[i])
        dot += r * np.float64(difference[i])
        squares += r * r
    return dot, squares


@_compiled()
def _lost(before: NDArray, after: NDArray, gradient: NDArray, start: int, end: int) -> int:
    """Number of elements that did not change although their gradient is not zero."""
    lost = 0
    for i in range(start, end):
        lost += (after[i] == before[i]) & (gradient[i] != 0)
    return lost


@_compiled()
def update_pair(
    before: NDArray, after: NDArray, gradient: NDArray, difference: NDArray, pair: NDArray
) -> None:
    """after - before into `difference`; pair (3,): <before, difference>, |before|^2, how many were lost.

    `gradient` may be empty: then nothing is counted as lost.
    """
    for i in range(before.size):
        difference[i] = after[i] - before[i]
    pair[0], pair[1] = _pair_sums(difference, before)
    pair[2] = _lost(before, after, gradient, 0, before.size) if gradient.size == before.size else 0


@_compiled(_FLAGS)
def drift32(now: NDArray, reference: NDArray, out: NDArray) -> None:
    """out (4,): |now - reference|^2, <now, reference>, |reference|^2, sign flips; both are (n,)."""
    distance = 0.0
    dot = 0.0
    squares = 0.0
    flips = 0
    for i in range(now.size):
        w = np.float64(now[i])
        r = np.float64(reference[i])
        d = w - r
        distance += d * d
        dot += w * r
        squares += r * r
        flips += w * r < 0
    out[0] = distance
    out[1] = dot
    out[2] = squares
    out[3] = flips


@_compiled()
def drift_bf16(now: NDArray, reference_bits: NDArray, out: NDArray) -> None:
    """`drift32` against a bf16 copy of the reference, given as int16 (n,)."""
    wide = np.empty(BLOCK, np.int32)
    part = np.empty(4, np.float64)
    out[:] = 0.0
    for start in range(0, now.size, BLOCK):
        size = min(BLOCK, now.size - start)
        for i in range(size):
            wide[i] = np.int32(reference_bits[start + i]) << np.int32(16)
        drift32(now[start : start + size], wide.view(np.float32)[:size], part)
        out += part


@_compiled()
def active_rows(x: NDArray, active: NDArray) -> None:
    """active[i] |= any(x[i] != 0); x (units, k). A live row ends its search at its first nonzero element."""
    for i in range(x.shape[0]):
        if active[i]:
            continue
        for j in range(x.shape[1]):
            if x[i, j] != 0:
                active[i] = True
                break


@_compiled()
def take_buckets(
    histogram: NDArray, half: int, first: int, last: int, buckets: NDArray, counts: NDArray
) -> int:
    """Move a histogram into its sparse form, ascending by bucket number, and leave it cleared.

    Args:
        histogram: int64 (2 * half,): bucket b at index b, bucket -b at half + b.
        first, last: the bucket numbers that count, first <= |b| < last; what else was counted is dropped.
        buckets: int16, counts: int64, both with room for 2 * (last - first).

    Returns:
        How many buckets are not empty.
    """
    used = 0
    for b in range(last - 1, first - 1, -1):
        if histogram[half + b]:
            buckets[used], counts[used] = -b, histogram[half + b]
            used += 1
    for b in range(first, last):
        if histogram[b]:
            buckets[used], counts[used] = b, histogram[b]
            used += 1
    histogram[:] = 0
    return used


@_compiled()
def _edge(bucket: int, upper: bool) -> float:
    """The edge of a positive bucket nearer to zero, or the `upper` one; capped at the largest double."""
    scale = math.ldexp(1.0, (bucket >> 2) - 127)
    value = scale * (1.0 + ((bucket & 3) + (1 if upper else 0)) / 4.0)
    return min(value, 1.7976931348623157e308)


@_compiled()
def histogram_quantiles(
    offsets: NDArray, buckets: NDArray, counts: NDArray, small: NDArray, shares: NDArray, out: NDArray
) -> None:
    """`summary.quantiles` for many rows in one pass over their histograms.

    Args:
        offsets: int (rows + 1,): row r owns buckets[offsets[r]:offsets[r + 1]], ascending.
        buckets, counts: int (n,). small: int (rows,): elements that count as zero.
        shares: float64 (k,), ascending. out: float64 (rows, k), NaN where a histogram is empty.
    """
    for r in range(offsets.size - 1):
        first, last = offsets[r], offsets[r + 1]
        total = small[r]
        for i in range(first, last):
            total += counts[i]
        out[r, :] = np.nan
        if total == 0:
            continue
        k, upto, i, zero_due = 0, 0, first, small[r] > 0
        while k < shares.size and (i < last or zero_due):
            at_zero = zero_due and (i == last or buckets[i] > 0)
            if at_zero:
                count, low, high, zero_due = small[r], 0.0, 0.0, False
            else:
                count, b = counts[i], int(buckets[i])
                if b > 0:
                    low, high = _edge(b, False), _edge(b, True)
                else:
                    low, high = -_edge(-b, True), -_edge(-b, False)
                i += 1
            more = i < last or zero_due
            while k < shares.size and (shares[k] * total < upto + count or not more):
                inside = min(max((shares[k] * total - upto) / count, 0.0), 1.0)
                out[r, k] = low + inside * (high - low)
                k += 1
            upto += count
