"""What depth does to a quantity: the slope over the layers, their blocks, what their shapes promise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..text import integer, number

#: A slope is named from so many layers on, when it makes a factor of ten over them and is not mere scatter.
LEAST_LAYERS, LEAST_DECADES, LEAST_FIT = 4, 1.0, 0.6
#: At most so many pairs are looked at for the median slope.
MOST_LAYERS = 300


class Slope(NamedTuple):
    """`per_layer` decades from one layer to the next, over so many `layers`; `fit`: rank correlation."""

    per_layer: float
    layers: int
    fit: float

    @property
    def decades(self) -> float:
        """From the first layer to the last."""
        return self.per_layer * (self.layers - 1)

    @property
    def steep(self) -> bool:
        """Worth a sentence."""
        far = abs(self.decades) >= LEAST_DECADES and abs(self.fit) >= LEAST_FIT
        return far and self.layers >= LEAST_LAYERS


def slope(values: Sequence[float] | np.ndarray) -> Slope:
    """The median slope (Theil and Sen) of the logarithms of what is positive, in order of depth.

    One layer that is far off does not tilt it.
    """
    values = np.asarray(values, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        kept = np.flatnonzero(np.isfinite(values) & (values > 0))
    if len(kept) < 2:
        return Slope(0.0, len(kept), 0.0)
    y = np.log10(values[kept])
    chosen = np.unique(np.linspace(0, len(kept) - 1, min(len(kept), MOST_LAYERS)).astype(int))
    first, second = np.triu_indices(len(chosen), 1)
    first, second = chosen[first], chosen[second]
    per_layer = float(np.median((y[second] - y[first]) / (second - first)))
    ranks = np.argsort(np.argsort(y, kind="stable"), kind="stable")
    fit = float(np.corrcoef(np.arange(len(y)), ranks)[0, 1]) if np.ptp(y) > 0 else 0.0
    return Slope(per_layer, len(kept), fit)


def slope_sentence(found: Slope, what: str, step: int, backward: bool) -> str:
    """The slope in words when it is steep, else "". `backward`: the quantity runs from the output to the
    input."""
    if not found.steep:
        return ""
    way = "output to input" if backward else "input to output"
    change = -found.decades if backward else found.decades
    verb, name = ("grows", "exploding") if change > 0 else ("shrinks", "vanishing")
    return (
        f"At step {integer(step)} the {what} {verb} from {way} by {number(abs(found.per_layer))} decades a "
        f"layer, {number(abs(found.decades))} over {found.layers} layers: {name}."
    )


def he(shape: Sequence[int]) -> float:
    """Standard deviation of weights that keeps the signal's scale through ReLU (He et al. 2015)."""
    return math.sqrt(2 / _fans(shape)[0]) if len(shape) > 1 else math.nan


def xavier(shape: Sequence[int]) -> float:
    """Standard deviation of weights that keeps signal and gradient through tanh (Glorot and Bengio 2010)."""
    return math.sqrt(2 / sum(_fans(shape))) if len(shape) > 1 else math.nan


def _fans(shape: Sequence[int]) -> tuple[int, int]:
    """Inputs and outputs of a unit; `shape` is (out, in, kernel ...)."""
    kernel = math.prod(shape[2:])
    return max(1, shape[1] * kernel), max(1, shape[0] * kernel)
