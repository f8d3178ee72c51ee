"""A run too long to be read row by row, as detectors see it: by the roll-ups of its log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .history import Bools, Ints

if TYPE_CHECKING:
    from ..run import Run

#: A run with more rows of a kind is thinned: 200 tensors in 10,000 captures, read in seconds and half a GB.
MOST_ROWS = 2_000_000
#: But so many points of each tensor are read at least.
LEAST_POINTS = 200


def sparing(run: Run) -> Run | Thinned:
    """The run itself, or as much of it as can be read in reasonable time and memory."""
    most = max(len(run.tensors()), len(run.modules()))  # what the log holds of a capture, at most
    if most * (run.last_step + 1) <= MOST_ROWS:
        return run
    points = max(MOST_ROWS // most, LEAST_POINTS)
    seen = [
        (kind, name)
        for kind, names in (("weight", run.tensors()["tensor"]), ("activation", run.modules()["module"]))
        for name in names[:1]
    ]
    captures = max((run.stats(kind, name, ["captures"])["captures"] for kind, name in seen), key=len)
    return run if len(captures) <= points else Thinned(run, points, int(captures.sum()))


class Thinned:
    """A history's source whose rows hold several captures each. All kinds share one grid of steps.

    Args:
        points: about so many rows of each tensor at most. captures: how many there are.
    """

    def __init__(self, run: Run, points: int, captures: int) -> None:
        self.run, self.points = run, points
        self.name, self.info = run.name, run.info
        self.scalars, self.scalar_names, self.events = run.scalars, run.scalar_names, run.events
        self.tensors, self.modules, self.checksums = run.tensors, run.modules, run.checksums
        self.grid = self._grid()
        self.note = (
            f"the log is long: detectors saw {len(self.grid):,} rows of each tensor instead of {captures:,}, "
            "each of several captures together; what lasted for a few captures only may be missing"
        )

    def _grid(self) -> Ints:
        """The first steps of the rows that the others are put to."""
        for kind in ("gradient", "update", "activation", "weight"):
            if names := self.run.names(kind):
                rows = self.run.stats(kind, names[0], ["step"], max_points=self.points)
                return np.unique(rows["step"].to_numpy(np.int64))
        return np.empty(0, np.int64)

    def stats(
        self, kind: str, tensor: str | None = None, columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        return self._put(self.run.stats(kind, tensor, columns, max_points=self.points))

    def drift(self) -> pd.DataFrame:
        return self._put(self.run.drift(max_points=self.points))

    def activity(self, kind: str, tensor: str) -> tuple[Ints, Bools]:
        return self.run.activity(kind, tensor, max_points=self.points)

    def _put(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Rows of other bins belong to the grid's row in which they begin; of several the last counts."""
        if frame.empty or not len(self.grid):
            return frame
        place = np.searchsorted(self.grid, frame["step"].to_numpy(np.int64), "right") - 1
        put: dict[str, Any] = {"step": self.grid[np.maximum(place, 0)]}
        return frame.assign(**put).drop_duplicates(["tensor", "step"], keep="last", ignore_index=True)
