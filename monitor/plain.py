"""The loops over elements in plain numpy: exact, slower, a block at a time; `kernels` tells when they run."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .summary import Floats, Ints, Summary, quantiles

#: Elements that are converted at once: they stay in the cache, and no transient copy is large.
BLOCK = 1 << 13
#: The top bits of a double: sign, 11 of exponent, two of mantissa. The histogram's index.
_TOP = 14
#: The index of 2^-127, where bucket numbers begin; and of infinity.
_ZERO, _INFINITE = 4 * (1023 - 127), 4 * 2047


def _blocks(*arrays: NDArray) -> Iterator[list[NDArray[np.float64]]]:
    for start in range(0, arrays[0].size, BLOCK):
        yield [np.asarray(a[start : start + BLOCK], np.float64) for a in arrays]


@np.errstate(all="ignore")
def summarise(x: Floats) -> Summary:
    """`summary.summarise` of a flat array, without sorting it."""
    histogram = np.zeros(1 << _TOP, np.int64)
    found = Summary(count=x.size)
    for (block,) in _blocks(x):
        index = (block.view(np.uint64) >> np.uint64(64 - _TOP)).astype(np.int64)
        here = np.bincount(index, minlength=histogram.size)
        histogram += here
        if here[_INFINITE : _INFINITE + 4].any() or here[-4:].any():
            found.nans += int(np.isnan(block).sum())
            found.pos_infs += int(np.isposinf(block).sum())
            found.neg_infs += int(np.isneginf(block).sum())
            block = block[np.isfinite(block)]
        if block.size:
            found.sum += float(block.sum())
            found.sum_sq += float(block @ block)
            found.min, found.max = min(found.min, float(block.min())), max(found.max, float(block.max()))
            found.zeros += int((block == 0).sum())
    half = histogram.size // 2
    positive, negative = histogram[_ZERO + 4 : _INFINITE], histogram[half + _ZERO + 4 : half + _INFINITE]
    counts = np.concatenate([negative[::-1], positive])
    size = np.arange(4, 4 + positive.size, dtype=np.int16)
    some = counts > 0
    found.buckets, found.counts = np.concatenate([-size[::-1], size])[some], counts[some]
    found.subnormals = found.finite - found.zeros - int(found.counts.sum())
    return found


@np.errstate(all="ignore")
def change(before: Floats, after: Floats, gradient: Floats | None) -> tuple[Floats, float, float, int | None]:
    """after - before; <before, after - before>; |before|^2; elements that did not change although their
    gradient is not zero (None without one). All flat, of one dtype."""
    difference, dot, squares = after - before, 0.0, 0.0
    for b, d in _blocks(before, difference):
        dot += float(b @ d)
        squares += float(b @ b)
    lost = None if gradient is None else int(((after == before) & (gradient != 0)).sum())
    return difference, dot, squares, lost


@np.errstate(all="ignore")
def distance(now: Floats, reference: NDArray) -> tuple[float, float, float, int]:
    """|now - reference|^2, <now, reference>, |reference|^2, sign flips (a zero has no sign).

    Both are flat (n,); a reference of int16 is the bits of bfloat16.
    """
    total = dot = squares = 0.0
    flips = 0
    for start in range(0, now.size, BLOCK):
        r = reference[start : start + BLOCK]
        if r.dtype == np.int16:
            r = (r.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
        r, w = r.astype(np.float64), now[start : start + BLOCK].astype(np.float64)
        apart = w - r
        total += float(apart @ apart)
        dot += float(w @ r)
        squares += float(r @ r)
        flips += int(((np.signbit(w) != np.signbit(r)) & (w != 0) & (r != 0)).sum())
    return total, dot, squares, flips


@np.errstate(all="ignore")
def moment_ratios(v: Floats, gradient: Floats, correction: float, eps: float) -> tuple[float, int]:
    """Sum of (g / max(sqrt(v / correction), eps))^2, ratios that are not finite left out; the number of
    sqrt(v / correction) < eps. Flat; without a gradient (of no elements) the sum is 0."""
    total, below, least = 0.0, 0, eps * eps
    for start in range(0, v.size, BLOCK):
        size = v[start : start + BLOCK].astype(np.float64)
        size /= correction
        below += int((size < least).sum())
        if gradient.size:
            g = gradient[start : start + BLOCK].astype(np.float64)
            np.multiply(g, g, out=g)
            np.divide(g, np.maximum(size, least, out=size), out=g)
            found = float(g.sum())
            total += found if math.isfinite(found) else float(g[np.isfinite(g)].sum())
    return total, below


def unit_counts(x: Floats, low: float, high: float, zeros: Ints, ends: Ints) -> None:
    """See `loops.unit_counts`."""
    zeros += (x == 0).sum((0, 2))
    ends += ((x < low) | (x > high)).sum((0, 2))


def active_units(x: Floats, active: NDArray[np.bool_]) -> None:
    """See `loops.active_units`."""
    active |= (x != 0).any((0, 2))


def add_sketch(x: Floats, seed: np.uint64, counters: NDArray[np.float64]) -> float:
    """See `loops.add_sketch`."""
    squares = 0.0
    for start in range(0, x.size, BLOCK):
        values = x[start : start + BLOCK].astype(np.float64)
        z = np.arange(start, start + values.size, dtype=np.uint64)
        z += seed
        z += np.uint64(0x9E3779B97F4A7C15)  # array operations wrap around without a warning
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        places = (z & np.uint64(counters.size - 1)).astype(np.int64)
        np.add.at(counters, places, np.where(z >> np.uint64(63), -values, values))
        squares += float(values @ values)
    return squares


def histogram_quantiles(
    offsets: Ints, buckets: Ints, counts: Ints, small: Ints, shares: Floats, out: Floats
) -> None:
    """See `loops.histogram_quantiles`."""
    rows = np.arange(offsets.size - 1)
    first, last = int(offsets[0]), int(offsets[-1])
    row = np.concatenate([np.repeat(rows, np.diff(offsets)), rows[small > 0]])
    bucket = np.concatenate([buckets[first:last], np.zeros(int((small > 0).sum()), buckets.dtype)])
    count = np.concatenate([counts[first:last], small[small > 0]])
    order = np.lexsort([bucket, row])
    out[:] = quantiles(row[order], bucket[order], count[order], rows.size, shares)


def crc_table() -> NDArray[np.uint32]:
    """CRC-32C (Castagnoli, reflected) of every byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ (table & np.uint32(1)) * np.uint32(0x82F63B78)
    return table


def crc32c(data: NDArray[np.uint8]) -> int:
    """CRC-32C of uint8 (n,)."""
    table, crc = crc_table().tolist(), 0xFFFFFFFF
    for byte in data.tobytes():
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF
