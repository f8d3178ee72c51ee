"""The compiled loops besides `sweep_loops`: units of an output, sketches, quantiles.

An output is seen as (outer, units, inner): inner is 1 where units are the last dimension (Linear), outer is
the batch and inner the positions of an image where they are the second. No loop copies or writes `x`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compiled import kernel, part
from .plain import crc_table

#: Rows are counted in int32 lanes, which vectorise as wide as the values, before they are added to int64.
ROWS = 1 << 16


@part()
def _count_columns(x: NDArray, low: Any, high: Any, zeros: NDArray, ends: NDArray) -> None:
    """`unit_counts` for units that lie next to each other; x (samples, units)."""
    silent = np.zeros(x.shape[1], np.int32)
    flat = np.zeros(x.shape[1], np.int32)
    for start in range(0, x.shape[0], ROWS):
        silent[:] = 0
        flat[:] = 0
        for i in range(start, min(start + ROWS, x.shape[0])):
            for j in range(x.shape[1]):
                v = x[i, j]
                silent[j] += np.int32(v == 0)
                flat[j] += np.int32((v < low) | (v > high))
        for j in range(x.shape[1]):
            zeros[j] += silent[j]
            ends[j] += flat[j]


@kernel()
def unit_counts(x: NDArray, low: Any, high: Any, zeros: NDArray, ends: NDArray) -> None:
    """Add to zeros[u] the elements of unit u that are exactly zero, to ends[u] those outside [low, high].

    Args:
        x: float32 (outer, units, inner), contiguous. zeros, ends: int64 (units,).
        low, high: of the dtype of x. NaN is neither zero nor outside.
    """
    if x.shape[2] == 1:
        _count_columns(x.reshape(x.shape[0], x.shape[1]), low, high, zeros, ends)
        return
    for i in range(x.shape[0]):
        for u in range(x.shape[1]):
            silent = np.int32(0)
            flat = np.int32(0)
            for k in range(x.shape[2]):
                v = x[i, u, k]
                silent += np.int32(v == 0)
                flat += np.int32((v < low) | (v > high))
            zeros[u] += silent
            ends[u] += flat


@kernel()
def active_units(x: NDArray, active: NDArray) -> None:
    """active[u] |= any element of unit u is not zero; x (outer, units, inner). Stops when all were seen."""
    left = 0
    for u in range(active.size):
        left += not active[u]
    for i in range(x.shape[0]):
        if left == 0:
            return
        for u in range(x.shape[1]):
            if active[u]:
                continue
            for k in range(x.shape[2]):
                if x[i, u, k] != 0:
                    active[u] = True
                    left -= 1
                    break


_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31, _63 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(63)
_BLOCK = 1024


@part()
def _hash(seed: np.uint64, out: NDArray) -> None:
    """splitmix64 (Steele, Lea, Flood 2014; Vigna's constants) of seed, seed + 1, ... into out (uint64)."""
    for i in range(out.size):
        z = seed + np.uint64(i) + _STEP
        z = (z ^ (z >> _30)) * _FIRST
        z = (z ^ (z >> _27)) * _SECOND
        out[i] = z ^ (z >> _31)


@kernel()
def add_sketch(x: NDArray, seed: np.uint64, counters: NDArray) -> float:
    """Add the sketch of x (n,), whose first element hashes from `seed`, to counters (m,), m a power of 2.

    Returns |x|^2.
    """
    squares = 0.0
    mask = np.uint64(counters.size - 1)
    hashes = np.empty(_BLOCK, np.uint64)
    for start in range(0, x.size, _BLOCK):
        size = min(_BLOCK, x.size - start)
        _hash(seed + np.uint64(start), hashes[:size])
        for i in range(size):
            z = hashes[i]
            sign = 1.0 - 2.0 * np.float64(np.int64(z >> _63))  # a branch would be guessed wrong half the time
            v = np.float64(x[start + i])
            counters[z & mask] += sign * v
            squares += v * v
    return squares


@part()
def _edge(bucket: int, upper: bool) -> float:
    """The edge of a positive bucket nearer to zero, or the `upper` one; capped at the largest double."""
    scale = math.ldexp(1.0, (bucket >> 2) - 127)
    value = scale * (1.0 + ((bucket & 3) + (1 if upper else 0)) / 4.0)
    return min(value, 1.7976931348623157e308)


@kernel()
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


#: CRC-32C (Castagnoli) of every byte, reflected.
CRC_TABLE = crc_table()


@kernel()
def crc32c(data: NDArray[np.uint8]) -> int:
    """CRC-32C of uint8 (n,), contiguous."""
    crc = np.uint32(0xFFFFFFFF)
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & np.uint32(0xFF)] ^ (crc >> np.uint32(8))
    return crc ^ np.uint32(0xFFFFFFFF)
