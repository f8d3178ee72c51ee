"""Envelopes: how far good runs of one training differ, in one signal, at every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .courses import Course

if TYPE_CHECKING:
    from .detectors.history import Floats, Ints

#: An envelope has so many points at most, and so many captures of a run in each at least.
POINTS, CAPTURES = 64, 2
#: So many consecutive captures must lie outside.
PERSISTENT = 3
#: Spread between two good runs that is assumed while few are known, as a share of the value.
PRIOR = {
    "gradient norm": 0.15, "update ratio": 0.1, "weight norm": 0.03,
    "gradient norm of vectors": 0.2, "update ratio of vectors": 0.2, "weight norm of vectors": 0.1,
    "activation rms": 0.1,
}  # fmt: skip
PRIOR_SCALAR = 0.1
#: A layer's own spread counts as much as that of all layers once so many runs are known beside the first.
PRIOR_RUNS = 2.0
#: No smaller spread is believed.
FLOOR = 0.01
#: The least limit, in mean absolute deviations; and that of a single baseline, which cannot be measured.
LEAST_LIMIT, LIMIT_ALONE = 6.0, 12.0
#: Standard deviation of log(largest distance of a good run) that is assumed, as if seen in so many runs.
MAXIMA_SD, MAXIMA_RUNS = 0.3, 12.0


@dataclass(frozen=True, eq=False)
class Envelope:
    """One signal of several layers, or one scalar, over good runs.

    Attributes:
        steps: (g,), ascending. centre, spread: (g, len(names)), the median of the runs and their mean
            absolute deviation from it. limit: how many spreads a good run may be away.
        log: values are natural logarithms; else they are divided by `scale`.
        each: (runs, g), the single runs of a scalar.
    """

    names: tuple[str, ...]
    steps: Ints
    centre: Floats
    spread: Floats
    limit: float
    log: bool = True
    scale: float = 1.0
    each: Floats = field(default_factory=lambda: np.empty((0, 0)))

    def scaled(self, values: Floats) -> Floats:
        """Values of a scalar as they are compared."""
        return _scaled(values, self.log, self.scale)


def _scaled(values: Floats, log: bool, scale: float) -> Floats:
    return np.log(np.maximum(values, 1e-300)) if log else values / scale


def envelope_of(
    runs: Sequence[Course], end: int, prior: float, level: float, log: bool = True, scale: float = 1.0
) -> Envelope | None:
    names = tuple(dict.fromkeys(name for run in runs for name in run.names))
    runs = [picked(run, names) for run in runs]
    edges = _edges(runs, end)
    if edges.size < 2:
        return None
    steps = _middles(runs, edges)
    binned = np.stack([_binned(run, edges) for run in runs])
    centre, spread = _middle_and_spread(runs, binned, steps, edges, prior)
    maxima = []
    for out in range(len(runs)) if len(runs) > 1 else ():
        rest = [run for place, run in enumerate(runs) if place != out]
        parts = _middle_and_spread(rest, np.delete(binned, out, axis=0), steps, edges, prior)
        without = Envelope(names, steps, *parts, limit=0.0)
        maxima.append(_largest(np.abs(apart(without, runs[out], end))))
    each = binned[:, :, 0] if len(names) == 1 else np.empty((0, 0))
    return Envelope(names, steps, centre, spread, _limit(maxima, level), log, scale, each)


def scalar_envelope(name: str, found: Sequence[Course], end: int, level: float) -> Envelope | None:
    every = np.concatenate([course.values[:, 0] for course in found])
    log = bool((every > 0).all())
    scale = 1.0 if log else float(np.median(np.abs(every[every != 0]))) if (every != 0).any() else 1.0
    ready = [Course((name,), c.steps, _scaled(c.values, log, scale)) for c in found]
    return envelope_of(ready, end, PRIOR_SCALAR, level, log, scale)


def _edges(runs: Sequence[Course], end: int) -> Ints:
    """First steps of the bins, by the captures of the run with the fewest per step; finer at the start."""
    sparse = max(runs, key=lambda run: float(np.median(np.diff(run.steps))) if run.steps.size > 1 else 0.0)
    steps = sparse.steps[sparse.steps <= end]
    if steps.size < PERSISTENT:
        return steps[:0]
    count = int(np.clip(steps.size // CAPTURES, 1, POINTS))
    at = np.arange(count)
    places = np.maximum(at * CAPTURES, (steps.size * (at / count) ** 2).astype(int))
    return np.append(steps[np.unique(places)], end + 1)


def _middles(runs: Sequence[Course], edges: Ints) -> Ints:
    steps = np.unique(np.concatenate([run.steps for run in runs]))
    parts = np.split(steps, np.searchsorted(steps, edges))[1:-1]
    return np.array([part[len(part) // 2] for part in parts], np.int64)


def _binned(run: Course, edges: Ints) -> Floats:
    """Mean of each bin, (bins, names); empty bins are filled from their neighbours."""
    means = _averaged(run, run.values, edges)
    return pd.DataFrame(means).interpolate(limit_area="inside").to_numpy() if np.isnan(means).any() else means


def _median(values: Floats) -> Floats:
    """Median over the first axis; NaN is left out."""
    if not np.isnan(values).any():
        return np.median(values, axis=0)
    flat = values.reshape(values.shape[0], -1)
    order = np.sort(flat, axis=0)  # NaN last
    known = np.sum(~np.isnan(flat), axis=0)
    low, high = np.maximum((known - 1) // 2, 0), known // 2
    columns = np.arange(flat.shape[1])
    return (0.5 * (order[low, columns] + order[np.minimum(high, len(order) - 1), columns])).reshape(
        values.shape[1:]
    )


def _middle_and_spread(
    runs: Sequence[Course], binned: Floats, steps: Ints, edges: Ints, prior: float
) -> tuple[Floats, Floats]:
    """Median over the runs, and the mean absolute deviation of their captures from it, both (bins, names)."""
    centre = _median(binned)
    count = len(runs)
    away = [np.abs(run.values - _between(steps, centre, run.steps)) for run in runs]
    each = np.stack([_averaged(run, values, edges) for run, values in zip(runs, away, strict=True)])
    known = ~np.isnan(each)
    own = np.where(known, each, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    own = np.where(known.any(axis=0), own, np.nan)
    own = pd.DataFrame(own).rolling(5, center=True, min_periods=1).mean().to_numpy()
    own = own * math.sqrt(count / (count - 1)) if count > 1 else own
    weight = (count - 1) / (count - 1 + PRIOR_RUNS)
    typical = weight * _median(own.T)[:, None] + (1 - weight) * prior
    return centre, np.maximum(weight * own + (1 - weight) * np.maximum(typical, own), FLOOR)


def _averaged(run: Course, values: Floats, edges: Ints) -> Floats:
    """Mean of each bin, (bins, names); NaN where it is empty."""
    known = ~np.isnan(values)
    at = np.searchsorted(run.steps, edges)
    sums = np.vstack([np.zeros((1, values.shape[1])), np.cumsum(np.where(known, values, 0.0), axis=0)])[at]
    counts = np.vstack([np.zeros((1, values.shape[1])), np.cumsum(known, axis=0)])[at]
    total, count = np.diff(sums, axis=0), np.diff(counts, axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _between(steps: Ints, values: Floats, at: Ints) -> Floats:
    """Rows of `values` interpolated at other steps; the ends hold."""
    if steps.size == 1:
        return np.repeat(values, len(at), axis=0)
    right = np.clip(np.searchsorted(steps, at), 1, steps.size - 1)
    share = np.clip((at - steps[right - 1]) / (steps[right] - steps[right - 1]), 0.0, 1.0)[:, None]
    return values[right - 1] * (1 - share) + values[right] * share


def apart(envelope: Envelope, course: Course, end: int) -> Floats:
    """Signed distances in spreads, (n, names); NaN beyond the end of the baselines."""
    centre = _between(envelope.steps, envelope.centre, course.steps)
    spread = _between(envelope.steps, envelope.spread, course.steps)
    return np.where((course.steps <= end)[:, None], (course.values - centre) / spread, np.nan)


def persistent(away: Floats) -> Floats:
    """The distance that each stretch of three captures exceeds throughout, (n - 2, names)."""
    return np.min([away[i : len(away) - PERSISTENT + 1 + i] for i in range(PERSISTENT)], axis=0)


def _largest(away: Floats) -> float:
    """The largest distance that a run keeps for three captures, in any of its layers."""
    if len(away) < PERSISTENT:
        return 0.0
    return float(np.nan_to_num(persistent(away)).max(initial=0.0))


def _limit(maxima: Sequence[float], level: float) -> float:
    """What the largest distance of a further run stays below with probability `level`.

    A prediction interval on the logarithm (Student's t) from the distances of each run to the others.
    """
    if not maxima:
        return LIMIT_ALONE
    logs = np.log(np.maximum(maxima, 1.0))
    free = MAXIMA_RUNS + len(logs) - 1
    sd = math.sqrt((MAXIMA_RUNS * MAXIMA_SD**2 + float(((logs - logs.mean()) ** 2).sum())) / free)
    high = float(logs.mean()) + student(level, free) * sd * math.sqrt(1 + 1 / len(logs))
    return max(LEAST_LIMIT, math.exp(high))


def student(level: float, free: float) -> float:
    """Quantile of Student's t; with x = sqrt(free) tan(a) its density goes as cos(a) ** (free - 1)."""
    if free > 1000:
        return NormalDist().inv_cdf(level)
    angle = np.linspace(-np.pi / 2, np.pi / 2, 20001)
    mass = np.cumsum(np.maximum(np.cos(angle), 0.0) ** (free - 1))
    return math.sqrt(free) * math.tan(float(np.interp(level, mass / mass[-1], angle)))


def picked(course: Course, names: tuple[str, ...]) -> Course:
    """The columns of these names, in this order; NaN where the course has none."""
    if names == course.names:
        return course
    place = pd.Index(course.names).get_indexer(pd.Index(names))
    values = np.where(place >= 0, course.values[:, place], np.nan)
    return Course(names, course.steps, values)
