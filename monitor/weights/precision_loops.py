"""The compiled loops of the precision report: moments, and rounding to every scheme in one pass.

Values are float32 and finite. A chunk of a row stays in the processor's first cache while every scheme has
its turn. Rounding must not be reordered, sums may be: they are functions of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import uint32
from numpy.typing import NDArray

from ..compiled import REORDERED, kernel, part
from .formats import GROUP
from .precision_plain import (
    BFLOAT,
    CAST,
    EXPONENT,
    IN_GROUPS,
    INTEGER,
    KIND,
    MANTISSA,
    OVERFLOW,
    SCALE,
    SUBNORMAL,
    TENSOR,
    ZEROED,
)

CHUNK = 1024
_FAST = REORDERED | {"nnan", "ninf"}


@part()
def _largest(x: NDArray, word: NDArray) -> Any:
    """Largest magnitude; of whole numbers, since magnitudes are ordered as their bits: that is vectorised."""
    bits = x.view(np.uint32)
    most = uint32(0)
    for i in range(x.size):
        size = uint32(bits[i] & uint32(0x7FFFFFFF))
        most = size if size > most else most
    word[0] = most
    return word.view(np.float32)[0]


@part(_FAST)
def _squares(x: NDArray) -> float:
    total = 0.0
    for i in range(x.size):
        total += np.float64(x[i]) * np.float64(x[i])
    return total


@part(_FAST)
def _add_squares(x: NDArray, weight: float, sums: NDArray) -> None:
    for i in range(x.size):
        sums[i] += weight * np.float64(x[i]) * np.float64(x[i])


@kernel(_FAST)
def moments(
    x: NDArray, shift: float, tops: NDArray, squares: NDArray, input_tops: NDArray, input_squares: NDArray
) -> Any:
    """Largest magnitudes and sums of squares of rows and columns; sums of (x - shift)^k, k = 1 .. 4.

    Args:
        x: float32 (n, width), contiguous, finite. tops: float32 (n,). squares: float64 (n,).
        input_tops, input_squares: the same of columns, (width,), raised and added to; or (0,). A row adds
            squares in shares of its own sum: rows of all sizes count the same.
    """
    word = np.empty(1, np.uint32)
    one = two = three = four = 0.0
    for i in range(x.shape[0]):
        row = x[i]
        tops[i] = _largest(row, word)
        squares[i] = _squares(row)
        for j in range(row.size):
            v = np.float64(row[j]) - shift
            w = v * v
            one += v
            two += w
            three += w * v
            four += w * w
        if input_tops.size:
            _add_squares(row, 1 / squares[i] if squares[i] > 0 else 0.0, input_squares)
            for j in range(row.size):
                input_tops[j] = max(input_tops[j], abs(row[j]))
    return one, two, three, four


@part()
def _to_integers(x: NDArray, scale: Any, inverse: Any, out: NDArray) -> None:
    """Errors of rounding to multiples of scale. Adding 1.5 x 2^23 rounds to whole numbers, ties to even."""
    magic = np.float32(12582912.0)
    for i in range(x.size):
        q = (x[i] * inverse + magic) - magic
        out[i] = q * scale


@part()
def _to_floats(
    x: NDArray, scale: Any, inverse: Any, shift: Any, least: Any, limit: Any, out: NDArray, bits: NDArray
) -> None:
    """Rounding to a float format: add and take away a number whose last bit is the step at this exponent."""
    values = bits.view(np.float32)
    for i in range(x.size):
        values[i] = min(max(x[i] * inverse, -limit), limit)
        out[i] = values[i]
    for i in range(x.size):
        bits[i] = (max(bits[i] & np.int32(0x7F800000), least) + shift) | np.int32(0x00400000)
    for i in range(x.size):
        out[i] = ((out[i] + values[i]) - values[i]) * scale


@part()
def _to_bfloats(x: NDArray, out: NDArray) -> None:
    """Round half to even in the bits themselves, which takes the whole range of float32."""
    source, found = x.view(np.int32), out.view(np.int32)
    for i in range(x.size):
        b = source[i]
        found[i] = (b + np.int32(0x7FFF) + ((b >> np.int32(16)) & np.int32(1))) & np.int32(-65536)


@part()
def _zeros(x: NDArray) -> Any:
    found = uint32(0)
    for i in range(x.size):
        found = uint32(found + uint32(x[i] == np.float32(0)))
    return np.int64(found)


@part()
def _below(x: NDArray, limit: Any) -> Any:
    found = uint32(0)
    for i in range(x.size):
        found = uint32(found + uint32(abs(x[i]) < limit))
    return np.int64(found)


@part()
def _drop_beyond(x: NDArray, y: NDArray, largest: Any) -> int:
    """Put x in place of what overflowed in y: no error is counted there."""
    found = 0
    for i in range(x.size):
        if abs(y[i]) > largest:
            y[i] = x[i]
            found += 1
    return found


@part(_FAST)
def _subtract(x: NDArray, y: NDArray) -> None:
    for i in range(x.size):
        y[i] = y[i] - x[i]


@kernel()
def round_rows(
    x: NDArray,
    tops: NDArray,
    squares: NDArray,
    top: Any,
    plan: NDArray,
    limits: NDArray,
    errors: NDArray,
    input_errors: NDArray,
    counts: NDArray,
    worst: NDArray,
) -> None:
    """Round rows in every scheme of a plan and sum up what that does.

    Args:
        x: float32 (n, width), contiguous, finite. tops, squares: (n,), what `moments` says of each row.
        top: largest magnitude of the tensor, float32. plan: int32 (schemes, 5).
        limits: float32 (schemes,), largest values.
        errors, input_errors: float64 (schemes, n) and (schemes, width or 0), sums of squared errors of rows
            and, as shares of the rows' squares, of columns; added to. counts: int64 (schemes, 3), added to.
        worst: float32 (schemes,), raised to the largest error.
    """
    out = np.empty(CHUNK, np.float32)
    bits = np.empty(CHUNK, np.int32)
    word = np.empty(1, np.uint32)
    one, least_scale = np.float32(1), np.float32(2.0**-126)
    for i in range(x.shape[0]):
        for start in range(0, x.shape[1], CHUNK):
            chunk = x[i, start : start + CHUNK]
            for s in range(plan.shape[0]):
                kind, shares = plan[s, KIND], plan[s, SCALE]
                width = GROUP if shares == IN_GROUPS else chunk.size
                for begin in range(0, chunk.size, width):
                    piece = chunk[begin : begin + width]
                    y = out[: piece.size]
                    zeros = _zeros(piece)
                    scale = inverse = one
                    if shares != CAST:
                        reach = top if shares == TENSOR else tops[i]
                        if shares == IN_GROUPS:
                            reach = _largest(piece, word)
                        scale = reach / limits[s]
                        inverse = one / scale if scale >= least_scale else np.float32(0)
                    if kind == INTEGER:
                        _to_integers(piece, scale, inverse, y)
                    elif kind == BFLOAT:
                        _to_bfloats(piece, y)
                    else:
                        shift = np.int32((23 - plan[s, MANTISSA]) << 23)
                        _to_floats(
                            piece, scale, inverse, shift, plan[s, EXPONENT], np.float32(131072), y,
                            bits[: piece.size],
                        )  # fmt: skip
                    gone = _zeros(y)
                    counts[s, ZEROED] += gone - zeros
                    if kind != INTEGER:
                        normal = np.float32(2.0) ** np.float32((plan[s, EXPONENT] >> 23) - 127) * scale
                        counts[s, SUBNORMAL] += _below(piece, normal) - gone
                    if shares == CAST and tops[i] > limits[s]:
                        counts[s, OVERFLOW] += _drop_beyond(piece, y, limits[s])
                    _subtract(piece, y)
                    errors[s, i] += _squares(y)
                    if input_errors.shape[1]:
                        weight = 1 / squares[i] if squares[i] > 0 else 0.0
                        place = start + begin
                        _add_squares(y, weight, input_errors[s, place : place + piece.size])
                    worst[s] = max(worst[s], _largest(y, word))
