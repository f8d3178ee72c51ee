"""Early stopping, replayed on what was logged, in words."""

from __future__ import annotations

from ..monitor.detectors.validation import Stop
from .text import integer, number


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
