"""What became of the training: the symptom that tells a fault that hurts from one that does not."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .history import MATRICES, Floats, History, Ints, Series

#: A loss that has not fallen by 5 % of its start is stalled (TheDeepChecker: less than 5 % decrease).
STALLED = 0.05
#: Within so much of log(classes) a classifier knows no more than the class count.
AT_TRIVIAL = 0.03
#: Losing so much of the progress, or ending above the start, is divergence.
LOST_PROGRESS = 0.3
#: Fewer losses, or steps, tell nothing.
LEAST_POINTS, LEAST_STEPS = 20, 100


#: Why the loss of reinforcement learning tells nothing.
AGENT = "a return or reward is logged, and the loss of an agent rises with what there is to win"


@dataclass(frozen=True)
class Outcome:
    """Facts about the training loss. NaN or None where there is too little to tell."""

    points: int  # finite losses; 0 where they tell nothing
    initial: float  # median of the first three losses
    best: float  # least smoothed loss
    end: float  # median of the last tenth
    noise: float  # robust standard deviation of the loss around its smoothed course
    trivial: float  # log(classes) when the loss looks like a cross-entropy over the output's units, else NaN
    stalled: bool  # it has not fallen, or is still at the trivial level
    diverged: bool  # it ended above its start, or has lost much of its progress
    diverged_step: int | None  # since when
    broken_step: int | None  # first non-finite loss
    lack: str = ""  # why nothing can be told, when nothing can

    @property
    def bad(self) -> bool:
        """The training loss shows that something is wrong."""
        return self.stalled or self.diverged or self.broken_step is not None

    def words(self) -> str:
        """The symptom, for a summary."""
        if self.broken_step is not None:
            return f"the loss is not finite from step {self.broken_step} on"
        if self.diverged:
            return f"the loss rose from {self.best:.4g} to {self.end:.4g}"
        if self.stalled:
            return f"the loss has stalled ({self.initial:.4g} at the start, {self.end:.4g} at the end)"
        if self.lack:
            return f"the outcome is unknown ({self.lack})"
        return f"the loss still fell from {self.initial:.4g} to {self.end:.4g}"


def smooth(series: Series) -> Floats:
    """Trailing running median over a fortieth of the points (5 to 51)."""
    window = int(np.clip(len(series.value) // 40, 5, 51))
    return pd.Series(series.value).rolling(window, min_periods=1).median().to_numpy()


def finite(series: Series) -> Series:
    keep = np.isfinite(series.value)
    return Series(series.step[keep], series.value[keep])


def outcome(history: History) -> Outcome:
    """Judge the training loss of a run; the answer is kept with the history."""
    if "outcome" not in history.__dict__:  # a global cache would keep the tables of old histories
        history.__dict__["outcome"] = _outcome(history)
    return history.__dict__["outcome"]


def _outcome(history: History) -> Outcome:
    losses = history.train_loss
    broken = np.flatnonzero(~np.isfinite(losses.value))
    broken_step = int(losses.step[broken[0]]) if broken.size else None
    series = finite(losses)
    n = len(series.value)
    if lack := _lack(history, n):
        nan = math.nan
        return Outcome(0, nan, nan, nan, nan, nan, False, False, None, broken_step, lack)
    course = smooth(series)
    initial = float(np.median(series.value[:3]))
    end = float(np.median(series.value[-max(3, n // 10) :]))
    noise = 1.4826 * float(np.median(np.abs(series.value - course)))
    best = min(float(course.min()), initial)
    trivial = trivial_loss(history, (float(series.value[0]), initial))
    enough = n >= LEAST_POINTS and int(series.step[-1] - series.step[0]) >= LEAST_STEPS
    diverged_step = _diverged(series.step, course, initial, best, noise) if n >= LEAST_POINTS else None
    return Outcome(
        points=n,
        initial=initial,
        best=best,
        end=end,
        noise=noise,
        trivial=trivial,
        stalled=enough and _stalled(initial, end, trivial),
        diverged=diverged_step is not None,
        diverged_step=diverged_step,
        broken_step=broken_step,
    )


def _lack(history: History, points: int) -> str:
    """Why the training loss does not tell the outcome; "" when it does."""
    if not len(history.train_loss.step):
        return "no training loss was logged (train_loss or loss)"
    if points < 3:
        return f"only {points} finite training losses were logged"
    # Preference tuning logs rewards too, as `rewards/...`, but its loss must fall.
    names = (n.lower() for n in history.source.scalar_names() if not n.lower().startswith("rewards/"))
    if any(re.search(r"(?<![a-z])(returns?|rewards?|rew)(?![a-z])", name) for name in names):
        return AGENT
    return ""


def trivial_loss(history: History, initial: tuple[float, ...]) -> float:
    """log(classes) when the loss is a softmax cross-entropy, as far as the log tells, else NaN.

    It is when the output's gradient sums to zero over the classes, as prediction - label does, and the loss
    started no higher than a third above log(classes). Where that cannot be seen (penalties on the logits,
    gradients that underflow, none captured) the first loss must be within a tenth of log(classes)
    (TheDeepChecker's test: a fresh classifier starts there). A fresh network cannot know its task: where its
    loss starts far below log(classes), it is in other units (of a micro-batch, in bits), and the level of a
    guess is not known.
    """
    classes = _classes(history, initial[-1])
    if classes < 2:
        return math.nan
    level = math.log(classes)
    if max(initial) < 0.8 * level and _fresh(history):
        return math.nan
    last = predictor(history, initial[-1])
    if last and sums_to_zero(history, last):
        near = initial[-1] <= 1.35 * level
    else:
        near = min(abs(first - level) for first in initial) <= 0.1 * level
    return level if near else math.nan


def _fresh(history: History) -> bool:
    """Training began with an initialisation, as far as that can be told."""
    from .drift import trained_modules

    trained = list(trained_modules(history).values())
    return not history.resumed and bool(trained) and not any(trained)


def sums_to_zero(history: History, tensor: str) -> bool:
    """The tensor's gradient sums to zero at the typical capture, as prediction - label does over the
    classes.
    """
    mean, rms = (history.table("gradient", column, (tensor,))[:, 0] for column in ("mean", "rms"))
    known = np.nan_to_num(rms) > 0
    return bool(known.sum() >= 3 and np.median(np.abs(mean[known]) / rms[known]) < 1e-3)


def predictor(history: History, initial: float | None = None) -> str | None:
    """The matrix that makes the predictions: the last one that receives gradient, as a rule.

    A head may be defined before the body. Where the last matrix shows no softmax, and its number of units
    does not fit the first loss (within a third of its logarithm), it is the last that does both, if any.
    """
    if "predictor" not in history.__dict__:
        if initial is None:
            initial = outcome(history).initial
            return predictor(history, initial)
        history.__dict__["predictor"] = _predictor(history, initial)
    return history.__dict__["predictor"]


def _predictor(history: History, initial: float) -> str | None:
    last = history.output
    if last is None or sums_to_zero(history, last):
        return last
    fits = []
    for name in history.names(*MATRICES):
        shape = history.of(name, "shape")
        level = math.log(shape[0]) if len(shape) >= 2 and shape[0] > 1 else math.nan
        if abs(initial - level) <= 0.35 * level:
            fits.append(name)
    return next((n for n in reversed(fits) if sums_to_zero(history, n)), last) if last not in fits else last


def _classes(history: History, initial: float) -> int:
    """Rows of the matrix that makes the predictions, or of an embedding that is tied to it."""
    table = history.tensors
    tied = table.index[(table["role"] == "embedding") & (table["names"].map(len) > 1)]
    last = str(tied[-1]) if len(tied) else predictor(history, initial)
    shape = history.of(last, "shape") if last else []
    return int(shape[0]) if len(shape) >= 2 else 0


def _stalled(initial: float, end: float, trivial: float) -> bool:
    if math.isfinite(trivial) and initial < 0.8 * trivial:
        return False  # it knew its task already: little was left to learn
    at_trivial = math.isfinite(trivial) and end >= (1 - AT_TRIVIAL) * trivial
    return at_trivial or end >= initial - STALLED * abs(initial)


def _diverged(steps: Ints, course: Floats, initial: float, best: float, noise: float) -> int | None:
    """The step from which the smoothed loss stays above its best by much of the progress made, until the
    end.
    """
    progress = max(initial - best, 0.0)
    least = max(5 * noise, 0.05 * abs(initial))
    limit = min(best + max(LOST_PROGRESS * progress, least), initial + max(0.2 * abs(initial), least))
    limit = max(limit, best + least)
    below = np.flatnonzero(course <= limit)
    begin = int(below[-1]) + 1 if below.size else 0
    long_enough = course.size - begin >= max(3, course.size // 20)
    return int(steps[begin]) if long_enough else None
