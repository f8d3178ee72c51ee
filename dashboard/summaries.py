"""What a table of runs shows of each: cheap to read, and small enough to be remembered for thousands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ..monitor import Run
from .figures.loss import gap

#: Names under which the two losses are looked for, in this order.
TRAIN = ("train_loss", "loss", "train/loss", "training_loss")
VAL = ("val_loss", "eval_loss", "valid_loss", "validation_loss", "val/loss", "eval/loss")


#: Numbers of one run; None where there is none, NaN or infinite as they were logged:
#: read (False: only what run.json says is here yet), error (why the run cannot be read, else absent),
#: step (the last one, -1: none), train, val, gap (validation minus training loss at the last validation),
#: drift (the largest relative L2 distance at the last capture), drift_layer (whose it is), live (a process is
#: writing), created, ended (unix seconds), closed, tags (texts), config ("optimizer.lr" -> number, text,
#: bool or None).
Summary = dict[str, Any]


def facts(run: Run) -> Summary:
    """What run.json says, and whether a process is writing."""
    info = run.info
    tags = info.get("tags")
    config = info.get("config")
    return {
        "live": run.live,
        "created": _time(info.get("created")),
        "ended": _time(info.get("ended")),
        "closed": bool(info.get("closed")),
        "tags": [str(tag) for tag in tags] if isinstance(tags, list) else [],
        "config": flat(config) if isinstance(config, dict) else {},
    }


def summarise(run: Run) -> Summary:
    """Everything. Raises what reading the log raises."""
    train, val = _first(run, TRAIN), _first(run, VAL)
    moved, layer = _drift(run)
    gaps = gap(train, val)["gap"].to_numpy()
    return dict(
        read=True,
        step=run.last_step,
        train=_last(train),
        val=_last(val),
        gap=float(gaps[-1]) if len(gaps) else None,
        drift=moved,
        drift_layer=layer,
        **facts(run),
    )


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


def _first(run: Run, names: tuple[str, ...]) -> pd.DataFrame:
    """The first of these scalars that was logged; an empty frame when none was."""
    logged = run.scalar_names()
    return run.scalars(next((name for name in names if name in logged), names[0]))


def _last(frame: pd.DataFrame) -> float | None:
    return float(frame["value"].iloc[-1]) if len(frame) else None


def _drift(run: Run) -> tuple[float | None, str]:
    """How far the layer that moved most is from its reference at the last capture, and its name."""
    if "drift" not in run.kinds():
        return None, ""
    for reach in (0, 100, 10_000, run.last_step + 1):  # the last capture is near the end of the log
        frame = run.drift(steps=(run.last_step - reach, None))
        if len(frame):
            break
    values = frame["relative_l2"].where(frame["step"] == frame["step"].max()).to_numpy(np.float64)
    if not np.isfinite(values).any():
        return None, ""
    place = int(np.argmax(np.where(np.isfinite(values), values, -1.0)))
    return float(values[place]), str(frame["tensor"].iloc[place])


def _time(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
