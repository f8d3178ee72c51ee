"""A layer x step matrix: built from rows, ordered, filtered by an RE2 pattern, pooled for a screen."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from .cells import to_log

MAX_ROWS = 400
MAX_COLUMNS = 600


@dataclass(frozen=True)
class Grid:
    """`values` (layers, steps) float64 with NaN where nothing was captured; `bad` where it was not finite.

    `first` is the position of the first column among all captures, so that bins stay where they are. A row
    covers `width` layers, the last one perhaps fewer. `coarse`: the log holds several captures in a column.
    """

    names: list[str]
    steps: np.ndarray
    values: np.ndarray
    bad: np.ndarray
    first: int = 0
    width: int = 1
    coarse: bool = False

    @property
    def empty(self) -> bool:
        """Nothing to draw."""
        return not self.names or not len(self.steps)

    def rows(self, index: np.ndarray | list[int]) -> Grid:
        """The layers at these positions, in this order."""
        index = np.asarray(index, dtype=int)
        return replace(
            self, names=[self.names[i] for i in index], values=self.values[index], bad=self.bad[index]
        )

    def between(self, steps: tuple[float, float] | None) -> Grid:
        """The captures inside a step range, and one on each side so that the picture has no bare edge."""
        if steps is None or self.empty:
            return self
        first = max(int(np.searchsorted(self.steps, steps[0], side="right")) - 1, 0)
        last = min(int(np.searchsorted(self.steps, steps[1], side="left")) + 1, len(self.steps))
        part = slice(first, max(last, first + 1))
        return replace(
            self,
            steps=self.steps[part],
            values=self.values[:, part],
            bad=self.bad[:, part],
            first=self.first + first,
        )

    def aligned(self, names: list[str]) -> Grid:
        """These layers in this order; empty rows for those that are missing here."""
        if names == self.names:
            return self
        place = {name: i for i, name in enumerate(self.names)}
        index = np.array([place.get(name, -1) for name in names], dtype=int)
        known = index >= 0
        values = np.full((len(names), len(self.steps)), np.nan)
        bad = np.zeros(values.shape, dtype=bool)
        values[known], bad[known] = self.values[index[known]], self.bad[index[known]]
        return replace(self, names=names, values=values, bad=bad)


def build(frame: pd.DataFrame, value: np.ndarray, bad: np.ndarray | None = None) -> Grid:
    """Pivot rows (columns tensor, step) with one value each; layers keep the order of first appearance."""
    if frame.empty:
        return Grid([], np.array([], dtype=np.int64), np.zeros((0, 0)), np.zeros((0, 0), dtype=bool))
    row, names = pd.factorize(frame["tensor"], sort=False)
    column, steps = pd.factorize(frame["step"].to_numpy(), sort=True)
    values = np.full((len(names), len(steps)), np.nan)
    marks = np.zeros(values.shape, dtype=bool)
    values[row, column] = value
    if bad is not None:
        marks[row, column] = bad
    return Grid([str(name) for name in names], steps, values, marks)


def matching(names: list[str], pattern: str) -> tuple[list[int], str]:
    """Positions of the names that an RE2 pattern finds, and what is wrong with the pattern ("": nothing).

    RE2 runs in linear time whatever the pattern; Python's own engine can hang on a pattern from a URL.
    """
    if not pattern:
        return list(range(len(names))), ""
    options = pc.MatchSubstringOptions(pattern)
    try:
        found = pc.call_function("match_substring_regex", [pa.array(names, pa.string())], options)
    except (pa.ArrowInvalid, pa.ArrowException, ValueError) as error:
        reason = str(error).splitlines()[0].removeprefix("Invalid regular expression: ")
        return list(range(len(names))), f"The pattern is not a regular expression (RE2): {reason}"
    return [i for i, hit in enumerate(found.to_pylist()) if hit], ""


def order(grid: Grid, by: str, log: bool) -> Grid:
    """Layers by depth (as they come), name (numbers counted as numbers) or badness (worst first)."""
    if by == "name":
        return grid.rows(sorted(range(len(grid.names)), key=lambda i: natural(grid.names[i])))
    if by == "badness" and not grid.empty:
        return grid.rows(np.argsort(-badness(grid, log), kind="stable"))
    return grid


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which layer.10 follows layer.9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def badness(grid: Grid, log: bool) -> np.ndarray:
    """How far each layer strays: not finite first, then the largest distance from the median layer.

    On a logarithmic quantity the distance is in decades, so that vanishing counts as much as exploding.
    """
    values = scaled(grid.values, log)
    score = np.zeros(len(grid.names))
    if log:
        with np.errstate(all="ignore"):
            center = _nan_reduce(np.nanmedian, values, 0)
            values = np.abs(values - center[None, :])
    score = np.nan_to_num(_nan_reduce(np.nanmax, values, 1), nan=-1.0)
    return np.where(grid.bad.any(axis=1), np.inf, score)


def scaled(values: np.ndarray, log: bool) -> np.ndarray:
    """log10 of positive values (others become NaN), or the values as they are."""
    return to_log(values) if log else values


def pool(grid: Grid, rows: int = MAX_ROWS, columns: int = MAX_COLUMNS) -> Grid:
    """At most about `rows` x `columns` cells; a cell shows the largest of what it covers: no spike is lost.

    A column covers a power of two of captures, counted from the first one of all: as a run grows, only its
    last column changes, until there are twice as many captures.
    """
    steps, count = grid.steps, len(grid.steps)
    if count > columns:
        wide = 1 << int(np.ceil(np.log2(count / columns)))
        edges = np.unique(np.maximum(np.arange(-(grid.first % wide), count, wide), 0))
        values, bad = _max_at(grid.values, edges, 1), np.logical_or.reduceat(grid.bad, edges, axis=1)
        grid = replace(grid, steps=steps[edges], values=values, bad=bad)
    names, count = grid.names, len(grid.names)
    if count > rows:
        width = -(-count // rows)
        edges = np.arange(0, count, width)
        values, bad = _max_at(grid.values, edges, 0), np.logical_or.reduceat(grid.bad, edges, axis=0)
        names = [
            names[i] if width == 1 else f"{names[i]} … {names[min(i + width, count) - 1]}" for i in edges
        ]
        grid = replace(grid, names=names, values=values, bad=bad, width=width)
    return grid


def limits(values: np.ndarray, colors: str) -> tuple[float, float]:
    """Colour range of finite values: "robust" leaves out 2 % at each end, "full" nothing."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0, 1.0
    low, high = np.percentile(finite, (2, 98)) if colors == "robust" else (finite.min(), finite.max())
    if high <= low:
        return float(low) - 0.5, float(high) + 0.5
    return float(low), float(high)


def _max_at(values: np.ndarray, edges: np.ndarray, axis: int) -> np.ndarray:
    low = np.where(np.isnan(values), -np.inf, values)
    out = np.maximum.reduceat(low, edges, axis=axis)
    return np.where(np.isneginf(out), np.nan, out)


def _nan_reduce(function: np.ufunc | object, values: np.ndarray, axis: int) -> np.ndarray:
    """A nan-function without its warning about all-NaN slices, which are ordinary here."""
    empty = np.isnan(values).all(axis=axis)
    filled = np.where(np.expand_dims(empty, axis), 0.0, values)
    out = function(filled, axis=axis)  # pyright: ignore[reportCallIssue]
    return np.where(empty, np.nan, out)
