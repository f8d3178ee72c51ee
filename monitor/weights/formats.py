"""What number formats of few bits do to values: the definition in numpy, which compiled loops are held to.

Floats round to nearest, ties to even, as hardware and torch do, subnormals included. Integers are symmetric:
scale = largest magnitude / (2^(bits - 1) - 1), zero stays zero, as in torch.fake_quantize_per_channel_affine
with a zero point of 0. A scale belongs to the whole tensor, to each output channel (the first dimension, as
torch's linear and convolution layers have it), or to each 128 inputs of a channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Inputs that share a scale in the finest scheme: what GPTQ, AWQ and llama.cpp's kin use.
GROUP = 128
#: A scale below this cannot be divided by in float32: everything becomes zero.
LEAST_SCALE = 2.0**-126


@dataclass(frozen=True)
class Format:
    """A number format.

    Attributes:
        bits: of one number. largest: the largest finite value (of integers: code).
        mantissa: stored bits of a float's mantissa; None of integers.
        exponent: of the smallest normal float, 2^exponent.
    """

    bits: int
    largest: float
    mantissa: int | None = None
    exponent: int = 0

    @property
    def smallest_normal(self) -> float:
        """0 of integers."""
        return 0.0 if self.mantissa is None else 2.0**self.exponent


#: IEEE 754 half precision; bfloat16; 8-bit floats (Micikevicius et al. 2022, FP8 formats for deep learning).
FORMATS = {
    "fp16": Format(16, 65504.0, 10, -14),
    "bf16": Format(16, (2 - 2.0**-7) * 2.0**127, 7, -126),
    "fp8_e4m3": Format(8, 448.0, 3, -6),
    "fp8_e5m2": Format(8, 57344.0, 2, -14),
    "int8": Format(8, 127.0),
    "int4": Format(4, 7.0),
}


class Scheme(NamedTuple):
    """A format and what shares a scale: "cast" (nothing is scaled), "tensor", "channel" or "group"."""

    format: str
    scale: str

    @property
    def label(self) -> str:
        """
        >>> Scheme("int8", "channel").label, Scheme("fp16", "cast").label
        ('int8 per channel', 'fp16')
        """
        return self.format if self.scale == "cast" else f"{self.format} per {self.scale}"

    @property
    def bits(self) -> int:
        return FORMATS[self.format].bits


_SCALES = {
    "fp16": ("cast",),
    "bf16": ("cast",),
    "fp8_e4m3": ("cast", "tensor", "channel"),
    "fp8_e5m2": ("cast", "tensor"),
    "int8": ("tensor", "channel"),
    "int4": ("tensor", "channel", "group"),
}
SCHEMES = tuple(Scheme(name, scale) for name, scales in _SCALES.items() for scale in scales)


def scheme_of(label: str) -> Scheme:
    """The scheme that is called so.

    Raises:
        ValueError: there is none.
    """
    for scheme in SCHEMES:
        if scheme.label == label:
            return scheme
    raise ValueError(
        f"expected a number format among {', '.join(s.label for s in SCHEMES)}, or none, got {label!r}"
    )


def rounded(values: NDArray[np.floating], form: Format) -> NDArray[np.floating]:
    """Values to the nearest that a format has, without its upper limit; of integers: codes.

    >>> rounded(np.array([0.3, 2.0**-25, 65520.0]), FORMATS["fp16"]).tolist()
    [0.300048828125, 0.0, 65536.0]
    """
    if form.mantissa is None:
        return np.rint(values)
    _, exponent = np.frexp(values)  # |x| = m 2^e, 1/2 <= m < 1
    step = np.maximum(exponent - 1, form.exponent) - form.mantissa
    with np.errstate(over="ignore"):
        return np.ldexp(np.rint(np.ldexp(values, -step)), step)


def scale_of(largest: NDArray[np.floating], form: Format) -> tuple[NDArray, NDArray]:
    """Scales for these largest magnitudes and what values are multiplied by: 0 where all become zero."""
    scale = largest / largest.dtype.type(form.largest)
    usable = scale >= LEAST_SCALE
    return scale, np.where(usable, 1 / np.where(usable, scale, 1), 0).astype(largest.dtype)


def grouped(rows: NDArray) -> NDArray:
    """(n, width) as groups of `GROUP` in a row: (n, groups, GROUP), zeros at the end."""
    count, width = rows.shape
    groups = -(-width // GROUP)
    padded = np.zeros((count, groups * GROUP), rows.dtype)
    padded[:, :width] = rows
    return padded.reshape(count, groups, GROUP)


def quantised(
    rows: NDArray[np.floating], scheme: Scheme, largest: float | None = None
) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """What finite values become when they are stored in a format and read again.

    Args:
        rows: (n, width), float32 or float64, one row for each channel; left as it is.
        largest: largest magnitude of the tensor that these are rows of (default: of these rows).

    Returns:
        The values, unlimited where they overflow (see `limited`); and where that is. Scaled formats never do.
    """
    form = FORMATS[scheme.format]
    if scheme.scale == "cast":
        found = rounded(rows, form)
        return found, np.abs(found) > form.largest
    parts = grouped(rows) if scheme.scale == "group" else rows
    if scheme.scale == "tensor":
        top = np.asarray(np.abs(rows).max(initial=0) if largest is None else largest, rows.dtype)
    else:
        top = np.abs(parts).max(axis=-1, keepdims=True, initial=0)
    scale, inverse = scale_of(top, form)
    found = np.clip(rounded(parts * inverse, form), -form.largest, form.largest) * scale
    found = found.reshape(len(rows), -1)[:, : rows.shape[1]]
    return found.astype(rows.dtype, copy=False), np.zeros(rows.shape, np.bool_)


def limited(values: NDArray[np.floating], scheme: Scheme) -> NDArray[np.floating]:
    """What overflowed, as the format has it: infinite, or the largest number of fp8_e4m3, which lacks
    infinities (NaN in older versions of torch)."""
    form = FORMATS[scheme.format]
    if scheme.scale != "cast":
        return values
    top = form.largest if scheme.format == "fp8_e4m3" else np.inf
    return np.where(np.abs(values) > form.largest, np.copysign(top, values), values).astype(values.dtype)
