"""The table of detectors, which anyone can extend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points

from ..findings import Finding
from .history import History

Detector = Callable[[History], Finding | None]

#: Distributions name their own detectors in this entry point group; each entry is a module to import, or a
#: function.
GROUP = "layerwatch.detectors"

FAMILIES = (
    "nonfinite",
    "gradients",
    "units",
    "parameters",
    "rates",
    "layers",
    "precision",
    "scales",
    "data",
    "attention",
    "losses",
    "overfitting",
    "regression",
    "drift",
    "replicas",
    "quantising",
)
_table: dict[tuple[str, str], tuple[str, Detector]] = {}


class Unjudged(Exception):
    """A detector cannot tell, and the message says why: it becomes a note beside the findings."""


def detector(problem: str) -> Callable[[Detector], Detector]:
    """Register a function `History -> Finding | None` for a problem code.

    The function must be pure. It returns None when the run is healthy in its eyes and raises `Unjudged` when
    the log lacks what it needs. Of several detectors of one problem the worst finding counts.
    """

    def register(function: Detector) -> Detector:
        _table[problem, f"{function.__module__}.{function.__qualname__}"] = (problem, function)
        return function

    return register


def registered() -> tuple[list[tuple[str, Detector]], list[str]]:
    """All detectors as (problem, function), and notes about plug-ins that could not be loaded.

    The order is that of the families, then of the names of other modules, whatever was imported first: notes
    and ties come out alike in every process.
    """
    modules = [import_module(f".{family}", __package__).__name__ for family in FAMILIES]
    notes = list(_load_plugins())

    def place(entry: tuple[str, Detector]) -> tuple[int, str]:
        module = entry[1].__module__
        return (modules.index(module), "") if module in modules else (len(modules), module)

    return sorted(_table.values(), key=place), notes


@functools.cache
def _load_plugins() -> tuple[str, ...]:
    notes = []
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # a broken plug-in of somebody else must not take the detectors away
            notes.append(
                f"the detectors of {entry.value!r} could not be loaded: {type(error).__name__}: {error}"
            )
    return tuple(notes)
