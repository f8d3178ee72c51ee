"""Early stopping, replayed on what was logged: what a rule would have kept, and what it would have saved."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .text import integer, number


@dataclass(frozen=True)
class Stop:
    """What the rule did.

    Attributes:
        kept, value: the step whose weights the rule would have kept, and its validation value.
        at: the step at which it would have stopped; None when it had no reason to.
        best, best_value: the best validation of the whole run.
        end: the last step of the run.
    """

    kept: int
    value: float
    at: int | None
    best: int
    best_value: float
    end: int

    @property
    def saved(self) -> int:
        """Steps that would not have been trained."""
        return 0 if self.at is None else max(self.end - self.at, 0)


def early_stop(
    val: pd.DataFrame, patience: int, delta: float = 0.0, *, falls: bool = True, end: int = 0
) -> Stop | None:
    """Stop at the `patience`-th validation in a row that is no improvement.

    An improvement is better than the best so far by more than `delta` times its size. NaN is none.
    None when no validation was finite.
    """
    steps, values = val["step"].to_numpy(), val["value"].to_numpy(dtype=float)
    if not np.isfinite(values).any():
        return None
    better = -1.0 if falls else 1.0
    kept, level, waited, at = -1, math.nan, 0, None
    for place, value in enumerate(values):
        if math.isfinite(value) and (kept < 0 or better * (value - level) > delta * abs(level)):
            kept, level, waited = place, float(value), 0
            continue
        waited += kept >= 0
        if waited >= patience:
            at = int(steps[place])
            break
    best = int(np.nanargmax(np.where(np.isfinite(values), better * values, -np.inf)))
    last = max(end, int(steps[-1]))
    return Stop(int(steps[kept]), level, at, int(steps[best]), float(values[best]), last)


def advice(stop: Stop | None, patience: int, delta: float, latest: float) -> str:
    """What early stopping would have done, in two sentences."""
    if stop is None:
        return "No finite validation value was logged, so there is nothing to stop by."
    rule = f"Patience {patience}" + (f", improvements of at least {number(100 * delta)} %" if delta else "")
    best = f"The best validation is {number(stop.best_value)} at step {integer(stop.best)}"
    if stop.best == stop.kept and stop.at is None and latest == stop.best_value:
        return f"{best}, the last one: no reason to stop. {rule} would have gone on too."
    if stop.at is None:
        return f"{best}; the latest is {number(latest)}. {rule} would not have stopped this run."
    share = 100 * stop.saved / max(stop.end, 1)
    text = (
        f"{best}; the latest is {number(latest)}. {rule} would have stopped at step {integer(stop.at)}, "
        f"kept step {integer(stop.kept)} ({number(stop.value)}) and saved {integer(stop.saved)} of "
        f"{integer(stop.end)} steps ({number(share)} %)."
    )
    if stop.kept != stop.best:
        text += f" It would have missed the best one at step {integer(stop.best)}: try more patience."
    return text
