"""The few numbers that stand for a run in a table: cheap to read, whatever its length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from ..losses import TRAIN, VAL, gap

if TYPE_CHECKING:
    from ..run import Run


class Losses(NamedTuple):
    """The last training and validation loss as they were logged, and their gap at the last validation."""

    train: float | None
    val: float | None
    gap: float | None


def last_losses(run: Run) -> Losses:
    """Under whichever of the usual names they were logged; None for one that was not."""
    train, val = _first(run, TRAIN), _first(run, VAL)
    gaps = gap(train, val)["gap"].to_numpy()
    return Losses(_last(train), _last(val), float(gaps[-1]) if len(gaps) else None)


def _first(run: Run, names: tuple[str, ...]) -> pd.DataFrame:
    """The first of these scalars that was logged; an empty frame when none was."""
    logged = run.scalar_names()
    return run.scalars(next((name for name in names if name in logged), names[0]))


def _last(frame: pd.DataFrame) -> float | None:
    return float(frame["value"].iloc[-1]) if len(frame) else None


def last_drift(run: Run) -> pd.DataFrame:
    """The rows of `Run.drift` at the last capture; an empty frame when there is none."""
    if "drift" not in run.kinds():
        return pd.DataFrame(columns=["tensor", "relative_l2", "distance", "reference_norm"])
    frame = pd.DataFrame()
    for reach in (0, 100, 10_000, run.last_step + 1):  # the last capture is near the end of the log
        frame = run.drift(steps=(run.last_step - reach, None))
        if len(frame):
            break
    return frame[frame["step"] == frame["step"].max()]


def furthest(drift: pd.DataFrame) -> tuple[float | None, str]:
    """How far the tensor that moved most has moved, and its name."""
    values = drift["relative_l2"].to_numpy(np.float64)
    if not np.isfinite(values).any():
        return None, ""
    place = int(np.nanargmax(np.where(np.isfinite(values), values, np.nan)))
    return float(values[place]), str(drift["tensor"].iloc[place])


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one level, its keys joined by dots; lists and other values as text."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
    return found
