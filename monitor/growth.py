"""How much the weights of a run grew and moved: all together, and the layers that did so most."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .detectors.history import MATRICES, Floats, Ints

if TYPE_CHECKING:
    from .run import Run

POINTS = 400
MOST = 4  # layers that are shown beside the whole
ALL = "all layers"

Curves = dict[str, pd.DataFrame]


def weight_growth(run: Run) -> Curves:
    """Weight norm relative to the first capture: of all weights, and of the layers that grew most."""
    found = run.overview("weight", "norm", POINTS)
    if not len(found.steps):
        return {}
    whole = _together(found.values)
    known = np.flatnonzero(np.isfinite(whole))
    if not len(known) or not whole[known[0]] > 0:
        return {}
    curves = {ALL: _frame(found.steps, whole / whole[known[0]])}
    matrices = _matrices(run)
    rows = [row for row, name in enumerate(found.tensors) if name in matrices]
    first, last = (_known(found.values[rows], end) for end in (0, -1))
    ratio = np.divide(last, first, out=np.full(len(rows), np.nan), where=first > 0)
    for place in _largest(ratio):
        row = rows[place]
        curves[found.tensors[row]] = _frame(found.steps, found.values[row] / first[place])
    return curves


def drift_growth(run: Run) -> Curves:
    """Relative distance from the reference: of all weights together, and of the layers that moved most."""
    if "drift" not in run.kinds():
        return {}
    found = run.overview("drift", "norm", POINTS)
    if not len(found.steps):
        return {}
    size = _reference(run).reindex(found.tensors).to_numpy(np.float64)
    usable = np.isfinite(size) & (size > 0)
    if not usable.any():
        return {}
    whole = _together(found.values[usable]) / float(np.sqrt((size[usable] ** 2).sum()))
    curves = {ALL: _frame(found.steps, whole)}
    matrices = _matrices(run)
    rows = [row for row, name in enumerate(found.tensors) if usable[row] and name in matrices]
    for place in _largest(_known(found.values[rows], -1) / size[rows]):
        row = rows[place]
        curves[found.tensors[row]] = _frame(found.steps, found.values[row] / size[row])
    return curves


def then_and_now(steps: Ints, values: Floats, step: int) -> tuple[Floats, Floats]:
    """Of each column of (steps, tensors): the last known value at or before `step`, and the last one."""
    until = int(np.searchsorted(steps, step, "right"))
    return _known(values[:until].T, -1), _known(values.T, -1)


def _reference(run: Run) -> pd.Series:
    """The norm of each tensor's reference, from the last captures."""
    for reach in (100, 10_000, run.last_step + 1):
        rows = run.drift(steps=(run.last_step - reach, None))
        if len(rows):
            break
    return rows.groupby("tensor")["reference_norm"].last()


def _matrices(run: Run) -> set[str]:
    tensors = run.tensors()
    kept = tensors[tensors["role"].isin([*MATRICES, "embedding"])]
    return set(kept["tensor"] if len(kept) else tensors["tensor"])


def _together(values: np.ndarray) -> np.ndarray:
    """Norm over all tensors where all are there; NaN at other captures."""
    there = np.isfinite(values).sum(axis=0)
    whole = np.sqrt(np.nansum(values**2, axis=0))
    return np.where(there == there.max(initial=0), whole, np.nan)


def _known(values: np.ndarray, end: int) -> np.ndarray:
    """The first (0) or the last (-1) finite value of each row; NaN where there is none."""
    found = np.full(len(values), np.nan)
    for row, line in enumerate(values):
        finite = line[np.isfinite(line)]
        if len(finite):
            found[row] = finite[end]
    return found


def _largest(values: np.ndarray) -> list[int]:
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")
    return [int(place) for place in order[:MOST] if np.isfinite(values[place])]


def _frame(steps: np.ndarray, values: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"step": steps, "value": values})
