"""The compiled loop of `moving`: two states of the same tensor, compared in one pass over both."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..compiled import REORDERED, kernel, part

#: Elements that are worked on at once: all buffers stay in the first-level cache.
BLOCK = 2048
#: Places in `numbers` and `counters`.
SUM_A, SUM_B, SQUARES_A, SQUARES_B, SQUARES_CHANGE, LARGEST = range(6)
FLIPS, CHANGED, BROKEN = range(3)
#: Exponent and two bits of the mantissa of a float32: 1,024 places for each sign.
BUCKETS = 2048


@part()
def _widen(stored: NDArray, table: NDArray, out: NDArray) -> None:
    """float32 as it is; bfloat16 is the upper half of a float32; other codes by what the table says."""
    if table.size == 0:
        for i in range(stored.size):
            out[i] = stored[i]
    elif table.size == 1:
        bits = out.view(np.uint32)
        for i in range(stored.size):
            bits[i] = np.uint32(np.uint32(stored[i]) << np.uint32(16))
    else:
        for i in range(stored.size):
            out[i] = table[np.int64(stored[i])]


@part(REORDERED)
def _sums(a: NDArray, b: NDArray, size: int, change: NDArray, numbers: NDArray) -> None:
    """Sums over the pairs; elements that are not finite make the squares so: the caller looks."""
    sum_a = sum_b = squares_a = squares_b = squares = 0.0
    for i in range(size):
        x, y = np.float64(a[i]), np.float64(b[i])
        d = y - x
        change[i] = np.float32(d)
        sum_a += x
        sum_b += y
        squares_a += x * x
        squares_b += y * y
        squares += d * d
    numbers[SUM_A], numbers[SUM_B], numbers[SQUARES_CHANGE] = sum_a, sum_b, squares
    numbers[SQUARES_A], numbers[SQUARES_B] = squares_a, squares_b


@part()
def _flips_and_changed(a: NDArray, b: NDArray, size: int) -> Any:
    """In lanes of 32 bits, which vectorise as wide as the values."""
    zero, flips, changed = np.float32(0), np.int32(0), np.int32(0)
    for i in range(size):
        x, y = a[i], b[i]
        changed += np.int32(x != y)
        flips += np.int32(((x < zero) & (y > zero)) | ((x > zero) & (y < zero)))
    return flips, changed


@part()
def _count(change: NDArray, size: int, lanes: NDArray) -> Any:
    """Count the changes by their upper 11 bits; returns the bits of the largest |change|: they order as
    values."""
    bits = change.view(np.int32)
    top, one = np.int32(0), np.uint32(1)
    for i in range(size):
        v = np.int32(bits[i] & np.int32(0x7FFFFFFF))
        top = v if v > top else top
    places = change.view(np.uint32)
    for i in range(
        0, size - 3, 4
    ):  # in four lanes: most changes share few buckets, and would wait for each other
        lanes[0, places[i] >> np.uint32(21)] += one
        lanes[1, places[i + 1] >> np.uint32(21)] += one
        lanes[2, places[i + 2] >> np.uint32(21)] += one
        lanes[3, places[i + 3] >> np.uint32(21)] += one
    for i in range(size - size % 4, size):
        lanes[0, places[i] >> np.uint32(21)] += one
    return top


@part()
def _leave_out(a: NDArray, b: NDArray, size: int) -> int:
    """Set pairs to zero of which one is not finite; returns how many."""
    found = 0
    for i in range(size):
        if not (np.isfinite(a[i]) and np.isfinite(b[i])):
            a[i] = b[i] = np.float32(0)
            found += 1
    return found


@kernel()
def compare(
    a: NDArray,
    table_a: NDArray,
    b: NDArray,
    table_b: NDArray,
    numbers: NDArray,
    counters: NDArray,
    histogram: NDArray,
) -> None:
    """Add the comparison of b (n,) with a (n,) to what other parts have given.

    Args:
        a, b: of fewer than 2^32 elements, float32; or codes of 16 bits. Contiguous.
        table_a, table_b: what each code means, float32 (65536,); (0,) of float32, (1,) of bfloat16.
        numbers: float64 (6,). counters: int64 (3,): see the places above. `BROKEN` are pairs of which one is
            not finite; the histogram counts them as zeros, nothing else does.
        histogram: int64 (BUCKETS,) of b - a in float32, by its upper 11 bits.
    """
    x, y, change = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    found, lanes = np.empty(5), np.zeros((4, BUCKETS), np.uint32)
    top = np.int32(0)
    for start in range(0, a.size, BLOCK):
        size = min(BLOCK, a.size - start)
        _widen(a[start : start + size], table_a, x)
        _widen(b[start : start + size], table_b, y)
        _sums(x, y, size, change, found)
        if not np.isfinite(found[SQUARES_A] + found[SQUARES_B]):
            counters[BROKEN] += _leave_out(x, y, size)
            _sums(x, y, size, change, found)
        for i in range(5):
            numbers[i] += found[i]
        flips, changed = _flips_and_changed(x, y, size)
        counters[FLIPS] += flips
        counters[CHANGED] += changed
        top = max(top, _count(change, size, lanes))
    for i in range(BUCKETS):
        histogram[i] += np.int64(lanes[0, i]) + lanes[1, i] + lanes[2, i] + lanes[3, i]
    largest = np.empty(1, np.int32)
    largest[0] = top
    numbers[LARGEST] = max(numbers[LARGEST], np.float64(largest.view(np.float32)[0]))
