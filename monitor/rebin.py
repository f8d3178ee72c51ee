"""Histograms with any edges as ours: counts spread over the log buckets, none lost, none added."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .summary import SMALLEST_NORMAL, Summary, bucket_edges, bucket_of

#: TensorBoard's default bins begin at this distance from zero. What they count between is, almost always,
#: exactly zero, and is taken as that.
NEAR_ZERO = 1e-12

_SIZES = np.arange(4, 4 * (1023 + 127) + 4)
_INNER, _OUTER = bucket_edges(_SIZES)
#: The edges of all buckets, ascending. Between the two in the middle lie zeros and subnormals.
_EDGES = np.concatenate([-_OUTER[::-1], -_INNER[:1], _INNER, _OUTER[-1:]])
_MIDDLE = _SIZES.size

Floats = NDArray[np.float64]


@np.errstate(over="ignore")  # of squares
def rebinned(left: Floats, right: Floats, counts: Floats) -> Summary:
    """A summary with the histogram, and sums as far as the edges tell them.

    Args:
        left, right: float64 (bins,), finite edges of bins that do not overlap, ascending; a bin without width
            is a single value. counts: float64 (bins,), elements in each.

    Elements are taken as spread evenly inside their bin. Rounding is that of the cumulative distribution:
    totals stay exact, and nowhere are more than half an element too many or too few below an edge. `sum` and
    `sum_sq` are estimates, `min` and `max` the outer edges.
    """
    some = counts > 0
    left, right, counts = left[some], right[some], counts[some]
    if not counts.size:
        return Summary()
    cells = _spread(left, right, counts)
    single = right <= left
    zeros = int(np.rint(counts[single & (left == 0)].sum()))
    for value, count in zip(left[single], counts[single], strict=True):
        if abs(value) >= SMALLEST_NORMAL:
            number = int(bucket_of(np.array([value]))[0])
            cells[_MIDDLE + number + (-3 if number > 0 else 3)] += round(count)
        elif value:
            cells[_MIDDLE] += round(count)
    where = np.flatnonzero(cells)
    where = where[where != _MIDDLE]
    return Summary(
        count=int(cells.sum()) + zeros,
        sum=float((counts * (left / 2 + right / 2)).sum()),
        sum_sq=float((counts * (left**2 + left * right + right**2) / 3).sum()),
        min=float(left[0]),
        max=float(right[-1]),
        zeros=zeros,
        subnormals=int(cells[_MIDDLE]),
        buckets=(where - _MIDDLE + np.where(where > _MIDDLE, 3, -3)).astype(np.int16),
        counts=cells[where],
    )


def _spread(left: Floats, right: Floats, counts: Floats) -> NDArray[np.int64]:
    """Elements of the bins that have a width, in each cell between two of `_EDGES`."""
    cells = np.zeros(_EDGES.size - 1, np.int64)
    wide = right > left
    if wide.any():
        at = np.stack([left[wide], right[wide]], 1).ravel()
        upto = np.cumsum(counts[wide])
        below = np.stack([np.concatenate([[0.0], upto[:-1]]), upto], 1).ravel()
        first = max(int(np.searchsorted(_EDGES, at[0], "right")) - 1, 0)
        last = min(int(np.searchsorted(_EDGES, at[-1], "left")), _EDGES.size - 1)
        whole = np.rint(np.interp(_EDGES[first : last + 1], at, below))
        cells[first:last] = np.diff(whole).astype(np.int64)
    return cells


def of_limits(
    limits: Floats, counts: Floats, *, low: float, high: float, num: float, total: float, total_sq: float
) -> Summary:
    """TensorBoard's HistogramProto: bin i holds what lies between limits[i - 1] and limits[i].

    Args:
        limits, counts: float64 (bins,). low, high, num, total, total_sq: min, max, number, sum and sum of
            squares of the elements, taken as exact.

    Elements that lie in no bin are NaN or infinite if `low` or `high` is, else beyond the outermost limits
    (of torch: 1e20).
    """
    if not counts.size:
        return Summary()
    left = np.concatenate([[-np.inf], limits[:-1]])
    beyond = max(round(num) - round(float(counts.sum())), 0)
    some = counts > 0
    left, right, counts = left[some], limits[some], counts[some]
    if np.isfinite(low) and np.isfinite(high):
        left, right = np.clip(left, low, high), np.clip(right, low, high)
        zero = (left == 0) & (right <= NEAR_ZERO)
        right = np.where(zero, 0.0, right)
        if beyond:
            above = high > limits[-1]
            place, value = (counts.size, high) if above else (0, low)
            left, right = np.insert(left, place, value), np.insert(right, place, value)
            counts = np.insert(counts, place, beyond)
        return replace(rebinned(left, right, counts), sum=total, sum_sq=total_sq, min=low, max=high)
    largest = np.finfo(np.float64).max
    found = rebinned(np.maximum(left, -largest), np.minimum(right, largest), counts)
    special = "nans" if np.isnan(low) or np.isnan(high) else "pos_infs" if high == np.inf else "neg_infs"
    return replace(found, count=found.count + beyond, **{special: beyond})


def of_proto(histo: Any) -> Summary:
    """The histogram of TensorFlow 1 and torch."""
    return of_limits(
        np.array(histo.bucket_limit), np.array(histo.bucket),
        low=histo.min, high=histo.max, num=histo.num, total=histo.sum, total_sq=histo.sum_squares,
    )  # fmt: skip


def of_table(table: NDArray) -> Summary:
    """The histogram of TensorFlow 2: float (bins, 3) of left edge, right edge and count.

    The outer edges are the smallest and the largest element.
    """
    left, right, counts = table.reshape(-1, 3).astype(np.float64).T
    whole = np.isfinite(left) & np.isfinite(right)  # NaN makes the edges NaN
    found, nans = rebinned(left[whole], right[whole], counts[whole]), int(counts[~whole].sum())
    return replace(found, count=found.count + nans, nans=nans)
