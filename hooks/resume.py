"""At which step a resumed training goes on: after the log's last step, or where its checkpoint was saved."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from ..monitor import Run, RunError

Resume = bool | int


def check(resume: Resume) -> None:
    """Is it what `watch` takes?

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(resume, int):
        raise TypeError(f"expected resume=True, False or the number of a step, got {type(resume).__name__}")
    if resume < 0:
        raise ValueError(f"expected resume as the number of the first step, from 0, got {resume}")


def steps_made(optimizers: Sequence[Optimizer]) -> int | None:
    """How many steps the optimizers have made, as the state of Adam and its relatives tells; else None.

    Reads one number of each optimizer, so that an accelerator is waited for once.
    """
    counts = []
    for optimizer in optimizers:
        counters = (state.get("step") for state in optimizer.state.values())
        first = next((c for c in counters if isinstance(c, int | float | torch.Tensor)), None)
        if first is not None:
            counts.append(int(first))
    return max(counts, default=None)


def first_step(
    run: Path | str, resume: Resume, optimizers: Sequence[Optimizer], session: int | None = None
) -> tuple[int, str | None]:
    """The step at which a training goes on, and what is to be noted about it.

    Args:
        run: where it is. resume: True, or the step itself.
        optimizers: with the state of the checkpoint. session: which begins; other ranks may have begun it.

    A step that a loss scaler skipped is a step of the log, but not of the optimizer's counter.
    """
    if resume is not True:
        return int(resume), None
    try:
        log = Run(run, None if session is None else session - 1)
    except RunError:  # the writer says what is wrong
        return 0, None
    after_last = log.last_step + 1
    made = steps_made(optimizers)
    known = [(s["first_step"], s["steps_made"] or 0) for s in log.info.get("starts", [])[:session]]
    if made is None or not known:
        return after_last, None
    step, counted = next((start for start in reversed(known) if start[1] <= made), known[0])
    skipped = set(log.events().query("event == 'skipped'")["step"])
    while counted < made and step < after_last:
        counted += step not in skipped
        step += 1
    if counted == made:
        return step, None
    return after_last, f"the optimizer has made {made} steps, of which the log knows {counted}"


def starts(
    run: Path | str, resume: Resume, step: int, optimizers: Sequence[Optimizer]
) -> list[dict[str, Any]]:
    """Where every start of the training began, this one last: for the next one."""
    try:
        before = [] if resume is False else Run(run).info.get("starts", [])
    except RunError:
        before = []
    return [*before, {"first_step": step, "steps_made": steps_made(optimizers), "time": time.time()}]
