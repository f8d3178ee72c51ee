"""What is normal for a training: the envelopes of its good runs, and what of a run left them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .courses import Course, Courses, better, courses
from .envelopes import PERSISTENT, PRIOR, Envelope, apart, envelope_of, persistent, picked, scalar_envelope

if TYPE_CHECKING:
    from .detectors.history import Floats
    from .run import Run

#: The share of good runs that may leave the envelopes somewhere: per run, over layers, signals and steps.
FALSE_ALARMS = 0.01


@dataclass(frozen=True, eq=False)
class Normal:
    """What is normal for one model and training.

    Attributes:
        runs: names of the good runs. shapes: tensor -> shape. last_step: until where they can be compared.
        layers: signal -> envelope. scalars: name -> envelope.
    """

    runs: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    last_step: int
    layers: dict[str, Envelope]
    scalars: dict[str, Envelope]


class Departure(NamedTuple):
    """Where one number of a run left its envelope."""

    signal: str
    name: str
    first_step: int
    last_step: int
    distance: float  # in spreads: exceeded at three captures in a row
    limit: float

    @property
    def excess(self) -> float:
        return self.distance / self.limit


def learn(runs: Sequence[Courses]) -> Normal:
    """The envelopes of good runs, at least one, with limits that a further good run rarely leaves.

    A tensor that has several shapes among them is taken with the most frequent one.
    """
    runs = sorted(runs, key=_order)  # their order must not matter, not even by a rounding error
    shapes = _shapes(runs)
    end = int(np.median([run.last_step for run in runs]))
    layers: dict[str, list[Course]] = {}
    scalars: dict[str, list[Course]] = {}
    for run in runs:
        for signal, course in run.layers.items():
            if (kept := comparable(run, course, shapes)) is not None:
                layers.setdefault(signal, []).append(kept)
        for name, course in run.scalars.items():
            scalars.setdefault(name, []).append(course)
    scalars = {name: found for name, found in sorted(scalars.items()) if 2 * len(found) >= len(runs)}
    level = 1 - FALSE_ALARMS / max(len(layers) + len(scalars), 1)
    envelopes = {signal: envelope_of(found, end, PRIOR[signal], level) for signal, found in layers.items()}
    known = {name: scalar_envelope(name, found, end, level) for name, found in scalars.items()}
    return Normal(
        tuple(run.name for run in runs),
        shapes,
        end,
        {signal: e for signal, e in envelopes.items() if e is not None},
        {name: e for name, e in known.items() if e is not None},
    )


def learn_runs(runs: Iterable[Run]) -> Normal:
    """`learn` from logs, one after the other, so that one at a time is in memory."""
    from .detectors.history import History
    from .detectors.thinned import sparing

    return learn([courses(History(sparing(run))) for run in runs])


def known(baselines: Sequence[Run] | Normal) -> Normal | None:
    """What is normal by these baselines; None when there are none."""
    if isinstance(baselines, Normal):
        return baselines
    return learn_runs(baselines) if baselines else None


def _order(run: Courses) -> tuple[str, int, float]:
    total = sum(float(np.nansum(course.values)) for course in (*run.layers.values(), *run.scalars.values()))
    return run.name, run.last_step, total


def _shapes(runs: Sequence[Courses]) -> dict[str, tuple[int, ...]]:
    seen: dict[str, list[tuple[int, ...]]] = {}
    for run in runs:
        for name, shape in run.shapes.items():
            seen.setdefault(name, []).append(shape)
    return {name: max(sorted(set(found)), key=found.count) for name, found in seen.items()}


def departures(normal: Normal, own: Courses) -> list[Departure]:
    """What of a run left the envelopes, the earliest first. Of a scalar only the worse side counts."""
    found = []
    for signal, envelope in normal.layers.items():
        course = own.layers.get(signal)
        if course is not None and (course := comparable(own, course, normal.shapes)) is not None:
            course = picked(course, envelope.names)
            found += _leaving(signal, envelope, course, np.abs(apart(envelope, course, normal.last_step)))
    for name, envelope in normal.scalars.items():
        if name in own.scalars:
            course = own.scalars[name]
            course = Course(course.names, course.steps, envelope.scaled(course.values))
            away = apart(envelope, course, normal.last_step)
            side = -better(name)
            found += _leaving("scalar", envelope, course, side * away if side else np.abs(away))
    return sorted(found, key=lambda d: (d.first_step, -d.excess, d.signal, d.name))


def comparable(run: Courses, course: Course, shapes: Mapping[str, tuple[int, ...]]) -> Course | None:
    """Of a run's course those tensors that have these shapes, and the modules that hold no other."""
    other = {name for name, shape in run.shapes.items() if shapes.get(name) != shape}
    modules = {name.rpartition(".")[0] for name in other}
    keep = tuple(n for n in course.names if n not in other and (n in run.shapes or n not in modules))
    return picked(course, keep) if keep else None


def _leaving(signal: str, envelope: Envelope, course: Course, away: Floats) -> list[Departure]:
    """Layers that left for three captures and more."""
    if len(away) < PERSISTENT:
        return []
    kept = np.nan_to_num(persistent(away))
    found = []
    for column in np.flatnonzero((kept > envelope.limit).any(axis=0)):
        outside = np.flatnonzero(kept[:, column] > envelope.limit)
        first, last = outside[0], outside[-1] + PERSISTENT - 1
        name = course.names[column]
        steps = int(course.steps[first]), int(course.steps[last])
        found.append(Departure(signal, name, *steps, float(kept[:, column].max()), envelope.limit))
    return found
