"""Overfitting: validation turned back while the training went on; and what can be said without validation."""

from __future__ import annotations

import math

import numpy as np

from ..findings import Finding, Number, Severity
from ..growth import then_and_now
from .history import MATRICES, Floats, History, Series, portion
from .outcome import finite, outcome
from .registry import Unjudged, detector
from .validation import Course, course, early_stop

#: Prechelt's generalisation loss GL = 100 (E_val / E_opt - 1): 5 is his largest setting; 20 is severe.
GENERALISATION_LOSS, SEVERE = 5.0, 20.0
#: A rise of GL 1 that goes on over three strips (Prechelt's UP_3) is a remark.
SLIGHT, RISING = 1.0, 3
#: Successive evaluations without a new best.
PATIENCE = 3
#: The rise is at least this share of what was learnt.
OF_LEARNT = 0.02
#: The training loss fell by so much since the best evaluation.
STILL_FALLING = 0.05
#: Without a validation loss: an accuracy that fell by so much (two points), or severely (ten).
ACCURACY_LOST, ACCURACY_SEVERE = 0.02, 0.1
#: Without any validation: a training loss below this share of its start, weights that grew by so much since.
MEMORISED, GROWING = 0.05, 0.1
#: Layers that are named, and the change of their norm or drift that is worth a name.
MOST_LAYERS, MOVED = 5, 0.01

#: Names under which a validation accuracy is looked for, in this order.
VAL_ACCURACY = tuple(
    f"{half}{mark}{metric}"
    for half in ("val", "eval", "valid", "validation")
    for mark in ("_", "/")
    for metric in ("accuracy", "acc")
)


@detector("overfitting")
def overfitting(history: History) -> Finding | None:
    """Validation turned back while the training loss went on falling.

    Prechelt's GL above 5 % (median of the last evaluations against the smoothed best), no new best for three
    evaluations, a rise beyond the noise of the evaluations and 2 % of what was learnt, and a training loss
    that fell by 5 % since. A GL of 1 to 5 that goes on rising (UP_3) is a remark. Critical from a GL of 20,
    but not while validation comes back, nor when the validation accuracy is as good as ever. Where only an
    accuracy was logged: two points below its best. Told apart: noisy validation sets, dropout, augmentation
    or label smoothing that keep validation and training apart (validation is compared with its own best
    only), divergence (the training loss rises too). Without any validation: a remark at most.
    """
    if outcome(history).diverged:
        return None
    losses, accuracy = finite(history.val_loss), finite(history.scalar(*VAL_ACCURACY))
    if losses.value.size:
        return _by_loss(history, losses, accuracy)
    if accuracy.value.size:
        return _by_accuracy(history, accuracy)
    return _unverifiable(history)


def _by_loss(history: History, losses: Series, accuracy: Series) -> Finding | None:
    if (losses.value <= 0).any():
        raise Unjudged("val_loss is not positive, so that its rise has no size to be compared with")
    went, facts = course(*losses), outcome(history)
    if went is None or went.since < PATIENCE or not went.turned:
        return None
    learnt = float(np.nanmax([facts.initial, went.start])) - went.level
    gl = went.generalisation_loss
    small = gl < GENERALISATION_LOSS or went.rise < OF_LEARNT * learnt
    if not _training_fell(history, went.best) or (small and (gl < SLIGHT or went.rising < RISING)):
        return None
    kept = _accuracy_kept(accuracy, went.best)
    return _finding(
        history,
        went,
        "info" if small or went.recovering else "critical" if gl >= SEVERE and not kept else "warning",
        f"val_loss has been rising since step {went.best}, when it was at its best: it is "
        f"{portion(1 + gl / 100)} that now ({went.level:.4g}, now {went.now:.4g}{_and_since(went, kept)}), "
        f"while {_training_words(history)}.",
        {"generalisation_loss": gl, "threshold": GENERALISATION_LOSS},
        losses,
    )


def _by_accuracy(history: History, accuracy: Series) -> Finding | None:
    """No validation loss was logged: the accuracy must say it, in points."""
    top = 100.0 if accuracy.value.max() > 1.5 else 1.0
    cost = 1.0 - accuracy.value / top
    went = course(accuracy.step, cost)
    if went is None or went.since < PATIENCE or not went.turned or went.rise < ACCURACY_LOST:
        return None
    if not _training_fell(history, went.best):
        return None
    return _finding(
        history,
        went,
        "info" if went.recovering else "critical" if went.rise >= ACCURACY_SEVERE else "warning",
        f"The validation accuracy has been falling since step {went.best}: from {1 - went.level:.1%} to "
        f"{1 - went.now:.1%}{', and it is coming back' * went.recovering}, while {_training_words(history)}.",
        {"accuracy_lost": went.rise, "threshold": ACCURACY_LOST},
        Series(accuracy.step, cost),
    )


def _finding(
    history: History,
    went: Course,
    severity: Severity,
    summary: str,
    evidence: dict[str, Number],
    series: Series,
) -> Finding:
    layers, moved = _moved_most(history, went.best)
    return history.finding(
        "overfitting",
        severity,
        summary,
        first=went.best,
        layers=layers,
        evidence={
            **evidence,
            "evaluations_since_best": went.since,
            "rising_strips": went.rising,
            "noise": went.noise,
            "rise_over_margin": went.rise / went.margin if went.margin > 0 else math.inf,
            **_stops(series, history.last_step),
            **moved,
        },
        advice=_advice(went, series),
        confidence=0.9 if severity != "info" else 0.6,
    )


def _stops(series: Series, end: int) -> dict[str, Number]:
    """What early stopping with a patience of 3 and of 5 would have done."""
    found: dict[str, Number] = {}
    for patience in (PATIENCE, 5):
        stop = early_stop(*series, patience, end=end)
        if stop is not None and stop.at is not None:
            found[f"patience_{patience}_stops_at"] = stop.at
            found[f"patience_{patience}_keeps"] = stop.kept
            found[f"patience_{patience}_value"] = stop.value
    return found


def _advice(went: Course, series: Series) -> str:
    stop = early_stop(*series, PATIENCE)
    early = f" (early stopping with patience {PATIENCE} would have kept step {stop.kept})" if stop else ""
    return (
        f"Keep the weights of about step {went.best}{early}; add weight decay, dropout, augmentation or data."
    )


def _and_since(went: Course, kept: bool) -> str:
    """What speaks for the run."""
    if went.recovering:
        return f"; it was {went.peak:.4g} and is coming back"
    return "; the accuracy is as good as ever: the predictions became too sure" if kept else ""


def _accuracy_kept(accuracy: Series, best: int) -> bool:
    """The accuracy is as good as when the validation loss was at its best, to within its noise."""
    went = course(accuracy.step, -accuracy.value)
    around = accuracy.value[np.abs(accuracy.step - best).argsort()[:3]]
    return went is not None and -went.now + went.noise >= float(np.median(around))


def _training_fell(history: History, since: int) -> bool:
    """The training loss is now at least 5 % below what it was around `since`; True when none was logged."""
    series = finite(history.train_loss)
    if series.step.size < 6:
        return series.step.size == 0
    width = max(3, series.step.size // 20)
    at = int(np.searchsorted(series.step, since))
    around = series.value[max(0, at - width // 2) : at + width]
    if not around.size:
        return False
    before, now = float(np.median(around)), float(np.median(series.value[-width:]))
    return now < before - STILL_FALLING * abs(before)


def _training_words(history: History) -> str:
    facts = outcome(history)
    if not facts.points:
        return "no training loss was logged"
    return f"the training loss went on falling (to {facts.end:.4g})"


def _norms(history: History) -> tuple[tuple[str, ...], Floats]:
    names = history.names(*MATRICES, "embedding")
    return names, history.table("weight", "norm", names)


def _moved_most(history: History, best: int) -> tuple[list[str], dict[str, Number]]:
    """The layers whose distance from the reference, else whose norm, grew most since the best step."""
    names, norms = _norms(history)
    if not names or not history.captures:
        return [], {}
    before, now = then_and_now(history.steps, norms, best)
    growth = np.divide(now, before, out=np.full(before.shape, np.nan), where=before > 0) - 1
    near, far = then_and_now(history.steps, history.table("drift", "relative_l2", names), best)
    score = np.where(np.isfinite(far - near), far - near, growth)
    order = [int(i) for i in np.argsort(-np.nan_to_num(score, nan=-np.inf)) if score[i] > MOVED]
    evidence: dict[str, Number] = {"weight_growth": _whole(history, best)}
    if order:
        evidence["largest_change"] = float(score[order[0]])
    return [names[i] for i in order[:MOST_LAYERS]], evidence


def _whole(history: History, since: int) -> float:
    """By what factor the norm of all matrices together changed."""
    _, norms = _norms(history)
    before, now = then_and_now(history.steps, np.sqrt((norms**2).sum(axis=1, keepdims=True)), since)
    return float(now[0] / before[0]) if before[0] > 0 else math.nan


def _unverifiable(history: History) -> Finding | None:
    """No validation at all, and two signs of memorising: the training loss is next to nothing, and the
    weights go on growing. Easy tasks show both: never more than a remark.
    """
    facts, series = outcome(history), finite(history.train_loss)
    names = history.source.scalar_names()
    several = len(history.info.get("optimizers") or []) > 1
    if several or facts.points < 50 or facts.bad or any(n.startswith(("val", "eval", "test")) for n in names):
        return None
    if not facts.initial > 0 or facts.end > MEMORISED * facts.initial or (series.value < 0).any():
        return None
    since = int(series.step[np.flatnonzero(series.value < MEMORISED * facts.initial)[0]])
    if not history.captures:
        return None
    growth = _whole(history, since)
    if not growth > 1 + GROWING:
        return None
    layers, _ = _moved_most(history, since)
    return history.finding(
        "overfitting",
        "info",
        f"Whether this carries over cannot be told: the training loss is {facts.end / facts.initial:.2g} of "
        f"its start, the weights grew by {growth - 1:.0%} since step {since}, and no validation was logged.",
        first=since,
        layers=layers,
        evidence={
            "loss_over_start": facts.end / facts.initial,
            "threshold": MEMORISED,
            "weight_growth": growth,
        },
        advice="Hold a tenth of the data out and log val_loss.",
        confidence=0.3,
    )
