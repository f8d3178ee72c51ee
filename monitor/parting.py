"""Two runs layer by layer: what is comparable, and where they part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

#: A number has left the other run's when they differ by more than this share of the larger one ...
TOLERANCE = 0.1
#: ... in so many of the captures from then on, of which there are at least FEWEST.
FOR_GOOD = 0.75
FEWEST = 3
#: Captures of exactly the same steps that are enough to compare by.
ENOUGH = 8


class Table(Protocol):
    """One number of all layers over time, such as `frames.Overview`."""

    @property
    def tensors(self) -> Sequence[str]: ...
    @property
    def steps(self) -> NDArray[np.int64]: ...
    @property
    def values(self) -> NDArray[np.float64]: ...


class Pair(NamedTuple):
    """Two tables on common rows and columns.

    Attributes:
        tensors: what both have, in the order of the first.
        steps, steps_b: int64 (n,), the captures that belong together; the same ones when `exact`.
        a, b: float64 (tensors, n).
        only_a, only_b: names without a counterpart.
    """

    tensors: list[str]
    steps: NDArray[np.int64]
    steps_b: NDArray[np.int64]
    a: NDArray[np.float64]
    b: NDArray[np.float64]
    only_a: list[str]
    only_b: list[str]
    exact: bool


class Parting(NamedTuple):
    """Where two runs part.

    Attributes:
        compared: how many captures were compared.
        identical_until: the last step up to which every number is exactly the same; None when the first ones
            differ already, or when no captures of the same steps could be compared.
        identical: every number of every compared capture is the same.
        step, tensor, kind, a, b: the first number that leaves the other run's for good; step None: none does.
    """

    compared: int
    identical_until: int | None = None
    identical: bool = False
    step: int | None = None
    tensor: str = ""
    kind: str = ""
    a: float = np.nan
    b: float = np.nan


def pair(a: Table, b: Table) -> Pair:
    """Layers matched by name, captures by step: equal steps where there are enough, else the nearest ones."""
    known = {name: place for place, name in enumerate(b.tensors)}
    names = [name for name in a.tensors if name in known]
    here, there, exact = matched(a.steps, b.steps)
    rows = [place for place, name in enumerate(a.tensors) if name in known]
    return Pair(
        names,
        a.steps[here],
        b.steps[there],
        a.values[rows][:, here],
        b.values[[known[name] for name in names]][:, there],
        [name for name in a.tensors if name not in known],
        [name for name in b.tensors if name not in set(names)],
        exact,
    )


def matched(a: NDArray[np.int64], b: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.intp], bool]:
    """Which captures of two runs belong together: places in `a`, places in `b`, and whether steps are equal.

    Both ascend. Without enough equal steps every capture of the run with fewer of them is matched to the
    nearest of the other, if that is at most half of its own usual distance away; each is used once.
    """
    _, here, there = np.intersect1d(a, b, assume_unique=True, return_indices=True)
    if len(here) >= min(ENOUGH, len(a), len(b)):
        return here, there, True
    if len(a) > len(b):
        there, here, _ = matched(b, a)
        return here, there, False
    right = np.clip(np.searchsorted(b, a), 1, max(len(b) - 1, 1))
    nearest = np.where(a - b[right - 1] <= b[np.minimum(right, len(b) - 1)] - a, right - 1, right)
    nearest = np.minimum(nearest, len(b) - 1)
    reach = float(np.median(np.diff(a))) / 2 if len(a) > 1 else 0.5
    close = np.flatnonzero(np.abs(a - b[nearest]) <= max(reach, 0.5))
    _, first = np.unique(nearest[close], return_index=True)
    return close[first], nearest[close][first], False


def part(tables: Mapping[str, tuple[Table, Table]], tolerance: float = TOLERANCE) -> Parting:
    """The first step and layer at which two runs part; `tables`: kind -> the numbers of both runs.

    A number that either run lacks is left out. At one step the largest difference counts.
    """
    pairs = {kind: pair(*both) for kind, both in tables.items()}
    pairs = {kind: one for kind, one in pairs.items() if one.tensors and len(one.steps)}
    if not pairs:
        return Parting(0)
    compared = max(len(one.steps) for one in pairs.values())
    until, identical = _identical(list(pairs.values()))
    left = [found for kind, one in pairs.items() if (found := _leaving(kind, one, tolerance))]
    if not left:
        return Parting(compared, until, identical)
    (step, _), kind, row, column = min(left)
    one = pairs[kind]
    ends = float(one.a[row, column]), float(one.b[row, column])
    return Parting(compared, until, identical, step, one.tensors[row], kind, *ends)


def _identical(pairs: list[Pair]) -> tuple[int | None, bool]:
    """The last step up to which all numbers are equal, and whether they are to the end."""
    if not all(one.exact for one in pairs):
        return None, False
    breaks, equal = [], []
    for one in pairs:
        same = ((one.a == one.b) | np.isnan(one.a) | np.isnan(one.b)).all(axis=0)
        breaks += one.steps[~same].tolist()
        equal += one.steps[same].tolist()
    first = min(breaks, default=None)
    before = [step for step in equal if first is None or step < first]
    return max(before, default=None), first is None


def _leaving(kind: str, one: Pair, tolerance: float) -> tuple[tuple[int, float], str, int, int] | None:
    """((step, - difference), kind, row, column) of the first number that leaves for good."""
    far = difference(one.a, one.b)
    count = far.shape[1]
    away, seen = far > tolerance, ~np.isnan(far)
    later = np.cumsum(away[:, ::-1], axis=1)[:, ::-1]
    known = np.cumsum(seen[:, ::-1], axis=1)[:, ::-1]
    gone = away & (later >= FOR_GOOD * known) & (known >= min(FEWEST, count))
    columns = np.flatnonzero(gone.any(axis=0))
    if not len(columns):
        return None
    column = int(columns[0])
    row = int(np.argmax(np.where(gone[:, column], far[:, column], -1.0)))
    return (int(one.steps[column]), -float(far[row, column])), kind, row, column


def difference(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """|a - b| as a share of the larger of both, 0 to 1 for numbers of one sign; NaN where one is missing."""
    largest = np.maximum(np.abs(a), np.abs(b))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(largest > 0, np.abs(a - b) / largest, np.abs(a - b))
