"""Several captures of a tensor as one row: `summary.merge` for whole tables.

Counts add exactly and sums to rounding, `min` and `max` are the extremes, histograms add bucket by bucket.
What does not add, the least and the greatest norm of one capture, has columns of its own.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from .merging import ranks
from .schema import ROLLUP

#: Bins whose histograms are added at once: as dense ones they take a few megabytes.
BLOCK = 256
_FIRST = ("step", "time", "tensor", "kind", "session", "capture")
_LAST = ("stage", "state")
_OPTIONAL = ("ref_sum_sq", "dot", "residual_sq", "sign_flips", "lost", "samples")
_ADDED = (
    "captures", "count", "sum", "sum_sq", "zeros", "subnormals", "nans", "pos_infs", "neg_infs",
)  # fmt: skip


def roll_up(rows: pa.Table, factor: int) -> pa.Table:
    """Each tensor's captures c with the same c // factor as one row.

    Args:
        rows: of `schema.STATS` with session and capture, or of a finer level, sorted by kind, tensor, session
            and step, without null captures. factor: captures in a bin.

    Returns:
        Rows of `schema.ROLLUP`, in order.
    """
    if not rows.num_rows:
        return ROLLUP.empty_table()
    whole = rows.combine_chunks()
    starts = bin_starts(whole, factor)
    first, last = pa.array(starts[:-1]), pa.array(starts[1:] - 1)
    columns: dict[str, pa.Array] = {}
    with np.errstate(all="ignore"):  # sums may be infinite
        columns |= {name: whole[name].take(first) for name in _FIRST}
        columns |= {name: whole[name].take(last) for name in _LAST}
        columns |= {name: pa.array(np.add.reduceat(numbers(whole, name), starts[:-1])) for name in _ADDED}
        columns |= {name: added(whole, name, starts) for name in _OPTIONAL}
        columns["skipped"] = pa.array(np.logical_or.reduceat(numbers(whole, "skipped"), starts[:-1]))
        columns |= _extremes(whole, starts)
    columns |= histograms(whole, starts) | _units(whole, starts)
    return pa.table([columns[name] for name in ROLLUP.names], schema=ROLLUP)


def bin_starts(rows: pa.Table, factor: int) -> np.ndarray:
    """int64 (bins + 1,): the first row of each bin, and the number of rows."""
    same = np.ones(rows.num_rows - 1, np.bool_)
    for name in ("kind", "tensor", "session"):
        same &= np.diff(ranks(rows[name])) == 0
    same &= np.diff(numbers(rows, "capture") // factor) == 0
    return np.concatenate([[0], np.flatnonzero(~same) + 1, [rows.num_rows]])


def only(rows: pa.Table, name: str) -> pa.Array:
    """A column in one piece."""
    column = rows[name].combine_chunks()
    return column if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks)


def numbers(rows: pa.Table, name: str, instead: float = 0) -> np.ndarray:
    """A column of numbers; null becomes `instead`."""
    column = only(rows, name)
    return (column.fill_null(instead) if column.null_count else column).to_numpy(zero_copy_only=False)


def added(rows: pa.Table, name: str, starts: np.ndarray) -> pa.Array:
    """The sum of each bin; null where any of the bin's is."""
    gone = np.logical_or.reduceat(_missing(rows, name), starts[:-1])
    return pa.array(np.add.reduceat(numbers(rows, name), starts[:-1]), mask=gone)


def _missing(rows: pa.Table, name: str) -> np.ndarray:
    return only(rows, name).is_null().to_numpy(zero_copy_only=False)


def _extremes(rows: pa.Table, starts: np.ndarray) -> dict[str, pa.Array]:
    least = np.minimum.reduceat(numbers(rows, "min", np.inf), starts[:-1])
    most = np.maximum.reduceat(numbers(rows, "max", -np.inf), starts[:-1])
    finer = "sum_sq_min" in rows.column_names
    low, high, steps = ("sum_sq_min", "sum_sq_max", "last_step") if finer else ("sum_sq", "sum_sq", "step")
    ratios = numbers(rows, "ratio_sq_max", -np.inf) if finer else _ratios(rows)
    ratio = np.maximum.reduceat(ratios, starts[:-1])
    return {
        "min": pa.array(least, mask=least == np.inf),
        "max": pa.array(most, mask=most == -np.inf),
        "sum_sq_min": pa.array(np.minimum.reduceat(numbers(rows, low), starts[:-1])),
        "sum_sq_max": pa.array(np.maximum.reduceat(numbers(rows, high), starts[:-1])),
        "ratio_sq_max": pa.array(ratio, mask=ratio == -np.inf),
        "last_step": pa.array(np.maximum.reduceat(numbers(rows, steps), starts[:-1])),
    }


def _ratios(rows: pa.Table) -> np.ndarray:
    """sum_sq / ref_sum_sq (rows,); -inf where there is none, or 0 / 0."""
    ratio = numbers(rows, "sum_sq") / numbers(rows, "ref_sum_sq", np.nan)
    return np.where(np.isnan(ratio), -np.inf, ratio)


def histograms(rows: pa.Table, starts: np.ndarray) -> dict[str, pa.Array]:
    """Columns buckets and counts of each bin."""
    buckets, counts = only(rows, "buckets"), only(rows, "counts")
    offsets = buckets.offsets.to_numpy().astype(np.int64)
    ends = (offsets - offsets[0])[starts]  # of the bins' entries
    numbers, elements = buckets.flatten().to_numpy(), counts.flatten().to_numpy()
    merged = [
        _add_histograms(ends[first : first + BLOCK + 1], numbers, elements)
        for first in range(0, starts.size - 1, BLOCK)
    ]
    sizes, found, pooled = (np.concatenate(columns) for columns in zip(*merged, strict=True))
    places = pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))
    return {
        "buckets": pa.ListArray.from_arrays(places, pa.array(found)),
        "counts": pa.ListArray.from_arrays(places, pa.array(pooled)),
    }


def _add_histograms(
    ends: np.ndarray, buckets: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many buckets each bin has, their numbers, their counts; bin b owns ends[b] to ends[b + 1]."""
    bins = np.repeat(np.arange(ends.size - 1), np.diff(ends))
    numbers = buckets[ends[0] : ends[-1]].astype(np.int64)
    low = int(numbers.min(initial=0))
    dense = np.zeros((ends.size - 1, int(numbers.max(initial=0)) - low + 1), np.int64)
    np.add.at(dense.reshape(-1), bins * dense.shape[1] + numbers - low, counts[ends[0] : ends[-1]])
    some, place = np.nonzero(dense)
    return np.bincount(some, minlength=ends.size - 1), (place + low).astype(np.int16), dense[some, place]


def _units(rows: pa.Table, starts: np.ndarray) -> dict[str, pa.Array]:
    """The union of the sets of active units; null where one is missing, or they are of different units."""
    sets, units = only(rows, "active"), numbers(rows, "units")
    merged: list[bytes | None] = [None] * (starts.size - 1)
    for place in np.flatnonzero(~np.logical_or.reduceat(_missing(rows, "active"), starts[:-1])):
        first, last = int(starts[place]), int(starts[place + 1])
        members = [np.frombuffer(sets[row].as_buffer(), np.uint8) for row in range(first, last)]
        if (units[first:last] == units[first]).all() and len({m.size for m in members}) == 1:
            merged[place] = np.bitwise_or.reduce(members).tobytes()
    gone = np.array([union is None for union in merged])
    return {
        "active": pa.array(merged, pa.binary()),
        "units": pa.array(units[starts[:-1]], mask=gone),
    }
