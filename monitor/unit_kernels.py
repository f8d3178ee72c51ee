"""Counts per output unit in one compiled pass: zeros, values at the flat ends of an activation function.

An output is seen as (outer, units, inner): inner is 1 where units are the last dimension (Linear), outer is
the batch and inner the positions of an image where they are the second. No kernel copies or writes `x`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kernels import _compiled

#: Rows are counted in int32 lanes, which vectorise as wide as the values, before they are added to int64.
ROWS = 1 << 16


@_compiled()
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


@_compiled()
def unit_counts(x: NDArray, low: Any, high: Any, zeros: NDArray, ends: NDArray) -> None:
    """Add to zeros[u] the elements of unit u that are exactly zero, to ends[u] those outside [low, high].

    Args:
        x: float32 or float64 (outer, units, inner), contiguous. zeros, ends: int64 (units,).
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


@_compiled()
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
