"""When the steps of a run were taken, from what its log says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..monitor.schema import SYSTEM
from .figures.times import Clock

if TYPE_CHECKING:
    from ..monitor import Run
    from .queries import Library

SCALARS = 4  # the longest ones tell enough


def clock_of(library: Library, run: Run) -> Clock:
    """The run's clock, remembered until it grows: from its scalars, and from the rows of one tensor."""
    return library.memo(run, "clock", lambda: _read(run))


def _read(run: Run) -> Clock:
    names = [name for name in run.scalar_names() if not name.startswith(SYSTEM)]
    frames = sorted((run.scalars(name) for name in names), key=len)[-SCALARS:]
    tensors, kinds = run.tensors(), run.kinds()
    if len(tensors) and kinds:
        frames.append(run.stats(next(iter(kinds)), str(tensors["tensor"].iloc[0]), ["step", "time"]))
    if not frames:
        return Clock()
    return Clock.of(
        *(np.concatenate([frame[key].to_numpy(dtype=float) for frame in frames]) for key in ("step", "time"))
    )
