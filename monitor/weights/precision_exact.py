"""The precision report from weights themselves: every element rounded, block by block.

Two passes: a scale for the whole tensor needs its largest magnitude first. Blocks are small enough for a
processor's cache; of a tensor are held: one block, and a few numbers for each channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..kernels import Kernel
from . import precision_plain as plain
from .formats import SCHEMES, Scheme
from .names import canonical, role_of
from .precision_facts import Rounding, TensorPrecision, channel_snr, outliers
from .source import COMPLEX, FLOATS, Entry, Weights

#: Numbers that are rounded at once: 1 MiB of float32.
BLOCK = 1 << 18
_moments = Kernel("weights.precision_loops", "moments", plain.moments)
_round_rows = Kernel("weights.precision_loops", "round_rows", plain.round_rows)


def left_out(entry: Entry) -> str:
    """Why a tensor cannot be judged; "" when it can."""
    if entry.dtype.startswith("float8"):
        return f"its elements are {entry.dtype} already: what that has cost cannot be told from them"
    if entry.dtype in COMPLEX:
        return "complex elements: no format here is meant for them"
    if entry.dtype not in FLOATS:
        return f"its elements are {entry.dtype}: indices, flags, or weights that are quantised already"
    return "" if entry.elements else "it has no elements"


def schemes_of(shape: Sequence[int]) -> tuple[Scheme, ...]:
    """What is worth trying: a scale for each number of a vector would round nothing."""
    return SCHEMES if len(shape) >= 2 else tuple(s for s in SCHEMES if s.scale in ("cast", "tensor"))


@dataclass
class _Sums:
    """The first pass over a tensor: largest magnitudes and sums of squares by output channel and by input
    (of matrices only), powers of all."""

    tops: NDArray
    squares: NDArray[np.float64]
    input_tops: NDArray
    input_squares: NDArray[np.float64]
    shift: float = 0.0
    powers: NDArray[np.float64] = field(default_factory=lambda: np.zeros(4))
    finite: int = 0
    nans: int = 0
    infs: int = 0
    zeros: int = 0


def measure(weights: Weights, name: str) -> TensorPrecision:
    """Every scheme that suits a tensor, on every element.

    Raises:
        WeightsError: the file has become shorter or unreadable.
        ValueError: see `left_out`.
    """
    entry = weights.entries[name]
    if why := left_out(entry):
        raise ValueError(f"expected floating-point weights, got {name}: {why}")
    sums = _first_pass(weights, entry)
    found = TensorPrecision(
        canonical(name), role_of(canonical(name), entry.shape), entry.shape, entry.dtype, entry.elements,
        nans=sums.nans, infs=sums.infs, zeros=sums.zeros, largest=float(sums.tops.max(initial=0)),
    )  # fmt: skip
    if sums.finite:
        found.rms = math.sqrt(float(sums.squares.sum()) / sums.finite)
        found.kurtosis = kurtosis(sums.powers / sums.finite)
    if len(entry.shape) >= 2:
        rows, row_count = outliers(sums.tops)
        inputs, input_count = outliers(sums.input_tops)
        found.outlier_channels, found.outlier_inputs = rows, inputs if sums.input_tops.size else None
        found.outliers = row_count, input_count
    _second_pass(weights, entry, sums, found)
    return found


def kurtosis(powers: Sequence[float] | NDArray[np.float64]) -> float:
    """m4 / m2^2 from the means of (x - shift)^k, k = 1 .. 4; NaN where all elements are equal."""
    d, two, three, four = (float(p) for p in powers)
    variance = two - d * d
    if variance <= 1e-12 * two or variance <= 0:
        return math.nan
    return (four - 4 * d * three + 6 * d * d * two - 3 * d**4) / variance / variance


def _matrices(weights: Weights, entry: Entry) -> Iterator[tuple[int, NDArray]]:
    """Rows of channels, finite; of vectors and scalars one row."""
    if len(entry.shape) >= 2:
        yield from weights.rows(entry.name, BLOCK)
    else:
        for block in weights.blocks(entry.name, BLOCK):
            yield 0, block.reshape(1, -1)


def _first_pass(weights: Weights, entry: Entry) -> _Sums:
    kind = np.float64 if entry.dtype == "float64" else np.float32
    channels = entry.shape[0] if len(entry.shape) >= 2 else 1
    width = entry.shape[1] if len(entry.shape) == 2 else 0
    sums = _Sums(np.zeros(channels, kind), np.zeros(channels), np.zeros(width, kind), np.zeros(width))
    for first, block in _matrices(weights, entry):
        place = slice(first, first + len(block))
        finite = np.isfinite(block)
        good = int(np.count_nonzero(finite))
        if good < block.size:
            nans = int(np.count_nonzero(np.isnan(block)))
            sums.nans, sums.infs = sums.nans + nans, sums.infs + block.size - good - nans
            block = np.where(finite, block, 0)
        if not sums.finite and good:
            sums.shift = float(block.sum(dtype=np.float64)) / good
        tops, squares = np.empty(len(block), kind), np.empty(len(block))
        block = np.ascontiguousarray(block)
        powers = np.array(_moments(block, sums.shift, tops, squares, sums.input_tops, sums.input_squares))
        bad = block.size - good
        sums.powers += powers - bad * (-sums.shift) ** np.arange(1.0, 5.0)
        sums.zeros += block.size - int(np.count_nonzero(block)) - bad
        sums.finite += good
        np.maximum(sums.tops[place], tops, out=sums.tops[place])
        sums.squares[place] += squares
    return sums


def _second_pass(weights: Weights, entry: Entry, sums: _Sums, found: TensorPrecision) -> None:
    schemes = schemes_of(entry.shape)
    kind = sums.tops.dtype
    plan, limits = plain.plan_of(schemes, kind)
    errors = np.zeros((len(schemes), sums.tops.size))
    input_errors = np.zeros((len(schemes), sums.input_tops.size))
    counts, worst = np.zeros((len(schemes), 3), np.int64), np.zeros(len(schemes), kind)
    top = sums.tops.max(initial=kind.type(0))
    for first, block in _matrices(weights, entry):
        if sums.nans or sums.infs:
            block = np.where(np.isfinite(block), block, kind.type(0))
        place = slice(first, first + len(block))
        part = np.zeros((len(schemes), len(block)))
        block = np.ascontiguousarray(block)
        _round_rows(
            block, sums.tops[place], sums.squares[place], top, plan, limits, part, input_errors, counts, worst
        )
        errors[:, place] += part
    signal = float(sums.squares.sum())
    for s, scheme in enumerate(schemes):
        channels = [channel_snr(sums.squares, errors[s]), channel_snr(sums.input_squares, input_errors[s])]
        known = [snr for snr in channels if snr is not None]
        found.roundings[scheme] = Rounding(
            scheme, *(int(n) for n in counts[s]), signal=signal, error=float(errors[s].sum()),
            channel_snr_db=min(known) if known and len(entry.shape) >= 2 else None,
            max_error=float(worst[s]),
        )  # fmt: skip
