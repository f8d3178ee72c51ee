"""The part of a run that shows a finding, read for a screen.

Only the layers that are named and a few to compare with, thinned to what a plot can show, so that it costs
the same on a run of a hundred steps and of a hundred thousand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..monitor.detectors import History
from ..monitor.detectors.history import MATRICES, Floats
from .figures.evidence import MAX_CURVES, Evidence

if TYPE_CHECKING:
    from ..monitor import Run
    from ..monitor.findings import Finding

POINTS = 600  # of each layer
COMPARED = 24  # matrices that stand for all of them

Table = Callable[[History, tuple[str, ...]], Floats]


class Excerpt:
    """A run as detectors read it, of these tensors, modules and steps only."""

    def __init__(self, run: Run, names: Sequence[str], steps: tuple[int, int] | None) -> None:
        self._run, self._names, self._steps = run, list(names), steps
        self.name, self.info = run.name, run.info
        self.scalars, self.scalar_names = run.scalars, run.scalar_names
        self.tensors, self.modules = run.tensors, run.modules
        self.activity, self.events, self.checksums = run.activity, run.events, run.checksums

    def stats(
        self, kind: str, tensor: str | None = None, columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """`Run.stats` of the excerpt."""
        steps = None if kind == "initial_weight" else self._steps
        return self._run.stats(kind, tensor or self._names, columns, steps=steps, max_points=POINTS)

    def drift(self) -> pd.DataFrame:
        """`Run.drift` of the excerpt."""
        return self._run.drift(self._names)


@dataclass(frozen=True)
class Case:
    """A finding and the part of its run that shows it."""

    history: History
    finding: Finding
    named: tuple[str, ...]  # the layers that the plot shows, the selected one first
    others: tuple[str, ...]  # matrices that stand for the whole network

    def threshold(self, default: float) -> float:
        """The one that the detector has used."""
        value = self.finding.evidence.get("threshold", default)
        return default if isinstance(value, str) else float(value)

    def value(self, key: str) -> float | None:
        """A number of the evidence."""
        value = self.finding.evidence.get(key)
        return None if value is None or isinstance(value, str) else float(value)


def case(run: Run, finding: Finding, selected: str = "", steps: tuple[float, float] | None = None) -> Case:
    """Choose what to read. `steps`: what is on screen; a margin is read on both sides."""
    tensors = run.tensors()
    matrices = tensors.loc[
        tensors["role"].isin(MATRICES) & tensors["trainable"].astype(bool), "tensor"
    ].tolist()
    places = np.linspace(0, len(matrices) - 1, min(COMPARED, len(matrices)))
    others: tuple[str, ...] = tuple(matrices[i] for i in np.unique(places.round().astype(int)))
    first = [selected] if selected in finding.layers else []
    named = tuple(list(dict.fromkeys([*first, *finding.layers]))[:MAX_CURVES])
    known: dict[str, str] = tensors.set_index("tensor")["module"].to_dict()
    ends = [*others[:1], *others[-1:], *named]
    modules = [known[name] for name in ends if name in known]
    biases = [t for t, module in known.items() if module in set(modules)]
    wanted = list(dict.fromkeys([*named, *others, *modules, *biases]))
    part = None
    if steps:
        margin = max(0.1 * (steps[1] - steps[0]), 2)
        part = (max(math.floor(steps[0] - margin), 0), math.ceil(steps[1] + margin))
    return Case(History(Excerpt(run, wanted, part)), finding, named, others)


def over_layers(values: Floats) -> Floats:
    """The median of the layers by capture, NaN where none has a number."""
    return pd.DataFrame(values).median(axis=1).to_numpy()


def column(kind: str, name: str) -> Table:
    """A column of the statistics."""
    return lambda h, names: h.table(kind, name, names)


def quotient(above: Table, below: Table) -> Table:
    """One by the other, NaN where there is nothing to divide by."""

    def read(h: History, names: tuple[str, ...]) -> Floats:
        one, two = above(h, names), below(h, names)
        return np.divide(one, two, out=np.full(one.shape, np.nan), where=two > 0)

    return read


def of_layers(
    what: str,
    table: Table,
    *,
    log: bool = True,
    limit: str = "",
    default: float = math.nan,
    typical: bool = True,
) -> Callable[[Case], Evidence]:
    """The named layers against the median of the network. `limit`: the words at the threshold's line."""

    def read(c: Case) -> Evidence:
        h = c.history
        named = c.named or c.others[:: max(1, len(c.others) // 4)][:4]
        values = table(h, named)
        curves = {name: (h.steps, values[:, i]) for i, name in enumerate(named)}
        others: dict[str, Any] = {}
        if typical and len(c.others) > 2:
            others["median of all layers"] = (h.steps, over_layers(table(h, c.others)))
        level = c.threshold(default)
        limits = {limit: level} if limit and math.isfinite(level) else {}
        return Evidence(what, _capped(h.steps, curves), others, limits, log)

    return read


def _capped(steps: np.ndarray, curves: dict[str, Any]) -> dict[str, Any]:
    """Without the layers that have no number at all, unless that holds for all."""
    known = {name: c for name, c in curves.items() if np.isfinite(c[1]).any()}
    return known or curves


def of_scalar(
    what: str, *names: str, log: bool = False, limit: str = "", default: float = math.nan
) -> Callable[[Case], Evidence]:
    """A logged scalar, all of it."""

    def read(c: Case) -> Evidence:
        series = c.history.scalar(*names)
        level = c.threshold(default)
        limits = {limit: level} if limit and math.isfinite(level) else {}
        return Evidence(what, {what: (series.step, series.value)}, {}, limits, log)

    return read


def losses(c: Case, limits: dict[str, float], log: bool = False) -> Evidence:
    """Both losses, with the level that matters."""
    h = c.history
    named = {"training loss": h.train_loss, "validation loss": h.val_loss}
    curves = {name: (s.step, s.value) for name, s in named.items() if s.step.size}
    return Evidence("loss", curves, {}, limits, log)


def anything(c: Case) -> Evidence:
    """For a problem that we know nothing of: gradient norms, weight norms, or the losses."""
    if not c.named:
        return losses(c, {})
    for kind in ("gradient", "weight", "activation"):
        found = of_layers(f"{kind} norm", column(kind, "norm"))(c)
        if any(np.isfinite(values).any() for _, values in found.curves.values()):
            return found
    return losses(c, {})
