"""What the precision report knows of one tensor: what each number format would do to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .formats import Scheme
from .names import block_of

#: A channel whose largest magnitude is so many times the median channel's: with a scale for the whole tensor
#: the median channel loses two bits to it, 6.02 dB each (Bennett 1948, Spectra of quantized signals).
OUTLIER = 4.0
#: So many outlier channels are listed, largest first.
LISTED = 10
#: `Rounding.channel_snr_db`: what this share of the channels and of the inputs reaches.
CHANNELS_SHARE = 0.99


@dataclass
class Rounding:
    """One tensor in one scheme.

    Attributes:
        zeroed, subnormal, overflow: elements that become zero; that keep fewer bits, as subnormals; that are
            beyond the largest number (infinite, NaN or clipped, as the library has it).
        between: of those counts that are not known exactly, the least and the most that they can be; the
            count itself is then the likeliest.
        signal, error: sums of squares of the tensor, and of the errors of what does not overflow.
        channel_snr_db: what 99 of 100 output channels, and of a matrix 99 of 100 inputs, reach: one channel
            that is much larger than the others must not hide what happens to them. None: not known, or no
            channels.
        max_error: the largest error of what does not overflow; from a run the most that it can be.
        exact_counts, exact_errors: true unless estimated from a histogram; counts may then be bounded still.
    """

    scheme: Scheme
    zeroed: int = 0
    subnormal: int = 0
    overflow: int = 0
    between: dict[str, tuple[int, int]] = field(default_factory=dict)
    signal: float = 0.0
    error: float = 0.0
    channel_snr_db: float | None = None
    max_error: float = 0.0
    exact_counts: bool = True
    exact_errors: bool = True

    @property
    def snr_db(self) -> float:
        """10 log10(signal / error): infinite where nothing changes, also of a tensor of zeros."""
        return decibels(self.signal, self.error)

    @property
    def lossless(self) -> bool:
        return self.error == 0 and self.overflow == 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON: an infinite ratio is null, and `lossless` says so."""
        return {
            "format": self.scheme.format, "scale": self.scheme.scale, "label": self.scheme.label,
            "bits": self.scheme.bits, "zeroed": self.zeroed, "subnormal": self.subnormal,
            "overflow": self.overflow, "between": {k: list(v) for k, v in self.between.items()},
            "snr_db": number(self.snr_db), "channel_snr_db": number(self.channel_snr_db),
            "max_error": number(self.max_error), "lossless": self.lossless,
            "counts": "estimate" if not self.exact_counts else "between" if self.between else "exact",
            "errors": "exact" if self.exact_errors else "estimate",
        }  # fmt: skip


@dataclass
class Recommendation:
    """A format for one tensor. `scheme` None: leave it as it is stored. `source`: of the rule."""

    scheme: Scheme | None
    reason: str
    source: str

    @property
    def label(self) -> str:
        return self.scheme.label if self.scheme else "as stored"


@dataclass
class TensorPrecision:
    """One tensor in every scheme that applies to it.

    Attributes:
        count, nans, infs, zeros: elements. Only the finite ones are judged.
        largest, rms: of the finite elements. kurtosis: 3 of a normal distribution, 1.8 of a uniform one; NaN
            where all elements are equal.
        outlier_channels, outlier_inputs: rows, and columns of matrices, whose largest magnitude is `OUTLIER`
            times the median one's or more: (place, times), largest first, at most `LISTED`; None: not known.
        outliers: how many there are of both.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    nans: int = 0
    infs: int = 0
    zeros: int = 0
    largest: float = 0.0
    rms: float = 0.0
    kurtosis: float = math.nan
    outlier_channels: list[tuple[int, float]] | None = None
    outlier_inputs: list[tuple[int, float]] | None = None
    outliers: tuple[int, int] = (0, 0)
    roundings: dict[Scheme, Rounding] = field(default_factory=dict)
    recommendation: Recommendation | None = None

    @property
    def block(self) -> str:
        return block_of(self.name)

    def to_dict(self) -> dict[str, Any]:
        advice = self.recommendation
        return {
            "tensor": self.name, "role": self.role, "block": self.block, "shape": list(self.shape),
            "dtype": self.dtype, "count": self.count, "nans": self.nans, "infs": self.infs,
            "zeros": self.zeros, "largest": number(self.largest), "rms": number(self.rms),
            "kurtosis": number(self.kurtosis), "outlier_channels": _places(self.outlier_channels),
            "outlier_inputs": _places(self.outlier_inputs), "outlier_channels_count": self.outliers[0],
            "outlier_inputs_count": self.outliers[1],
            "formats": [rounding.to_dict() for rounding in self.roundings.values()],
            "recommendation": advice and {
                "format": advice.label, "reason": advice.reason, "source": advice.source,
            },
        }  # fmt: skip


def decibels(signal: float, error: float) -> float:
    """10 log10(signal / error), infinite without an error."""
    if error == 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal > 0 else -math.inf


def number(value: float | None) -> float | None:
    """What JSON can hold."""
    return float(value) if value is not None and math.isfinite(value) else None


def channel_snr(signals: NDArray[np.floating], errors: NDArray[np.floating]) -> float | None:
    """What `CHANNELS_SHARE` of the channels reach, in dB; channels of zeros do not count."""
    with np.errstate(divide="ignore"):
        ratios = np.sort(10 * np.log10(signals[signals > 0] / errors[signals > 0]))
    return float(ratios[int((1 - CHANNELS_SHARE) * ratios.size)]) if ratios.size else None


def outliers(tops: NDArray[np.floating]) -> tuple[list[tuple[int, float]], int]:
    """Places and sizes, in medians, of the largest magnitudes that stand out; and how many do."""
    some = tops[tops > 0]
    if some.size < 2:
        return [], 0
    times = tops.astype(np.float64) / float(np.median(some))
    found = np.flatnonzero(times >= OUTLIER)
    order = found[np.argsort(-times[found], kind="stable")]
    return [(int(i), float(times[i])) for i in order[:LISTED]], int(found.size)


def _places(found: list[tuple[int, float]] | None) -> list[dict[str, float]] | None:
    return None if found is None else [{"place": place, "times_median": times} for place, times in found]
