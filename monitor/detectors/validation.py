"""How validation went: its best, whether it turned back by more than its noise, and what early stopping would
have done. The overfitting detector and the dashboard's page both ask here.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from .history import Floats, Ints

#: Fewer evaluations tell nothing.
LEAST_EVALUATIONS = 6
#: Standard errors by which the end must be worse than the best, beyond what the best of many evaluations is
#: better by luck.
NOISE = 3.0
#: A rise of which at least this share is gone again.
RECOVERED = 0.5


@dataclass(frozen=True)
class Stop:
    """What an early-stopping rule did.

    Attributes:
        kept, value: the step whose weights the rule would have kept, and its validation value.
        at: the step at which it would have stopped; None when it had no reason to.
        best, best_value: the best validation of the whole run.
        end: the last step of the run.
    """

    kept: int
    value: float
    at: int | None
    best: int
    best_value: float
    end: int

    @property
    def saved(self) -> int:
        """Steps that would not have been trained."""
        return 0 if self.at is None else max(self.end - self.at, 0)


def early_stop(
    steps: Ints, values: Floats, patience: int, delta: float = 0.0, *, falls: bool = True, end: int = 0
) -> Stop | None:
    """Stop at the `patience`-th validation in a row that is no improvement.

    An improvement is better than the best so far by more than `delta` times its size. NaN is none.
    None when no validation was finite.
    """
    if not np.isfinite(values).any():
        return None
    better = -1.0 if falls else 1.0
    kept, level, waited, at = -1, math.nan, 0, None
    for place, value in enumerate(values):
        if math.isfinite(value) and (kept < 0 or better * (value - level) > delta * abs(level)):
            kept, level, waited = place, float(value), 0
            continue
        waited += kept >= 0
        if waited >= patience:
            at = int(steps[place])
            break
    best = int(np.nanargmax(np.where(np.isfinite(values), better * values, -np.inf)))
    last = max(end, int(steps[-1]))
    return Stop(int(steps[kept]), level, at, int(steps[best]), float(values[best]), last)


@dataclass(frozen=True)
class Course:
    """How a cost (less is better) went over the evaluations.

    Attributes:
        best: the step of the best evaluation, of those around the best smoothed one. level: the latter.
        start: the first evaluation. now: the median of the last ones. peak: the worst smoothed one since the
            best.
        since: evaluations since the best. rising: how many strips of evaluations in a row, counted back from
            the end, are each worse than the one before (Prechelt's UP).
        noise: robust standard deviation of one evaluation. margin: the rise that noise alone may show.
    """

    best: int
    level: float
    start: float
    now: float
    peak: float
    since: int
    rising: int
    noise: float
    margin: float

    @property
    def rise(self) -> float:
        return self.now - self.level

    @property
    def turned(self) -> bool:
        """Worse than the best by more than noise shows."""
        return self.rise > self.margin

    @property
    def recovering(self) -> bool:
        """Much of the rise is gone again, by more than noise shows (double descent)."""
        back = self.peak - self.now
        return back > self.margin and back > RECOVERED * (self.peak - self.level)

    @property
    def generalisation_loss(self) -> float:
        """Prechelt's GL: percent above the best."""
        return 100 * self.rise / self.level if self.level > 0 else math.nan


def course(steps: Ints, cost: Floats) -> Course | None:
    """Judge finite evaluations in order of their steps; None when they are too few.

    Smoothed over a tenth of them (3 to 15), so that many evaluations do not make one lucky best. Their noise
    is that of each around the line between its neighbours, at and after the best: no trend enters it.
    """
    n = cost.size
    if n < LEAST_EVALUATIONS:
        return None
    width = int(np.clip(n // 10, 3, 15)) | 1
    smoothed = running_median(cost, width)
    place = int(np.argmin(smoothed))
    around = slice(max(0, place - width // 2), place + width // 2 + 1)
    best = around.start + int(np.argmin(cost[around]))
    noise = _noise(cost[max(0, min(place, n - 8)) :])
    error = noise * 1.25 * math.sqrt(2 / width)  # of the difference of two medians
    return Course(
        best=int(steps[best]),
        level=float(smoothed[place]),
        start=float(cost[0]),
        now=float(np.median(cost[-width:])),
        peak=float(smoothed[place:].max()),
        since=n - 1 - best,
        rising=_rising(cost[best:], width),
        noise=noise,
        margin=error * (NOISE + math.sqrt(2 * math.log(n))),
    )


def running_median(values: Floats, width: int = 3) -> Floats:
    """Centred running median; reflected at the ends, so that one odd value there is no plateau."""
    padded = np.pad(values, width // 2, mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)


def _noise(values: Floats) -> float:
    """Robust standard deviation around the neighbours' mean; at least the smallest step between two values
    (accuracies of small sets come in steps).
    """
    if values.size < 3:
        return 0.0
    bend = values[1:-1] - (values[:-2] + values[2:]) / 2
    steps = np.abs(np.diff(values))
    finest = float(steps[steps > 0].min(initial=math.inf))
    robust = 1.4826 * float(np.median(np.abs(bend))) / math.sqrt(1.5)
    return max(robust, finest if math.isfinite(finest) else 0.0)


def _rising(values: Floats, width: int) -> int:
    """Successive strips of `width` evaluations, back from the end, each with a higher median."""
    strips = [np.median(values[max(0, end - width) : end]) for end in range(values.size, 0, -width)]
    falls = [later <= before for later, before in itertools.pairwise(strips)]
    return falls.index(True) if True in falls else len(falls)
