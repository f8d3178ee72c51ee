"""Layers against each other and against their own start: how fast they move, how large they grow."""

from __future__ import annotations

import math

import numpy as np

from ..findings import Finding
from .history import MATRICES, History, nanmedian, persistent
from .outcome import LEAST_STEPS, outcome
from .rates import fan_in, update_ratios
from .registry import detector

#: Update ratios of matrices that differ by more (torchmortem: 100 for gradient norms; healthy runs stay below
#: 10).
IMBALANCE = 100.0
#: A weight that grew to so many times its first size (torchmortem: 10).
GROWN = 10.0


@detector("layer_imbalance")
def layer_imbalance(history: History) -> Finding | None:
    """Some matrices move hundreds of times slower than others of the same network.

    The largest median update ratio is more than 100 times the smallest, over matrices of the same kind that
    receive gradient and are meant to move, in most captures. Told apart: learning rates of zero, embeddings,
    LoRA, weights near zero, the first hundred steps (branches that start at zero wake up in them).
    """
    names = history.names(*MATRICES)
    if len(names) < 2 or history.captures < 5 or history.steps[-1] - history.steps[0] < LEAST_STEPS:
        return None
    ratio = update_ratios(history, names)
    ratio[ratio == 0] = np.nan
    ratio[history.has_state(names, "lr_zero")] = np.nan
    usual = nanmedian(ratio, axis=0)
    known = np.flatnonzero(np.isfinite(usual))
    if known.size < 2:
        return None
    with np.errstate(all="ignore"):
        spread = np.nanmax(np.nan_to_num(ratio[:, known]), axis=1) / np.nanmin(
            np.where(ratio[:, known] > 0, ratio[:, known], np.inf), axis=1
        )
    if usual[known].max() < IMBALANCE * usual[known].min() or np.mean(spread > IMBALANCE) < 0.5:
        return None
    value = float(usual[known].max() / usual[known].min())
    slow = [
        i for i in known[np.argsort(usual[known])] if usual[i] * math.sqrt(IMBALANCE) < usual[known].max()
    ]
    return history.finding(
        "layer_imbalance",
        "warning",
        f"{names[slow[0]]} changes by {usual[slow[0]]:.2g} of its size per step, {value:.3g} times less "
        "than the fastest matrix.",
        first=history.steps[0],
        layers=[names[i] for i in slow],
        evidence={"spread": value, "threshold": IMBALANCE},
        advice="Check the learning rates of the param groups and the gradient that reaches the slow layers.",
        confidence=0.8,
    )


@detector("weight_growth")
def weight_growth(history: History) -> Finding | None:
    """A matrix grew to ten times its first size (torchmortem).

    Told apart: weights that start near zero on purpose (below a tenth of the usual size for their shape), the
    slow growth of weights before a normalisation layer, which is not tenfold, and the layer that makes the
    predictions: in a regression that works it grows to the size of targets that are not normalised.
    """
    names = history.names(*MATRICES)
    first = history.initial("norm", names)
    rms = history.initial("rms", names)
    norm = history.table("weight", "norm", names)
    if not names or history.captures < 5 or not np.isfinite(first).any():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = norm / first
    growth[:, ~(rms * np.sqrt(fan_in(history, names)) > 0.1)] = np.nan
    facts = outcome(history)
    if not facts.bad and math.isnan(facts.trivial):
        growth[:, [n == history.output for n in names]] = np.nan
    grown = np.nan_to_num(growth) >= GROWN
    begin = persistent(np.any(grown, axis=1))
    if begin is None:
        return None
    peak = np.nanmax(np.where(np.isfinite(growth), growth, np.nan), axis=0, initial=0.0)
    order = [int(i) for i in np.argsort(-peak) if peak[i] >= GROWN]
    # Where that growth started, not where it passed ten times.
    small = np.flatnonzero(np.nan_to_num(growth[: begin + 1, order[0]]) < GROWN / 3)
    started = min(begin, int(small[-1]) + 1 if small.size else 0)
    return history.finding(
        "weight_growth",
        "critical" if facts.bad else "warning",
        f"{names[order[0]]} grew to {peak[order[0]]:.3g} times its first size, and {facts.words()}.",
        first=history.steps[started],
        layers=[names[i] for i in order],
        evidence={"growth": float(peak[order[0]]), "threshold": GROWN},
        advice="Lower the learning rate of that layer, check the signs of penalty terms, and use weight "
        "decay.",
        confidence=0.8,
    )
