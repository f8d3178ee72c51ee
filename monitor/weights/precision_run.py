"""The precision report from a run: what its histograms tell of the weights at a step.

Exact where a bucket's edge is the format's: what float16 and float8 make zero or subnormal. Where an edge
lies inside a bucket, a count is known to lie between two numbers. Errors are estimates: elements are taken to
be spread evenly within their bucket, a factor of at most 1.25 wide. A log does not tell channels apart: those
of one tensor are taken to be samples of one distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RunError
from ..summary import SMALLEST_NORMAL, bucket_edges
from .formats import FORMATS, GROUP, Format, Scheme
from .from_runs import INITIAL, RunAt
from .names import role_of
from .precision import PrecisionReport, check_snr
from .precision_advice import LEAST_SNR
from .precision_exact import left_out, schemes_of
from .precision_facts import Recommendation, Rounding, TensorPrecision
from .source import Entry

Floats = NDArray[np.float64]
#: Scales per channel are averaged over so many quantiles of the largest of n samples.
QUANTILES = 8
_COLUMNS = (
    "tensor", "captures", "count", "sum", "sum_sq", "min", "max", "zeros", "subnormals", "nans",
    "pos_infs", "neg_infs", "buckets", "counts",
)  # fmt: skip
#: Types with short mantissas, and the format that holds them as they are.
_SHORT = {"float16": "fp16", "bfloat16": "bf16"}


def run_report(at: RunAt, *, least_snr: float = LEAST_SNR) -> PrecisionReport:
    """What a run's log tells of its weights in every format.

    Raises:
        ValueError: `least_snr` is no number above 0.
        RunError: the weights were not logged then.
    """
    check_snr(least_snr)
    at.check_logged()
    kind, step = ("initial_weight", None) if at.step == INITIAL else ("weight", int(at.step))
    rows = {row["tensor"]: row for row in at.run.sums(kind, _COLUMNS, step, step).to_pylist()}
    if not rows:
        raise RunError(f"expected {at.label}, but those weights were not logged")
    found, skipped = [], {}
    for told in at.run.tensors().to_dict("records"):
        name, row = told["tensor"], rows.get(told["tensor"])
        known = told["dtype"] != "unknown"  # run.json is damaged: the log holds numbers, of whatever shape
        entry = Entry(name, tuple(told["shape"] or ()), told["dtype"] if known else "float32")
        if why := "no weights of it were captured then" if row is None else left_out(entry):
            skipped[name] = why
        elif row:
            found.append(_judged(entry, told["role"] if known else role_of(name, entry.shape), row))
            if not known:
                found[-1].recommendation = Recommendation(None, "run.json does not tell its shape", "ours")
    notes = [
        "From a run's histograms: counts of fp16, bf16 and unscaled fp8 are exact, or between two numbers; "
        "the rest are estimates. The weight file itself gives exact numbers and outlier channels."
    ]
    if (most := max(row["captures"] for row in rows.values())) > 1:
        notes.append(f"The log holds this step in a row of {most} captures: counts are those of all of them.")
    return PrecisionReport(at.run.url, "run", found, skipped, at.step, least_snr, notes)


@dataclass
class Pieces:
    """A histogram as pieces of even density: |x| from low to high; zeros are in none.

    Attributes:
        low, high, count: (n,), by low. zeros: elements.
        edges: (low, high) of the buckets before they were cut to the least and the largest value.
    """

    low: Floats
    high: Floats
    count: Floats
    zeros: int
    edges: tuple[Floats, Floats]

    @property
    def elements(self) -> float:
        return float(self.count.sum()) + self.zeros

    def until(self, top: float) -> Pieces:
        """What lies below `top`."""
        inside = self.low <= top
        low, high = self.low[inside], np.minimum(self.high[inside], top)
        whole = self.high[inside] - low
        share = np.where(whole > 0, (high - low) / np.where(whole > 0, whole, 1), 1.0)
        return Pieces(low, high, self.count[inside] * share, self.zeros, self.edges)


def pieces_of(row: dict[str, Any]) -> Pieces:
    """The pieces of a row of `stats`: its buckets, and one for subnormals."""
    buckets = np.asarray(row["buckets"], np.int64)
    edges = np.sort(np.abs(bucket_edges(buckets)), axis=0)
    low, high = bucket_edges(buckets)
    ends = np.sort(np.abs([np.maximum(low, row["min"]), np.minimum(high, row["max"])]), axis=0)
    count = np.asarray(row["counts"], np.float64)
    if row["subnormals"]:
        tiny = np.array([[0.0], [SMALLEST_NORMAL]])
        edges, ends = np.hstack([edges, tiny]), np.hstack([ends, tiny])
        count = np.append(count, row["subnormals"])
    order = np.argsort(ends[0], kind="stable")
    return Pieces(*ends[:, order], count[order], row["zeros"], tuple(edges[:, order]))


def _judged(entry: Entry, role: str, row: dict[str, Any]) -> TensorPrecision:
    infs = row["pos_infs"] + row["neg_infs"]
    finite = row["count"] - row["nans"] - infs
    found = TensorPrecision(
        entry.name, role, entry.shape, entry.dtype, entry.elements, row["nans"], infs, row["zeros"]
    )
    if not finite:
        return found
    pieces = pieces_of(row)
    found.largest = max(abs(row["min"]), abs(row["max"]))
    found.rms = math.sqrt(row["sum_sq"] / finite)
    found.kurtosis = _kurtosis(row, finite)
    width = max(1, entry.elements // max(entry.shape[0], 1)) if len(entry.shape) >= 2 else entry.elements
    for scheme in schemes_of(entry.shape):
        found.roundings[scheme] = _rounding(scheme, pieces, found, width, row["sum_sq"])
    return found


def _rounding(scheme: Scheme, pieces: Pieces, tensor: TensorPrecision, width: int, signal: float) -> Rounding:
    form = FORMATS[scheme.format]
    if _SHORT.get(tensor.dtype) == scheme.format:
        small = int(pieces.count[pieces.edges[1] <= form.smallest_normal].sum())
        return Rounding(scheme, subnormal=small, signal=signal)
    if scheme.scale == "cast":
        return _cast(scheme, form, pieces, tensor, signal)
    if scheme.scale == "tensor":
        tops = [tensor.largest]
    else:
        tops = tops_of(pieces, min(width, GROUP) if scheme.scale == "group" else width)
    error = zeroed = small = 0.0
    for top in tops:
        part, scale = pieces.until(top), top / form.largest
        share = pieces.elements / part.elements / len(tops)
        gone = _below(part, scale * _smallest_half(form))
        error += share * squared_error(part, form, scale)
        zeroed += share * gone
        small += share * max(0.0, _below(part, scale * form.smallest_normal) - gone)
    return Rounding(
        scheme, round(zeroed), round(small), signal=signal, error=error,
        max_error=_largest_step(form, tensor.largest / form.largest, tensor.largest) / 2,
        exact_counts=False, exact_errors=False,
    )  # fmt: skip


def _cast(scheme: Scheme, form: Format, pieces: Pieces, tensor: TensorPrecision, signal: float) -> Rounding:
    """Counts are exact: what is below an edge of the format; a bucket that straddles one gives bounds.

    A tie, exactly half of the smallest subnormal, becomes zero and is the lowest value of its bucket: what is
    in that bucket is part of the bounds.
    """
    low, high = pieces.edges
    count = pieces.count.astype(np.int64)
    half, normal = _smallest_half(form), form.smallest_normal
    limit = form.largest + _step(form, form.largest) / 2
    gone = _sure_and_possible(count, high <= half, (low <= half) & (high > half))
    below = _sure_and_possible(count, high <= normal, (low < normal) & (high > normal))
    beyond = (0, 0)
    if tensor.largest >= limit:
        beyond = _sure_and_possible(count, low > limit, (low <= limit) & (high > limit))
    found = {
        "zeroed": gone,
        "subnormal": (max(0, below[0] - gone[1]), max(0, below[1] - gone[0])),
        "overflow": beyond,
    }
    likely = min(max(round(_below(pieces, half)), gone[0]), gone[1])
    return Rounding(
        scheme, likely, max(0, below[1] - likely), beyond[1],
        between={name: ends for name, ends in found.items() if ends[0] != ends[1]},
        signal=signal, error=squared_error(pieces.until(limit), form, 1.0),
        max_error=_largest_step(form, 1.0, min(tensor.largest, form.largest)) / 2,
        exact_errors=False,
    )  # fmt: skip


def _sure_and_possible(count: NDArray[np.int64], sure: Any, possible: Any) -> tuple[int, int]:
    least = int(count[sure].sum())
    return least, least + int(count[possible].sum())


def _smallest_half(form: Format) -> float:
    """Up to here values become zero."""
    return 0.5 if form.mantissa is None else 2.0 ** (form.exponent - form.mantissa - 1)


def _step(form: Format, value: float) -> float:
    """Between two neighbours at a value of the format's own range."""
    if form.mantissa is None:
        return 1.0
    return 2.0 ** (max(math.frexp(value)[1] - 1, form.exponent) - form.mantissa)


def _largest_step(form: Format, scale: float, largest: float) -> float:
    return scale * _step(form, largest / scale) if scale > 0 else 0.0


def _below(pieces: Pieces, limit: float) -> float:
    """Elements of magnitude below a limit, zeros left out, evenly spread in their pieces."""
    wide = pieces.high > pieces.low
    share = np.where(wide, (limit - pieces.low) / np.where(wide, pieces.high - pieces.low, 1), 1.0)
    share = np.where(wide, np.clip(share, 0, 1), pieces.low <= limit)
    return float((pieces.count * share).sum())


def tops_of(pieces: Pieces, samples: int) -> list[float]:
    """Quantiles of the largest magnitude among n independent samples: F(top) = level^(1/n)."""
    before = np.concatenate([[0.0], np.cumsum(pieces.count)]) + pieces.zeros
    levels = (np.arange(QUANTILES) + 0.5) / QUANTILES
    wanted = before[-1] * levels ** (1.0 / samples)
    place = np.clip(np.searchsorted(before, wanted, side="left") - 1, 0, pieces.count.size - 1)
    inside = np.clip((wanted - before[place]) / pieces.count[place], 0, 1)
    return list(pieces.low[place] + inside * (pieces.high[place] - pieces.low[place]))


def squared_error(pieces: Pieces, form: Format, scale: float) -> float:
    """Expected sum of squared errors of elements that lie evenly within their pieces.

    Of u uniform in [a, b], in steps, the mean of (u - round(u))^2 is (G(b) - G(a)) / (b - a), where G(t) =
    round(t) / 12 + (t - round(t))^3 / 3: a float's pieces are cut where its step doubles, beforehand.
    """
    if scale <= 0:
        return 0.0
    low, high, count = pieces.low / scale, pieces.high / scale, pieces.count
    step = np.ones_like(low)
    if form.mantissa is not None:
        edge = np.exp2(np.floor(np.log2(np.maximum(high, 2.0**form.exponent))))
        cut = (low < edge) & (edge < high)
        share = np.where(cut, (high - edge) / np.where(high > low, high - low, 1), 0.0)
        count = np.concatenate([count * (1 - share), count[cut] * share[cut]])
        low, high = (
            np.concatenate([low, edge[cut]]),
            np.concatenate([np.where(cut, edge, high), high[cut]]),
        )
        exponent = np.frexp(low)[1] - 1
        step = np.exp2(np.maximum(exponent, form.exponent) - float(form.mantissa))
    a, b = low / step, high / step
    wide = b - a > 1e-9 * np.maximum(b, 1e-300)
    spread = (_primitive(b) - _primitive(a)) / np.where(wide, b - a, 1)
    mean = np.where(wide, spread, np.square(a - np.rint(a)))
    return float((count * mean * np.square(step * scale)).sum())


def _primitive(t: Floats) -> Floats:
    whole = np.floor(t + 0.5)
    return whole / 12 + (t - whole) ** 3 / 3


def _kurtosis(row: dict[str, Any], finite: int) -> float:
    """m4 / m2^2: the variance is exact, m4 of evenly filled buckets."""
    mean = row["sum"] / finite
    variance = row["sum_sq"] / finite - mean * mean
    if variance <= 1e-12 * row["sum_sq"] / finite:
        return math.nan
    low, high = bucket_edges(np.asarray(row["buckets"], np.int64))
    low, high = np.maximum(low, row["min"]) - mean, np.minimum(high, row["max"]) - mean
    wide = high > low
    fourth = np.where(wide, (high**5 - low**5) / (5 * np.where(wide, high - low, 1)), low**4)
    total = float((fourth * np.asarray(row["counts"], np.float64)).sum())
    return (total + (row["zeros"] + row["subnormals"]) * mean**4) / finite / variance**2
