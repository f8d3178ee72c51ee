"""Worse than earlier good runs, and where it parted from them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..courses import Courses, courses, shapes_of
from ..envelopes import Envelope, student
from ..findings import Finding
from ..normal import Departure, Normal, departures
from .history import PERSISTENT, TRAIN_LOSS, VAL_LOSS, Bools, Floats, History, Ints, lasting
from .registry import Unjudged, detector

#: The share of good runs whose outcome may count as worse.
FALSE_ALARMS = 0.005
#: Spread of log(loss) between seeds that is assumed beforehand, as if seen in so many runs.
SEED_SPREAD, SEED_RUNS = 0.05, 2.0
#: A loss is worse by this share of what the baselines learnt at least: with three baselines, and with fewer.
LEAST_LOSS, LEAST_LOSS_FEW = 0.01, 0.05
#: Fewer baselines say little about the spread between seeds.
FEW = 3


class Outcome(NamedTuple):
    """A loss of the run beside that of its baselines, by step."""

    name: str
    steps: Ints
    value: Floats
    middle: Floats  # the median of the baselines
    limit: Floats

    @property
    def worse(self) -> Bools:
        return self.value > self.limit

    @property
    def begin(self) -> int | None:
        """Place from which the run is worse until its end."""
        return lasting(self.worse)


@detector("regression")
def regression(history: History) -> Finding | None:
    """The run ends worse than the earlier good runs it is compared with; or it differs from them.

    An alarm when the loss (of validation, else of training) ends above what a further good run reaches: a
    one-sided prediction interval of 99.5 % (Student's t) from the baselines' own spread, at the last three
    points. It names the first layer whose gradient norm, update ratio, weight norm or activation left the
    baselines' envelope at three captures in a row; the limit is calibrated on the baselines, so that 1 % of
    good runs leave it anywhere. Told apart: a run that left the envelope and is not worse gets a remark.
    """
    normal = history.normal
    if normal is None:
        return None
    own = courses(history)
    result = outcome(own, normal)
    left = departures(normal, own)
    if result is None and not (set(own.layers) & set(normal.layers)):
        raise Unjudged("this run and its baselines have neither layers nor a loss in common")
    begin = None if result is None else result.begin
    layers = by_onset([d for d in left if d.signal != "scalar"], PERSISTENT * history.slack)
    scalars = [d for d in left if d.signal == "scalar" and (result is None or d.name != result.name)]
    if begin is None and not (layers or scalars):
        return None
    evidence = _evidence(normal, result, layers, scalars)
    named = dict.fromkeys(d.name for d in layers)
    where = f" {_where(layers, scalars)}" if layers or scalars else ""
    if result is None or begin is None:
        return history.finding(
            "regression",
            "info",
            f"The run differs from its {_runs(normal)}, and is not worse.{where}",
            first=min(d.first_step for d in layers + scalars),
            layers=named,
            evidence=evidence,
            advice="If nothing was meant to differ, compare code, data and configuration; else nothing.",
            confidence=0.8 if len(normal.runs) >= FEW else 0.5,
        )
    since = int(result.steps[begin])
    return history.finding(
        "regression",
        "warning",
        f"{result.name} ends at {result.value[-1]:.4g}, where {_runs(normal)} had {result.middle[-1]:.4g}; "
        f"it has been worse since step {since}.{where}",
        first=min([since, *(d.first_step for d in layers)]),
        layers=named,
        evidence={**evidence, "worse_since": since},
        advice="Compare code, data, configuration and library versions with the earlier runs"
        + (f", first what concerns {layers[0].name}." if layers else "."),
        confidence=0.9 if len(normal.runs) >= FEW else 0.6,
    )


def notes(history: History) -> list[str]:
    """What could not be compared with the baselines, or only weakly."""
    normal = history.normal
    if normal is None:
        return []
    own = shapes_of(history)
    found = []
    if len(normal.runs) < FEW:
        found.append(
            f"regression was judged by {_runs(normal)} only: how far good runs differ is mostly assumed, and "
            "the limits are wide; three and more show it"
        )
    parts = {
        "lack": [name for name in own if name not in normal.shapes],
        "have another shape of": [n for n in own if n in normal.shapes and normal.shapes[n] != own[n]],
        "have, and this run has not,": [name for name in normal.shapes if name not in own],
    }
    for what, names in parts.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found.append(f"not compared: the baselines {what} {', '.join(names[:3])}{more}")
    if history.last_step > normal.last_step + 2 * history.slack:
        found.append(
            f"layers were compared until step {normal.last_step}, where the baselines end; the run has "
            f"{history.last_step + 1} steps, and its last loss was compared with their last"
        )
    return found


def outcome(own: Courses, normal: Normal) -> Outcome | None:
    """The loss of validation, else of training, that both have; at the same step, or at the end."""
    for name in (*VAL_LOSS, *TRAIN_LOSS):
        course, envelope = own.scalars.get(name), normal.scalars.get(name)
        if course is not None and envelope is not None and course.steps.size >= PERSISTENT:
            middle, limit = loss_limit(envelope, course.steps)
            return Outcome(name, course.steps, course.values[:, 0], middle, limit)
    return None


def loss_limit(envelope: Envelope, steps: Ints) -> tuple[Floats, Floats]:
    """The baselines' median loss at these steps, and what a further good run stays below."""
    each = np.stack([_at(envelope.steps, values, steps) for values in envelope.each])
    count = len(each)
    middle = np.median(each, axis=0)
    free = SEED_RUNS + count - 1
    squares = ((each - each.mean(axis=0)) ** 2).sum(axis=0)
    spread = np.sqrt((SEED_RUNS * SEED_SPREAD**2 + squares) / free)
    high = middle + student(1 - FALSE_ALARMS, free) * spread * math.sqrt(1 + 1 / count)
    plain = np.exp(middle) if envelope.log else middle * envelope.scale
    limit = np.exp(high) if envelope.log else high * envelope.scale
    course = np.exp(envelope.centre[:, 0]) if envelope.log else envelope.centre[:, 0] * envelope.scale
    learnt = float(np.nanmax(course) - np.nanmin(course))
    return plain, np.maximum(limit, plain + (LEAST_LOSS if count >= FEW else LEAST_LOSS_FEW) * learnt)


def _at(steps: Ints, values: Floats, at: Ints) -> Floats:
    known = ~np.isnan(values)
    return np.interp(at, steps[known], values[known])


def by_onset(left: list[Departure], reach: int) -> list[Departure]:
    """The first ones first; of those that left within `reach` steps of the first, the farthest first."""
    if not left:
        return []
    start = min(d.first_step for d in left)
    return sorted(left, key=lambda d: (max(d.first_step - start - reach, 0), -d.excess, d.name))


def _evidence(
    normal: Normal, result: Outcome | None, layers: list[Departure], scalars: list[Departure]
) -> dict[str, float | int | str]:
    found: dict[str, float | int | str] = {"baselines": len(normal.runs)}
    if result is not None:
        ends = result.value[-1], result.middle[-1], result.limit[-1]
        found |= dict(zip(("value", "baseline", "threshold"), map(float, ends), strict=True))
    if layers:
        first = layers[0]
        found |= {
            "layer": first.name, "signal": first.signal, "left_at": first.first_step,
            "distance_in_mads": first.distance, "distance_limit": first.limit,
        }  # fmt: skip
    if scalars:
        found["scalars"] = ", ".join(f"{d.name} (step {d.first_step})" for d in scalars[:5])
    return found


def _where(layers: list[Departure], scalars: list[Departure]) -> str:
    first = scalars[0] if scalars else None
    if not layers:
        return f"{first.name} left their range at step {first.first_step}." if first else ""
    d = layers[0]
    also = f"; {first.name} at step {first.first_step}" if first and first.first_step <= d.first_step else ""
    return (
        f"{d.name} was the first layer to leave their range, at step {d.first_step}: its {d.signal} is "
        f"{d.distance:.3g} mean absolute deviations away (limit {d.limit:.3g}){also}."
    )


def _runs(normal: Normal) -> str:
    return f"{len(normal.runs)} earlier run{'s' * (len(normal.runs) > 1)}"
