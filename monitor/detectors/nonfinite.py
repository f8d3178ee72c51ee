"""NaN and infinity: where they appeared first."""

from __future__ import annotations

import numpy as np

from ..findings import Finding
from .history import PERSISTENT, Bools, History, persistent
from .outcome import outcome
from .registry import detector


@detector("nonfinite")
def nonfinite(history: History) -> Finding | None:
    """NaN or infinite numbers in the loss, the weights or the gradients (SageMaker Debugger ExplodingTensor).

    Told apart: a step that a loss scaler skipped may hold infinite gradients, that is its way of working; a
    module may put out -inf (a mask) as long as loss and gradients stay finite. One non-finite gradient that
    left the weights whole is no alarm; three consecutive ones are. A non-finite loss or weight needs no
    persistence.

    The culprit is the first module in forward order whose output is not finite at the first captured step
    that shows it, else the last tensor in order of definition whose gradient is not finite (backward runs
    from the end).
    """
    names = tuple(history.tensors.index)
    weights: Bools = _broken(history, "weight", names)
    gradients: Bools = _broken(history, "gradient", names) & ~history.skipped[:, None]
    begin = {
        "the weights": _first(history, np.any(weights, axis=1), 1),
        "the gradients": _first(history, np.any(gradients, axis=1), PERSISTENT),
        "the training loss": outcome(history).broken_step,
        "the validation loss": _first_broken_validation(history),
    }
    seen = {what: step for what, step in begin.items() if step is not None}
    if not seen:
        return None
    first = min(seen.values())
    where = min(seen, key=lambda what: seen[what])
    layers, from_input = _culprits(history, first, weights, gradients, names)
    fatal = begin["the weights"] is not None or _still_broken(history)
    at = f", first in {layers[0]}" if layers else ""
    return history.finding(
        "nonfinite",
        "critical" if fatal else "warning",
        f"NaN or infinite numbers appear in {where} at step {first}{at}.",
        first=first,
        layers=layers,
        evidence={
            "first_step": first,
            "tensors": int((weights | gradients).any(axis=0).sum()),
            "threshold": 0,
        },
        advice=_advice(from_input),
        confidence=1.0,
    )


def _broken(history: History, kind: str, names: tuple[str, ...]) -> np.ndarray:
    bad = history.table(kind, "nans", names) + history.table(kind, "infs", names)
    return np.nan_to_num(bad) > 0


def _first(history: History, hits: np.ndarray, least: int) -> int | None:
    index = persistent(hits, least)
    return None if index is None else int(history.steps[index])


def _first_broken_validation(history: History) -> int | None:
    steps, values = history.val_loss
    bad = np.flatnonzero(~np.isfinite(values))
    return int(steps[bad[0]]) if bad.size else None


def _still_broken(history: History) -> bool:
    """The last few losses are not finite either."""
    tail = history.train_loss.value[-3:]
    return bool(tail.size and not np.isfinite(tail).any())


def _culprits(
    history: History, first: int, weights: np.ndarray, gradients: np.ndarray, names: tuple[str, ...]
) -> tuple[list[str], bool]:
    """Names, worst first, and whether already the first module's output is broken (then the input is
    suspect).
    """
    modules = tuple(history.modules)
    outputs = _broken(history, "activation", modules)
    rows = np.flatnonzero(history.steps >= first)
    for row in rows[:2]:  # weights that broke in a step show in the next step's activations
        if outputs[row].any():
            broken = [m for m, bad in zip(modules, outputs[row], strict=True) if bad]
            ran = ~np.isnan(history.table("activation", "count", modules)[row])
            started = next((m for m, r in zip(modules, ran, strict=True) if r), None)
            return broken, broken[0] == started and not weights[: row + 1][:-1].any()
        if gradients[row].any():
            return [n for n, bad in zip(names, gradients[row], strict=True) if bad][::-1], False
        if weights[row].any():
            return [n for n, bad in zip(names, weights[row], strict=True) if bad], False
    return [], False


def _advice(from_input: bool) -> str:
    if from_input:
        return "The first layer's output is already broken: check this batch for NaN or huge inputs."
    return (
        "Look for log(0), 0/0 or sqrt(0) in the named layer and the loss; lower the learning rate, clip "
        "gradients, or use "
        "bfloat16 instead of float16."
    )
