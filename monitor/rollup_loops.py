"""The compiled loops of roll-ups: histograms and sets of units of several captures become one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .compiled import kernel

#: Any int16 has a place: no bucket number, however damaged, leads outside of the array.
_ZERO = 1 << 15


@kernel()
def merge_histograms(
    starts: NDArray, offsets: NDArray, buckets: NDArray, counts: NDArray,
    out_offsets: NDArray, out_buckets: NDArray, out_counts: NDArray,
) -> None:  # fmt: skip
    """Add the histograms of each group of rows.

    Args:
        starts: int64 (groups + 1,): group g owns rows starts[g] to starts[g + 1].
        offsets: int64 (rows + 1,): row r owns buckets[offsets[r]:offsets[r + 1]].
        buckets, counts: int16 and int64 (n,).
        out_offsets, out_buckets, out_counts: int64 (groups + 1,), int16 (n,), int64 (n,); what lies behind
            out_offsets[-1] is left as it was.
    """
    dense = np.zeros(2 * _ZERO, np.int64)
    place = 0
    out_offsets[0] = 0
    for g in range(starts.size - 1):
        low, high = 2 * _ZERO, -1
        for i in range(offsets[starts[g]], offsets[starts[g + 1]]):
            bucket = np.int64(buckets[i]) + _ZERO
            dense[bucket] += counts[i]
            low, high = min(low, bucket), max(high, bucket)
        for bucket in range(low, high + 1):
            if dense[bucket] != 0:
                out_buckets[place] = bucket - _ZERO
                out_counts[place] = dense[bucket]
                dense[bucket] = 0
                place += 1
        out_offsets[g + 1] = place


@kernel()
def merge_units(
    starts: NDArray, offsets: NDArray, active: NDArray, units: NDArray, out_offsets: NDArray, out: NDArray
) -> None:
    """The union of the sets of active units of each group of rows; empty where the rows' sets differ in size.

    Args:
        starts, offsets: as of `merge_histograms`, for `active`. active: uint8 (n,), one bit a unit.
        units: int64 (rows,), -1 where there is no set.
        out_offsets, out: int64 (groups + 1,), uint8 (n,).
    """
    place = 0
    out_offsets[0] = 0
    for g in range(starts.size - 1):
        first = starts[g]
        size = offsets[first + 1] - offsets[first]
        same = units[first] >= 0
        for r in range(first, starts[g + 1]):
            same = same and units[r] == units[first] and offsets[r + 1] - offsets[r] == size
        if same:
            for k in range(size):
                union = np.uint8(0)
                for r in range(first, starts[g + 1]):
                    union |= active[offsets[r] + k]
                out[place + k] = union
            place += size
        out_offsets[g + 1] = place
