"""The compiled loops of `sweep`.

All of it is one file: numba's cache looks at the file of the outermost function only (after a change of the
columns in `sweep`, touch this one). Every integer operation is cast to 32 bits, as numba widens them to 64
and halves the vectors; constants have their type by name: each call less to resolve saves compile time.
"""

# pyright: reportReturnType=false, reportCallIssue=false, reportArgumentType=false, reportPrivateImportUsage=false
# ruff: noqa: I001 (the columns would take a line each)

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy import float64, int64, uint16, uint32, uint64
from numpy.typing import NDArray

from .compiled import REORDERED, kernel, part
from .sweep import (
    ACTIVE_AT, BEFORE, BFLOAT16, BLOCK, CODES, COUNT, DOT, DRIFT_ROW, END, FIRST, FLIPS, FLOAT32, GRADIENT,
    GRADIENT_ROW, GRADIENT_TYPE, HEADROOM, LANE, LOST, MAX, MIN, NANS, NEG_INFS, PAIRED, POS_INFS,
    REF_SUM_SQ, REFERENCE, REFERENCE_TYPE, ROOM, SIGN, SUBNORMALS, SUM, SUM_SQ, UNITS, UNPAIRED, WEIGHT,
    WEIGHT_TYPE, ZEROS,
)  # fmt: skip

U16_7FFF = uint16(0x7FFF)
U32_0, U32_1, U32_8, U32_13, U32_16 = uint32(0), uint32(1), uint32(8), uint32(13), uint32(16)
U32_21, U32_24, U32_31, U32_128 = uint32(21), uint32(24), uint32(31), uint32(128)
U32_3FF, U32_7C00, U32_8000 = uint32(0x3FF), uint32(0x7C00), uint32(0x8000)
U32_7F800000, U32_FFFFFFFF = uint32(0x7F800000), uint32(0xFFFFFFFF)
U64_16, U64_32, U64_48, U64_FFFF = uint64(16), uint64(32), uint64(48), uint64(0xFFFF)


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    """An integer as an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@intrinsic
def _prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an address (any address: it never faults)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], cgutils.voidptr_t)
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(address), generate


@part()
def _widen_bfloat16(halves: NDArray, size: int, buffer: NDArray) -> None:
    for i in range(size):
        buffer[i] = uint32(uint32(halves[i]) << U32_16)


@part()
def _widen_float16(halves: NDArray, size: int, buffer: NDArray) -> None:
    values = buffer.view(np.float32)
    for i in range(size):
        buffer[i] = uint32(uint32(halves[i] & U16_7FFF) << U32_13)
    for i in range(size):
        values[i] = values[i] * np.float32(2.0**112)  # exact, for the subnormals of float16 as well
    for i in range(size):
        h = uint32(halves[i])
        special = U32_7F800000 if uint32(h & U32_7C00) == U32_7C00 else U32_0
        sign = uint32(uint32(h & U32_8000) << U32_16)
        buffer[i] = uint32(uint32(buffer[i] | special) | sign)


@part()
def _widen(address: int, stored: int, start: int, size: int, buffer: NDArray) -> None:
    """Elements start .. start + size at an address into `buffer` (uint32), as the bits of float32."""
    halves = carray(_pointer(address + 2 * start), size, np.uint16)
    if stored == BFLOAT16:
        _widen_bfloat16(halves, size, buffer)
    else:
        _widen_float16(halves, size, buffer)


@part()
def _count(bits: NDArray, size: int, index: NDArray, histogram: NDArray, ahead: int) -> None:
    """Add bits[:size] (uint32) to a histogram of two lanes; `index` (uint16) is scratch."""
    for i in range(size):
        index[i] = uint16(bits[i] >> U32_21)
    fours = index.view(np.uint64)
    mask, lane, one = U64_FFFF, uint64(LANE), U32_1
    for j in range(size // 16):
        _prefetch(ahead + 64 * j)
        for i in range(4 * j, 4 * j + 4):
            v = fours[i]
            histogram[v & mask] += one
            histogram[lane + ((v >> U64_16) & mask)] += one
            histogram[(v >> U64_32) & mask] += one
            histogram[lane + (v >> U64_48)] += one
    for i in range(size - size % 16, size):
        histogram[uint64(index[i])] += one


@part()
def _count_pairs(bits: NDArray, index: NDArray, pairs: NDArray, base: int, ahead: int, also: int) -> bool:
    """Add bits[:BLOCK] (uint32) to a table of pairs: half the increments. True when some are outside.

    An element's code has 8 bits: its sign, and its bucket above `base` up to CODES - 1; others have CODES.
    """
    low, code, furthest, half = uint32(base), uint32(CODES), U32_0, BLOCK // 2
    for i in range(half):
        a, b = bits[i], bits[i + half]
        u = uint32(uint32((a >> U32_21) & U32_3FF) - low)
        v = uint32(uint32((b >> U32_21) & U32_3FF) - low)
        furthest = u if u > furthest else furthest
        furthest = v if v > furthest else furthest
        u = code if u > code else u
        v = code if v > code else v
        u = uint32(u | uint32((a >> U32_24) & U32_128))
        v = uint32(v | uint32((b >> U32_24) & U32_128))
        index[i] = uint16(uint32(u << U32_8) | v)
    fours = index.view(np.uint64)
    mask, one = U64_FFFF, U32_1
    for j in range(half // 8):
        _prefetch(ahead + 64 * j)
        if j % 2 == 0:
            _prefetch(also + 32 * j)
        for i in range(2 * j, 2 * j + 2):
            v = fours[i]
            pairs[v & mask] += one
            pairs[(v >> U64_16) & mask] += one
            pairs[(v >> U64_32) & mask] += one
            pairs[v >> U64_48] += one
    return furthest >= code


@part()
def _count_outside(bits: NDArray, histogram: NDArray, base: int) -> int:
    """Count those of bits[:BLOCK] that `_count_pairs` left out; how many of them are zero."""
    low, code = uint32(base), uint32(CODES)
    outside, zeros = U32_0, U32_0
    for i in range(BLOCK):
        a = bits[i]
        u = uint32(uint32((a >> U32_21) & U32_3FF) - low)
        outside = uint32(outside + uint32(u >= code))
        zeros = uint32(zeros + uint32(uint32(a << U32_1) == U32_0))
    histogram[0] += zeros
    if outside > zeros:
        for i in range(BLOCK):
            a = bits[i]
            u = uint32(uint32((a >> U32_21) & U32_3FF) - low)
            if u >= code and uint32(a << U32_1) != U32_0:
                histogram[a >> U32_21] += U32_1
    return int64(zeros)


@part()
def _fold_pairs(pairs: NDArray, histogram: NDArray, base: int, found: NDArray) -> None:
    """Move a table of pairs into the histogram; `found` (uint32) is scratch."""
    for first in range(256):
        found[first] = U32_0
    for first in range(256):
        row = pairs[256 * first : 256 * first + 256]
        total = U32_0
        for second in range(256):
            total = uint32(total + row[second])
            found[second] += row[second]
        if total:
            found[first] += total
            for second in range(256):
                row[second] = U32_0
    for sign in range(2):
        for code in range(CODES):
            histogram[1024 * sign + base + code] += found[128 * sign + code]


@part(REORDERED)
def _moments(x: NDArray, size: int) -> tuple[float, float]:
    total = 0.0
    squares = 0.0
    for i in range(size):
        v = float64(x[i])
        total += v
        squares += v * v
    return total, squares


@part(REORDERED)
def _moments_and_dot(x: NDArray, before: NDArray, size: int) -> tuple[float, float, float, float]:
    total = 0.0
    squares = 0.0
    dot = 0.0
    reference = 0.0
    for i in range(size):
        v = float64(x[i])
        b = float64(before[i])
        total += v
        squares += v * v
        dot += v * b
        reference += b * b
    return total, squares, dot, reference


@part(REORDERED)
def _distance(x: NDArray, reference: NDArray, size: int) -> tuple[float, float, float]:
    distance = 0.0
    dot = 0.0
    squares = 0.0
    for i in range(size):
        w = float64(x[i])
        r = float64(reference[i])
        d = w - r
        distance += d * d
        dot += w * r
        squares += r * r
    return distance, dot, squares


@part()
def _flips(bits: NDArray, reference: NDArray, size: int) -> int:
    """How many of bits[:size] (uint32) have another sign than the reference; a zero has none."""
    flips = U32_0
    for i in range(size):
        a, b = bits[i], reference[i]
        differs = uint32(uint32(a ^ b) >> U32_31)
        some = uint32(uint32(a << U32_1) != U32_0)
        other = uint32(uint32(b << U32_1) != U32_0)
        flips = uint32(flips + uint32(uint32(differs & some) & other))
    return flips


@part()
def _widen_range(bits: NDArray, size: int, edges: NDArray) -> None:
    """edges (uint32, 2): largest of bits[:size] as unsigned, and as signed integer."""
    keys, signed = bits.view(np.int32), edges.view(np.int32)
    a, b = edges[0], signed[1]
    for i in range(size):
        u, k = bits[i], keys[i]
        a = u if u > a else a
        b = k if k > b else b
    edges[0], signed[1] = a, b


@part()
def _finish_range(edges: NDArray, job: NDArray, kind: int, numbers: NDArray, scratch: NDArray) -> None:
    """Smallest and largest value: among negative ones the larger the bits, the smaller the value."""
    values = edges.view(np.float32)
    if edges[0] >= uint32(SIGN) and edges[1] < uint32(SIGN):
        numbers[MIN], numbers[MAX] = values[0], values[1]
        return
    smallest = U32_FFFFFFFF  # all have one sign: the magnitude next to zero is the other edge
    for start in range(0, job[COUNT], BLOCK):
        n = min(BLOCK, job[COUNT] - start)
        bits = _elements(job, kind, start, n, scratch)
        for i in range(n):
            u = bits[i]
            smallest = u if u < smallest else smallest
    edges[1] = smallest
    low, high = float64(values[0]), float64(values[1])
    numbers[MIN], numbers[MAX] = min(low, high), max(low, high)


@part()
def _top(edges: NDArray) -> int:
    """The bucket of the largest magnitude in a range."""
    top = int64(edges[0] >> U32_21) & 1023
    return max(top, int64(edges[1] >> U32_21)) if edges[1] < uint32(SIGN) else top


@part()
def _zeros(x: NDArray, size: int) -> int:
    zeros = np.int32(0)
    for i in range(size):
        zeros += np.int32(x[i] == 0)
    return zeros


@part()
def _lost(before: NDArray, after: NDArray, gradient: NDArray, size: int) -> int:
    """How many elements (as bits) did not change although their gradient is not zero."""
    lost = U32_0
    for i in range(size):
        same = uint32(after[i] == before[i])
        some = uint32(uint32(gradient[i] << U32_1) != U32_0)
        lost = uint32(lost + uint32(same & some))
    return lost


@part()
def _add_finite(x: NDArray, size: int, numbers: NDArray, counters: NDArray) -> None:
    """The moments of x[:size] where NaN or infinities are among them."""
    for i in range(size):
        v = float64(x[i])
        if np.isnan(v):
            counters[NANS] += 1
        elif np.isinf(v):
            counters[POS_INFS if v > 0 else NEG_INFS] += 1
        else:
            numbers[SUM] += v
            numbers[SUM_SQ] += v * v
            numbers[MIN] = min(numbers[MIN], v)
            numbers[MAX] = max(numbers[MAX], v)


@part()
def _nonfinite(histogram: NDArray) -> bool:
    for lane in range(0, 2 * LANE, LANE):
        for i in range(4):
            if histogram[lane + 1020 + i] or histogram[lane + 2044 + i]:
                return True
    return False


@part()
def _tiny(histogram: NDArray) -> int:
    """How many zeros and near-zeros were counted: an element is zero only if this has grown."""
    return histogram[0] + histogram[1024] + histogram[LANE] + histogram[LANE + 1024]


@part()
def _take(
    histogram: NDArray,
    size: int,
    edges: NDArray,
    counters: NDArray,
    buckets: NDArray,
    counts: NDArray,
    at: int,
) -> int:
    """Move a histogram to buckets[at:] and counts[at:], ascending, and leave it cleared; the new end.

    Goes down from the largest magnitude until all elements are found: small tensors touch few counters.
    """
    left = int64(size)
    for sign in range(0, LANE, 1024):
        small = int64(0)
        for i in range(4):
            small += histogram[sign + i] + histogram[LANE + sign + i]
            histogram[sign + i] = 0
            histogram[LANE + sign + i] = 0
        left -= small
        counters[SUBNORMALS] += small
        for i in range(1020, 1024):
            left -= int64(histogram[sign + i]) + int64(histogram[LANE + sign + i])
            histogram[sign + i] = 0
            histogram[LANE + sign + i] = 0
    counters[SUBNORMALS] -= counters[ZEROS]
    top = 1019
    if counters[NANS] + counters[POS_INFS] + counters[NEG_INFS] == 0 and size > 0:
        top = min(top, _top(edges))
    bottom = top + 1
    ahead = left
    while ahead > 0 and bottom > 0:  # another process may have changed a shared tensor meanwhile
        bottom -= 1
        for index in (bottom, 1024 + bottom):
            ahead -= int64(histogram[index]) + int64(histogram[LANE + index])
    for b in range(top, bottom - 1, -1):
        found = int64(histogram[1024 + b]) + int64(histogram[LANE + 1024 + b])
        if found:
            buckets[at], counts[at] = -b, found
            at += 1
            histogram[1024 + b] = 0
            histogram[LANE + 1024 + b] = 0
    for b in range(bottom, top + 1):
        found = int64(histogram[b]) + int64(histogram[LANE + b])
        if found:
            buckets[at], counts[at] = b, found
            at += 1
            histogram[b] = 0
            histogram[LANE + b] = 0
    return at


@part()
def _active(x: NDArray, start: int, size: int, inner: int, active: NDArray, at: int) -> None:
    """Set the bits of the rows (of `inner` elements) that are not all zero in x[:size], elements start ..."""
    row = start // inner
    done = 0
    while done < size:
        end = min((row + 1) * inner - start, size)
        place, bit = at + row // 8, np.uint8(128 >> (row % 8))
        if not active[place] & bit:
            for i in range(done, end):
                if x[i] != 0:
                    active[place] |= bit
                    break
        done = end
        row += 1


@part()
def _subtract(a: NDArray, b: NDArray, size: int, out: NDArray) -> None:
    for i in range(size):
        out[i] = a[i] - b[i]


@part()
def _block(address: int, stored: int, start: int, size: int, buffer: NDArray) -> NDArray:
    """Elements start .. start + size at an address, as the bits of float32; in `buffer` if widened."""
    if stored == FLOAT32:
        return carray(_pointer(address + 4 * start), BLOCK, np.uint32)
    _widen(address, stored, start, size, buffer)
    return buffer


@part()
def _bits(
    bits: NDArray, size: int, index: NDArray, histogram: NDArray, pairs: NDArray, edges: NDArray,
    counters: NDArray, memory: NDArray, ahead: int, also: int,
) -> None:  # fmt: skip
    """What is read from the bits of a block: histogram, range, zeros.

    memory (int64, 2): where the buckets of the pairs begin, and how many were `_tiny` so far.
    ahead, also: what is read next.
    """
    _widen_range(bits, size, edges)
    if memory[0] == FIRST:
        top = _top(edges)  # NaN and infinities are always outside
        memory[0] = min(max(4, top + HEADROOM - CODES), 1020 - CODES) if 3 < top < 1020 else UNPAIRED
    if memory[0] >= 0 and size == BLOCK:
        if _count_pairs(bits, index, pairs, memory[0], ahead, also):
            counters[ZEROS] += _count_outside(bits, histogram, memory[0])
            memory[1] = _tiny(histogram)
        return
    _count(bits, size, index, histogram, ahead)
    tiny = _tiny(histogram)
    if tiny != memory[1]:
        memory[1] = tiny
        counters[ZEROS] += _zeros(bits.view(np.float32), size)


@part()
def _add_moments(bits: NDArray, size: int, numbers: NDArray) -> None:
    total, squares = _moments(bits.view(np.float32), size)
    numbers[SUM] += total
    numbers[SUM_SQ] += squares


@part()
def _add_change(weight: NDArray, before: NDArray, size: int, change: NDArray, numbers: NDArray) -> None:
    """weight - before into `change`, and its moments; all of them bits."""
    _subtract(weight.view(np.float32), before.view(np.float32), size, change.view(np.float32))
    sums = _moments_and_dot(change.view(np.float32), before.view(np.float32), size)
    numbers[SUM] += sums[0]
    numbers[SUM_SQ] += sums[1]
    numbers[DOT] += sums[2]
    numbers[REF_SUM_SQ] += sums[3]


@part()
def _add_distance(
    weight: NDArray, reference: NDArray, size: int, numbers: NDArray, counters: NDArray
) -> None:
    distance, dot, squares = _distance(weight.view(np.float32), reference.view(np.float32), size)
    numbers[SUM_SQ] += distance
    numbers[DOT] += dot
    numbers[REF_SUM_SQ] += squares
    counters[FLIPS] += _flips(weight, reference, size)


@part()
def _look(
    job: NDArray, start: int, size: int, numbers: NDArray, counters: NDArray, active: NDArray,
    scratch: NDArray, index: NDArray, histograms: NDArray, pairs: NDArray, edges: NDArray, memory: NDArray,
) -> None:  # fmt: skip
    """Add a block of one tensor to its rows."""
    rows, following = job[GRADIENT_ROW : DRIFT_ROW + 1], start + BLOCK
    gradient = scratch[0]
    if job[GRADIENT]:
        gradient = _block(job[GRADIENT], job[GRADIENT_TYPE], start, size, scratch[0])
    if rows[0] >= 0:
        _add_moments(gradient, size, numbers[rows[0]])
        _bits(gradient, size, index, histograms[0], pairs[0], edges[0], counters[rows[0]], memory[0],
              job[GRADIENT] + 4 * following, int64(0))  # fmt: skip
        if job[UNITS] > 0:
            inner = job[COUNT] // job[UNITS]
            _active(gradient.view(np.float32), start, size, inner, active, job[ACTIVE_AT])
    if rows[1] < 0:
        return
    weight = _block(job[WEIGHT], job[WEIGHT_TYPE], start, size, scratch[1])
    _add_moments(weight, size, numbers[rows[1]])
    _bits(weight, size, index, histograms[1], pairs[1], edges[1], counters[rows[1]], memory[1],
          job[WEIGHT] + 4 * following, job[REFERENCE] + 2 * following)  # fmt: skip
    if rows[2] >= 0:
        before = _block(job[BEFORE], job[WEIGHT_TYPE], start, size, scratch[2])
        _add_change(weight, before, size, scratch[4], numbers[rows[2]])
        _bits(scratch[4], size, index, histograms[2], pairs[2], edges[2], counters[rows[2]], memory[2],
              job[BEFORE] + 4 * following, int64(0))  # fmt: skip
        if job[GRADIENT]:
            counters[rows[2], LOST] += _lost(before, weight, gradient, size)
    if rows[3] >= 0:
        reference = _block(job[REFERENCE], job[REFERENCE_TYPE], start, size, scratch[3])
        _add_distance(weight, reference, size, numbers[rows[3]], counters[rows[3]])


@kernel()
def sweep(
    jobs: NDArray, first: int, numbers: NDArray, counters: NDArray, buckets: NDArray, counts: NDArray,
    end: int, active: NDArray, scratch: NDArray, index: NDArray, histograms: NDArray, pairs: NDArray,
    edges: NDArray, memory: NDArray,
) -> tuple[int, int]:  # fmt: skip
    """Fill the rows of jobs[first:], in the order gradient, weight, update, drift of each tensor.

    Args:
        jobs: int64 (tensors, JOB); the rows of the table ascend.
        first: the job to begin with.
        numbers, counters: float64 (rows, NUMBERS) and int64 (rows, COUNTERS), cleared; END is the end of the
            row's buckets.
        buckets, counts, end: int16 and int64 with the buckets of all rows up to `end`.
        active: uint8, cleared: the bits of active rows of the gradients, from each job's ACTIVE_AT.
        scratch, index: uint32 (5, BLOCK) and uint16 (BLOCK,).
        histograms, pairs: uint32 (3, 2 * LANE) and (3, 65536), cleared, and left so.
        edges, memory: uint32 and int64 (3, 2).

    Returns:
        The first job that did not fit into `buckets` (or how many there are), and the new `end`.
    """
    for j in range(first, jobs.shape[0]):
        if end + ROOM > buckets.size:
            return j, end
        job = jobs[j]
        size = job[COUNT]
        for kind in range(3):
            edges[kind, 0], edges[kind, 1] = U32_0, uint32(SIGN)
            memory[kind, 0], memory[kind, 1] = FIRST if size >= PAIRED else UNPAIRED, 0
        for start in range(0, size, BLOCK):
            _look(job, start, min(BLOCK, size - start), numbers, counters, active,
                  scratch, index, histograms, pairs, edges, memory)  # fmt: skip
        for kind in range(3):
            row = job[GRADIENT_ROW + kind]
            if row >= 0:
                if memory[kind, 0] >= 0:
                    _fold_pairs(pairs[kind], histograms[kind], memory[kind, 0], scratch[0])
                if _nonfinite(histograms[kind]):
                    _again(job, kind, numbers[row], counters[row], scratch)
                elif size > 0:
                    _finish_range(edges[kind], job, kind, numbers[row], scratch)
                else:
                    numbers[row, MIN], numbers[row, MAX] = math.inf, -math.inf
                end = _take(histograms[kind], size, edges[kind], counters[row], buckets, counts, end)
                counters[row, END] = end
        if job[DRIFT_ROW] >= 0:
            counters[job[DRIFT_ROW], END] = end
    return jobs.shape[0], end


@part()
def _again(job: NDArray, kind: int, numbers: NDArray, counters: NDArray, scratch: NDArray) -> None:
    """The moments of a tensor that is not finite, over its finite elements."""
    numbers[SUM], numbers[SUM_SQ], numbers[MIN], numbers[MAX] = 0.0, 0.0, math.inf, -math.inf
    for start in range(0, job[COUNT], BLOCK):
        n = min(BLOCK, job[COUNT] - start)
        _add_finite(_elements(job, kind, start, n, scratch).view(np.float32), n, numbers, counters)


@part()
def _elements(job: NDArray, kind: int, start: int, size: int, scratch: NDArray) -> NDArray:
    """A block of a job's gradient, weight or update (kind 0, 1, 2) once more, as bits."""
    if kind == 0:
        return _block(job[GRADIENT], job[GRADIENT_TYPE], start, size, scratch[0])
    weight = _block(job[WEIGHT], job[WEIGHT_TYPE], start, size, scratch[1])
    if kind == 1:
        return weight
    before = _block(job[BEFORE], job[WEIGHT_TYPE], start, size, scratch[2])
    _subtract(weight.view(np.float32), before.view(np.float32), size, scratch[4].view(np.float32))
    return scratch[4]


@intrinsic
def _copy(typingctx: Any, target: Any, source: Any, size: Any) -> Any:
    """Copy `size` bytes from one address to another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b = (builder.inttoptr(place, cgutils.voidptr_t) for place in arguments[:2])
        cgutils.raw_memcpy(builder, a, b, arguments[2], ir.IntType(64)(1))
        return context.get_dummy_value()

    return types.void(target, source, size), generate


@kernel()
def copy_all(sources: NDArray, targets: NDArray, sizes: NDArray) -> None:
    """Copy sizes[i] bytes from address sources[i] to targets[i], for all i."""
    for i in range(sources.size):
        _copy(targets[i], sources[i], sizes[i])
