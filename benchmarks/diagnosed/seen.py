"""A kept run as a poorer log would show it: fewer captures, fewer losses, no activations, no updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from layerwatch.monitor import Run

#: What goes with the activations.
OF_ACTIVATIONS = ("activation", "attention_entropy", "attention_logit", "dead_share", "saturated_share")
#: Scalars that are logged by the training itself, not at captures.
LOSSES = ("train_loss", "loss_d")


class Seen:
    """A history's source that shows every N-th step of a run, and leaves kinds out.

    Args:
        every: steps between captures. log_every: steps between losses. hidden: kinds that are not shown.
    """

    def __init__(self, run: Run, every: int = 1, log_every: int = 1, hidden: Sequence[str] = ()) -> None:
        self.run, self.every, self.log_every, self.hidden = run, every, log_every, tuple(hidden)
        self.name, self.info = run.name, run.info
        self.tensors, self.modules, self.events = run.tensors, run.modules, run.events
        self.scalar_names, self.checksums = run.scalar_names, run.checksums

    def scalars(self, name: str) -> pd.DataFrame:
        frame = self.run.scalars(name)
        if name in LOSSES:
            return frame[frame["step"] % self.log_every == 0]
        return frame[frame["step"] % self.every == 0] if name in ("clip_ratio", "grad_norm") else frame

    def stats(
        self, kind: str, tensor: str | None = None, columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        frame = self.run.stats(kind, tensor, columns)
        if kind == "initial_weight" or frame.empty:
            return frame
        return frame[(frame["step"] % self.every == 0) & (kind not in self.hidden)]

    def drift(self) -> pd.DataFrame:
        frame = self.run.drift()
        return frame if frame.empty else frame[frame["step"] % self.every == 0]

    def activity(self, kind: str, tensor: str) -> tuple[Any, Any]:
        steps, units = self.run.activity(kind, tensor)
        if kind in self.hidden or not steps.size:
            return np.empty(0, np.int64), np.empty((0, 0), bool)
        keep = steps % self.every == 0
        return steps[keep], units[keep]
