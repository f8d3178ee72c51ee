"""One compiled sweep over all tensors of a capture: gradients, weights, updates and drift in one pass.

The tensors are given by address, so that hundreds of small ones cost one call. Each is read block by block;
within a block (which fits the L1 cache) one short vectorised loop per question; sums in double.

The histogram index of a float32 is its top 11 bits: sign, exponent, two bits of mantissa. What is rare is
found there, not asked of every element: zeros in a block whose index 0 grew, NaN and infinities in a tensor
whose top indices did. Minimum and maximum are those of the bits, as signed and as unsigned integers.

Here is what is asked and answered; the loops are in `sweep_loops`.
"""

from __future__ import annotations

import numpy as np

from .kernels import Kernel

#: Elements of a block: four inputs of 4 bytes each and the indices share 48 KB.
BLOCK = 2048
#: Counters of one histogram: two lanes of 2,048, so that equal neighbours do not wait for each other.
LANE = 2048
#: Buckets for which `sweep` wants room before it begins with a tensor: three rows.
ROOM = 3 * (LANE - 8)

#: From this size on a tensor is counted by pairs of elements, whose buckets are taken from CODES many
#: (32 octaves), which begin CODES - HEADROOM below the largest of its first block.
PAIRED, CODES, HEADROOM = 1 << 17, 127, 8
FIRST, UNPAIRED = -2, -1  # instead of where the buckets begin

SIGN = 0x80000000

#: How the elements at an address are stored.
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2

#: Columns of `numbers` (float64) and of `counters` (int64), one line per row.
SUM, SUM_SQ, MIN, MAX, REF_SUM_SQ, DOT = range(6)
ZEROS, SUBNORMALS, NANS, POS_INFS, NEG_INFS, FLIPS, LOST, END = range(8)
NUMBERS, COUNTERS = 6, 8

#: Columns of the job table (int64), one line per tensor. Addresses are 0 and rows -1 where there is none.
(
    COUNT, WEIGHT, WEIGHT_TYPE, BEFORE, GRADIENT, GRADIENT_TYPE, REFERENCE, REFERENCE_TYPE, UNITS,
    GRADIENT_ROW, WEIGHT_ROW, UPDATE_ROW, DRIFT_ROW, ACTIVE_AT,
) = range(14)  # fmt: skip
JOB = 14


class Buffers:
    """What `sweep` needs besides its rows, about 1 MB; cleared where it has to be, and left so."""

    def __init__(self) -> None:
        self.scratch = np.zeros((5, BLOCK), np.uint32)
        self.index = np.zeros(BLOCK, np.uint16)
        self.histograms = np.zeros((3, 2 * LANE), np.uint32)
        self.pairs = np.zeros((3, 1 << 16), np.uint32)
        self.edges, self.memory = np.zeros((3, 2), np.uint32), np.zeros((3, 2), np.int64)


#: See `sweep_loops`. There is no numpy in their place: `hooks.measure` asks beforehand and goes another way.
sweep = Kernel("sweep_loops", "sweep")
copy_all = Kernel("sweep_loops", "copy_all")
