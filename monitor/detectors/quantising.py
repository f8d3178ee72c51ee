"""Weights that rounding to few bits would spoil: a remark, as it does no harm to the training."""

from __future__ import annotations

import math

import numpy as np

from ..findings import Finding
from .history import MATRICES, Floats, History, nanmedian
from .registry import detector

#: Signal to noise, in decibels, of a matrix rounded to 8 bits with one scale for all of it: below this the
#: error passes a tenth of the weights' own size.
LEAST_SQNR = 20.0
#: Of the captures at the end, the median counts.
LAST_CAPTURES = 3


@detector("quantisation_risk")
def quantisation_risk(history: History) -> Finding | None:
    """Matrices of which a few outliers take the range of 8-bit integers for themselves.

    Symmetric rounding with one scale s = max|w| / 127 has an error of s^2 / 12 on average (uniform within a
    step; Widrow and Kollar 2008), so SQNR = 12 (127 rms / max|w|)^2. Told apart: biases, gains and
    embeddings, which are usually kept in 16 bits.
    """
    names = history.names(*MATRICES)
    values = outliers(history, names)
    if not values.size:
        return None
    worst = nanmedian(values[-LAST_CAPTURES:], axis=0)
    limit = math.sqrt(12 * 127**2 / 10 ** (LEAST_SQNR / 10))
    chosen = sorted((i for i, ratio in enumerate(worst) if ratio > limit), key=lambda i: -worst[i])
    if not chosen:
        return None
    layers = [names[i] for i in chosen]
    largest = float(worst[chosen[0]])
    sqnr = 10 * math.log10(12 * (127 / largest) ** 2)
    first = int(np.argmax(values[:, chosen[0]] > limit))
    return history.finding(
        "quantisation_risk",
        "info",
        f"The largest weight of {layers[0]} is {largest:.3g} times the root mean square of the matrix: "
        f"rounded to 8 bits with one scale, {sqnr:.1f} dB of signal to noise are left.",
        first=history.steps[first],
        layers=layers,
        evidence={"sqnr_db": sqnr, "largest_over_rms": largest, "matrices": len(layers), "threshold": limit},
        advice="Quantise these by channel or leave them in 16 bits; a rotation or SmoothQuant spreads "
        "outliers.",
        confidence=0.8,
    )


def outliers(history: History, names: tuple[str, ...]) -> Floats:
    """Largest magnitude over root mean square of each matrix (captures, names); NaN where there is none."""
    low, high = history.table("weight", "min", names), history.table("weight", "max", names)
    rms = history.table("weight", "rms", names)
    largest = np.maximum(np.abs(low), np.abs(high))
    return np.divide(largest, rms, out=np.full(rms.shape, np.nan), where=rms > 0)
