"""Gradients that explode or vanish on their way through the network.

Both detectors measure a layer's *leverage* |g| |w| / L: how much the loss L changes, relatively, when the
layer's weights change by a small share in the steepest direction. It has no units: scaling the loss, the
weights before a normalisation layer (whose gradient goes as 1 / |w|, Hoffer et al. 2018) or the width does
not change it, so layers can be compared.
"""

from __future__ import annotations

import math

import numpy as np

from ..findings import Finding
from .history import MATRICES, Bools, Floats, History, lasting, nanmedian, persistent
from .outcome import outcome, predictor, smooth, sums_to_zero
from .registry import Unjudged, detector

#: Leverage of a healthy layer is about 0.1 to 30; 300 means that a change of 0.3 % doubles the loss.
EXPLODING = 300.0
#: So many times the limit is no accident at two captures either.
EXTREME = 30.0
#: First over last layers (AUTOTRAINER: 70 for exploding, beta1 = 1e-3 for vanishing).
UNEVEN, VANISHING = 70.0, 1e-3
#: Growth of the gradient norm over its usual size that, with a rising loss, is an explosion under way.
GROWTH = 100.0
#: Rank correlation of leverage with depth: a trend through the network, not one odd layer.
TREND = 0.7
#: Layers whose update ratio is below this share of the median hardly move.
BARELY_MOVING = 1e-2
#: A mean of prediction - label cannot leave [-1, 1] (5 % for rounding); it does in so many captures at least.
BEYOND_BATCH, OFTEN = 1.05, 0.1
#: Gradients that grow so many times within so many steps and repeat themselves from capture to capture:
#: among gradients that grow so, fresh batches leave an autocorrelation below 0.2, piled ones have 0.7 to 1.
PILED, PILING_STEPS, REPEATING = 3.0, 20, 0.5


def optimized(history: History) -> tuple[str, ...]:
    """The matrices that an optimizer has: the gradients of others are never reset and mean nothing."""
    return tuple(n for n in history.names(*MATRICES) if history.of(n, "state") != "no_optimizer")


def leverage(history: History, names: tuple[str, ...]) -> Floats:
    """|g| |w| / max(loss, first loss) per capture and tensor; NaN where gradient or loss is missing."""
    facts = outcome(history)
    scale = abs(facts.initial)
    if not scale > 0:
        return np.full((history.captures, len(names)), np.nan)
    losses = history.train_loss
    course = np.abs(smooth(losses))
    at = np.clip(np.searchsorted(losses.step, history.steps, side="right") - 1, 0, len(course) - 1)
    level = np.fmax(np.nan_to_num(course[at]), scale)
    with np.errstate(over="ignore"):
        product = history.table("gradient", "norm", names) * history.table("weight", "norm", names)
    product[history.skipped] = np.nan
    return product / level[:, None]


def _whole(norms: Floats) -> Floats:
    """The norm of all tensors together, per capture."""
    with np.errstate(over="ignore"):
        return np.sqrt(np.nansum(np.where(np.isfinite(norms), norms, np.nan) ** 2, axis=1))


def _trend(values: Floats) -> Floats:
    """Spearman's rank correlation of each row, of at least two values, with its order."""
    size = values.shape[1]
    apart = np.argsort(np.argsort(values, axis=1), axis=1) - np.arange(size)
    return 1 - 6 * (apart.astype(float) ** 2).sum(axis=1) / (size * (size**2 - 1))


def _ends(values: Floats) -> Floats:
    """The median of each row's first third over that of its last third."""
    third = max(1, values.shape[1] // 3)
    return np.median(values[:, :third], axis=1) / np.median(values[:, -third:], axis=1)


def _depth_profile(history: History, names: tuple[str, ...], table: Floats) -> tuple[Floats, Floats]:
    """Per capture: leverage of the first third over that of the last third, and the trend with depth."""
    ratio, trend = np.full(history.captures, np.nan), np.full(history.captures, np.nan)
    known = np.isfinite(table) & (table > 0)
    alike: dict[bytes, list[int]] = {}  # rows where the same layers are known are judged together
    for row, mask in enumerate(known):
        alike.setdefault(mask.tobytes(), []).append(row)
    for rows in alike.values():
        values = table[rows][:, known[rows[0]]]
        if values.shape[1] >= 4:
            ratio[rows], trend[rows] = _ends(values), _trend(values)
    return ratio, trend


@detector("exploding_gradients")
def exploding_gradients(history: History) -> Finding | None:
    """Gradients far too large for the weights that they belong to.

    Any of: a layer's leverage above 300 at three consecutive captures (30 times that at two); the gradient
    norm 100 times its usual size while the loss rises (persistently); leverage of the first layers more than
    70 times that of the last with a clear trend through the depth, and a training that fails. Taken before
    clipping. Told
    apart: warm-up, batch size, loss scaling and sum-reduced losses change gradients, not leverage; a
    converging loss does not raise it, because the first loss bounds the denominator from below.
    """
    names = optimized(history)
    table = leverage(history, names)
    if not np.isfinite(table).any():
        if (lack := outcome(history).lack) and history.captures:
            raise Unjudged(lack)  # gradients are measured against the loss
        return None
    return (
        _too_much_leverage(history, names, table) or _sudden(history, names) or _uneven(history, names, table)
    )


def _too_much_leverage(history: History, names: tuple[str, ...], table: Floats) -> Finding | None:
    hits = np.nan_to_num(table) > EXPLODING
    often: Bools = np.any(hits, axis=1)
    begin = persistent(often)
    if begin is None:  # far beyond the limit two captures are enough: they may be many steps apart
        begin = persistent(np.any(np.nan_to_num(table) > EXTREME * EXPLODING, axis=1), 2)
    if begin is None:
        # Recurrent networks explode in bursts: a fifth of all captures is no accident either.
        if often.mean() < 0.2 or often.sum() < 3:
            return None
        begin = int(np.flatnonzero(often)[0])
    facts = outcome(history)
    peak = np.nanmax(np.where(np.isfinite(table), table, np.nan), axis=0, initial=0.0)
    worst = [names[i] for i in np.argsort(-np.nan_to_num(peak)) if hits[:, i].any()]
    top = float(np.nanmax(peak))
    return history.finding(
        "exploding_gradients",
        "critical" if facts.bad else "warning",
        f"Gradients explode in {worst[0]} from step {history.steps[begin]}: a change of its weights by 0.1 "
        "% would change "
        f"the loss by up to {top / 10:.3g} %, and {facts.words()}.",
        first=history.steps[begin],
        last=history.steps[np.flatnonzero(often)[-1]],
        layers=worst,
        evidence={"leverage": top, "threshold": EXPLODING, "share_of_captures": float(often.mean())},
        advice="Clip the gradient norm (1.0), and check the scale of the initial weights and inputs; for "
        "recurrent layers use "
        "orthogonal initialisation, LSTM or GRU.",
        confidence=0.95 if facts.bad else 0.8,
    )


def _sudden(history: History, names: tuple[str, ...]) -> Finding | None:
    facts = outcome(history)
    norms = history.table("gradient", "norm", names).copy()
    norms[history.skipped] = np.nan
    total = _whole(norms)
    if facts.diverged_step is None or history.captures < 8:
        return None
    before = (history.steps < facts.diverged_step) & (total > 0)
    if before.sum() < 5:
        return None
    usual = float(np.median(total[before]))
    begin = persistent((total > GROWTH * usual) & (history.steps >= facts.diverged_step - 2 * history.slack))
    if begin is None or usual == 0:
        return None
    growth = norms[begin] / np.maximum(nanmedian(norms[before], axis=0), 1e-300)
    worst = [names[i] for i in np.argsort(-np.nan_to_num(growth))]
    return history.finding(
        "exploding_gradients",
        "critical",
        f"The gradient norm grew to {total[begin:].max() / usual:.3g} times its usual size from step "
        f"{history.steps[begin]}, "
        f"and {facts.words()}.",
        first=history.steps[begin],
        layers=worst[:5],
        evidence={"growth": float(total[begin:].max() / usual), "threshold": GROWTH},
        advice="Lower the learning rate or warm it up, and clip the gradient norm (1.0).",
    )


def _uneven(history: History, names: tuple[str, ...], table: Floats) -> Finding | None:
    facts = outcome(history)
    if not facts.bad:
        return None
    ratio, trend = _depth_profile(history, names, table)
    hits = (np.nan_to_num(ratio) > UNEVEN) & (np.nan_to_num(trend) < -TREND)
    begin = persistent(hits)
    if begin is None:
        return None
    worst = [names[i] for i in np.argsort(-np.nan_to_num(nanmedian(table[hits], axis=0)))]
    return history.finding(
        "exploding_gradients",
        "critical",
        f"Gradients grow towards the first layers: their leverage is {np.nanmedian(ratio[hits]):.3g} times "
        "that of the last "
        f"layers from step {history.steps[begin]}, and {facts.words()}.",
        first=history.steps[begin],
        last=history.steps[np.flatnonzero(hits)[-1]],
        layers=worst[:5],
        evidence={"first_over_last": float(np.nanmedian(ratio[hits])), "threshold": UNEVEN},
        advice="Check the scale of the initial weights (He or Xavier), add normalisation, clip the "
        "gradient norm (1.0).",
        confidence=0.8,
    )


@detector("vanishing_gradients")
def vanishing_gradients(history: History) -> Finding | None:
    """The first layers receive next to no gradient compared with the last ones.

    Median leverage of the first third of the matrices below 1/1000 of the last third's (AUTOTRAINER's beta1)
    with a rank correlation with depth of at least 0.7, at three consecutive captures. Told apart: one odd
    layer (a key projection, a zero-gamma branch, LoRA's A while B is 0, embeddings) is no trend through the
    depth; pre-norm weights have their leverage, not their gradient, compared; exact zeros belong to dead or
    unused units. Without a stalled loss it is an alarm only when the first layers also hardly move (Adam
    rescales small gradients: then it does no harm).
    """
    names = history.names(*MATRICES)
    table = leverage(history, names)
    ratio, trend = _depth_profile(history, names, table)
    hits = (ratio < VANISHING) & (trend > TREND)
    begin = persistent(hits)
    if begin is None:
        return None
    facts = outcome(history)
    typical = nanmedian(table[hits], axis=0)
    order = [
        i
        for i in np.argsort(np.where(typical > 0, typical, np.inf))
        if typical[i] < VANISHING * np.nanmax(typical)
    ]
    if not facts.stalled and not (_barely_move(history, names, order) and lasting(hits) is not None):
        return None
    value = float(np.nanmedian(ratio[hits]))
    return history.finding(
        "vanishing_gradients",
        "critical" if facts.stalled else "warning",
        f"Gradients vanish on the way to {names[order[0]]}: the first layers' leverage is {value:.2g} of "
        "the last layers' from "
        f"step {history.steps[begin]}, and {facts.words()}.",
        first=history.steps[begin],
        last=history.steps[np.flatnonzero(hits)[-1]],
        layers=[names[i] for i in order],
        evidence={
            "first_over_last": value,
            "threshold": VANISHING,
            "trend": float(np.nanmedian(trend[hits])),
        },
        advice="Use ReLU or GELU instead of sigmoid or tanh, residual connections or normalisation "
        "layers, and He or Xavier "
        "initialisation.",
        confidence=0.95 if facts.stalled else 0.7,
    )


def _barely_move(history: History, names: tuple[str, ...], order: list[int]) -> bool:
    # Only the part across the weight: the part along it is weight decay.
    across = np.sqrt(np.clip(1 - history.table("update", "along", names) ** 2, 0.0, 1.0))
    ratios = nanmedian(history.table("update", "ratio", names) * across, axis=0)
    usual = nanmedian(ratios)
    return bool(order) and nanmedian(ratios[order]) < BARELY_MOVING * usual


def softmax_bias(history: History) -> str | None:
    """The bias of the layer that makes the predictions, when its gradient shows a softmax cross-entropy.

    That gradient is the batch mean of prediction - label: it sums to zero over at least three classes.
    """
    name = predictor(history)
    if name is None:
        return None
    biases = [
        n
        for n in history.names("bias")
        if history.of(n, "module") == history.of(name, "module") and history.of(n, "state") != "no_optimizer"
    ]
    return next((n for n in biases if history.of(n, "elements") >= 3 and sums_to_zero(history, n)), None)


@detector("stale_gradients")
def stale_gradients(history: History) -> Finding | None:
    """Gradients that are never reset, so that every step repeats all earlier ones.

    For a classifier: the gradient of the output's bias is a mean of prediction - label and cannot leave [-1,
    1]. It starts inside and is outside in at least a tenth of the captures. For any model captured every few
    steps: the gradient norm grows threefold within the first 20 steps, and from capture to capture gradients
    hardly change: the mean of the typical matrix's gradient, relative to its norm, has an autocorrelation
    above 0.5. (That of the mean itself would be decided by the few largest gradients of a training that
    diverges.) Told apart: a sum-reduced loss is outside from the start; gradients of fresh batches are noise
    from step to step, and those of a full batch do not grow while the loss falls.
    """
    if history.captures < 5:
        return None
    return _beyond_one_batch(history) or _repeating(history)


_RESET = (
    "Call optimizer.zero_grad() once per step; divide an accumulated loss by the number of micro-batches."
)


def _beyond_one_batch(history: History) -> Finding | None:
    bias = softmax_bias(history)
    if bias is None:
        return None
    size = np.nanmax(
        np.abs(np.hstack([history.table("gradient", column, (bias,)) for column in ("min", "max")])),
        axis=1,
        initial=0.0,
    )
    # A mean cross-entropy starts at log(classes); one that starts higher may have been multiplied.
    units = outcome(history).initial / math.log(history.of(bias, "elements"))
    size = size / max(1.0, units)
    outside = size > BEYOND_BATCH
    begin = persistent(outside)
    if begin is None or not size[0] < 0.7 or outside.mean() < OFTEN:
        return None
    facts = outcome(history)
    first = int(np.argmax(size > 2 * size[0])) if size[0] > 0 else begin
    return history.finding(
        "stale_gradients",
        "critical" if facts.bad else "warning",
        f"Gradients pile up over the steps: that of {bias} reaches {size.max():.3g}, where one batch can "
        f"give at most 1, and {facts.words()}.",
        first=history.steps[min(first, begin)],
        evidence={
            "bias_gradient": float(size.max()),
            "threshold": BEYOND_BATCH,
            "share_of_captures": float(outside.mean()),
        },
        advice=_RESET,
        confidence=0.9,
    )


def piling(history: History) -> tuple[float, float] | None:
    """How gradients grow within the first steps, and the autocorrelation of their means over their norms from
    capture to capture, when both are those of gradients that are not reset.
    """
    if history.slack > PILING_STEPS // 2 or history.captures < 12 or history.steps[0] > 1:
        return None
    names = optimized(history)
    norms, means = (history.table("gradient", column, names) for column in ("norm", "mean"))
    total = _whole(norms)
    early = total[history.steps <= PILING_STEPS]
    growth = float(early.max() / early[0]) if 0 < early[0] < np.inf else 0.0
    if not growth > PILED:
        return None
    with np.errstate(all="ignore"):
        likeness = nanmedian(_autocorrelation(means / norms))
    return (growth, likeness) if likeness > REPEATING else None


def _repeating(history: History) -> Finding | None:
    facts = outcome(history)
    seen = piling(history)
    if seen is None or not facts.bad:  # raw targets, epochs over one batch: they repeat and work
        return None
    growth, likeness = seen
    return history.finding(
        "stale_gradients",
        "critical",
        f"Gradients pile up over the steps: they grow {growth:.3g} times within {PILING_STEPS} steps and "
        f"hardly change from one capture to the next (autocorrelation {likeness:.2f}), and {facts.words()}.",
        first=history.steps[0],
        evidence={"autocorrelation": likeness, "threshold": REPEATING, "growth": growth},
        advice=_RESET,
        confidence=0.75,
    )


def _autocorrelation(values: Floats) -> Floats:
    """Of each column's finite values, (columns,): the correlation of neighbours; NaN for constants."""
    known = np.isfinite(values[:-1]) & np.isfinite(values[1:])
    count = np.maximum(known.sum(axis=0), 1)
    a, b = (np.where(known, part, 0.0) for part in (values[:-1], values[1:]))
    a, b = (np.where(known, part - part.sum(axis=0) / count, 0.0) for part in (a, b))
    with np.errstate(all="ignore"):
        return (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
