"""What runs are compared by: their settings, their scalars, their layers; all as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ...monitor import Run
from ...monitor.parting import Pair, Parting, pair, part
from ...monitor.schema import SYSTEM
from ..figures.compare import MAX_RUNS
from ..figures.grid import build
from ..queries import Library

#: Captures of all layers that are compared; of longer runs each holds several.
POINTS = 1024
FIRST = ("train_loss", "val_loss")


class Layers(NamedTuple):
    """One number of all layers over time."""

    tensors: list[str]
    steps: np.ndarray
    values: np.ndarray


def chosen(value: Any, library: Library, name: str) -> tuple[list[str], list[str]]:
    """The runs of a `with` (a list, or names with commas between) after the page's own, and unknown names."""
    known = library.runs()
    if isinstance(value, str):
        value = [value] if value in known else value.split(",")
    wanted = [one for one in dict.fromkeys(str(part) for part in value or []) if one and one != name]
    found = [name, *(one for one in wanted if one in known)]
    return found[:MAX_RUNS], [one for one in wanted if one not in known]


def pair_of(names: Sequence[str], one: str, two: str) -> tuple[str, str]:
    """A and B: the chosen ones if they are among the runs and two, else the first two."""
    first = one if one in names else names[0]
    second = two if two in names and two != first else next(n for n in names if n != first)
    return first, second


def scalar_names(library: Library, names: Sequence[str]) -> list[str]:
    """Scalars of any of these runs, the losses first; what tells of the machine is left out."""
    found = {scalar for name in names for scalar in library.run(name).scalar_names()}
    found = {scalar for scalar in found if not scalar.startswith(SYSTEM)}
    return [name for name in FIRST if name in found] + sorted(found - set(FIRST))


def common_layers(library: Library, names: Sequence[str]) -> list[str]:
    """The tensors of all runs, those first that every run has."""
    runs = [library.run(name).tensors()["tensor"].tolist() for name in names]
    in_all = set(runs[0]).intersection(*runs[1:])
    return sorted(dict.fromkeys(name for run in runs for name in run), key=lambda name: name not in in_all)


def norms(library: Library, run: Run, kind: str) -> Layers:
    """The norms of one kind, remembered until the run grows."""

    def make() -> Layers:
        found = run.overview(kind, "norm", POINTS)
        return Layers(found.tensors, found.steps, found.values)

    return library.memo(run, ("compare", kind), make)


def drifts(library: Library, run: Run) -> Layers:
    """Relative distances from the reference, remembered until the run grows."""

    def make() -> Layers:
        frame = run.drift(max_points=POINTS)
        found = build(frame, frame["relative_l2"].to_numpy())
        return Layers(found.names, found.steps, found.values)

    return library.memo(run, ("compare", "drift"), make)


def parting(library: Library, a: Run, b: Run) -> tuple[Parting, Pair]:
    """Where two runs part by their weight and gradient norms, and how their weights match."""
    kinds = ("weight", "gradient")
    tables = {kind: (norms(library, a, kind), norms(library, b, kind)) for kind in kinds}
    return part(tables), pair(*tables["weight"])
