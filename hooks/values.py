"""Which captures also store the values of small tensors."""

from __future__ import annotations

from collections.abc import Sequence

from ..monitor.log import LogWriter
from .statistics import array_of
from .tensors import WatchedTensor, ready

#: Tensors up to this size have their values stored; of larger ones only summaries are kept.
MAX_ELEMENTS = 1024
#: The values may take this share of the log, counted in bytes after compaction as measured on real captures.
SHARE = 0.10
STATS_ROW_BYTES = 90
VALUE_BYTES = 7.5
VALUE_ROW_BYTES = 8


class Values:
    """Stores the values of small tensors, thinned to `SHARE` of the log; first and last always kept."""

    def __init__(self, log: LogWriter, tensors: Sequence[WatchedTensor]) -> None:
        self._log, self._tensors = log, tensors
        self._allowed = 0.0
        self._used = 0.0
        self._last_step: int | None = None

    def captured(self, rows: int) -> None:
        """So many rows of statistics were written: they pay for values."""
        self._allowed += SHARE / (1 - SHARE) * rows * STATS_ROW_BYTES

    def store(self, step: int, time: float, kind: str = "weight", *, always: bool = False) -> None:
        """Store the values at this step if they are affordable, or `always`."""
        small = [t for t in ready(self._tensors) if 0 < t.parameter.numel() <= MAX_ELEMENTS]
        cost = sum(VALUE_ROW_BYTES + VALUE_BYTES * t.parameter.numel() for t in small)
        affordable = self._used + cost <= self._allowed
        if not small or self._last_step == step or not (always or affordable):
            return
        self._log.values([(step, time, t.name, kind, array_of(t.parameter)) for t in small])
        self._used += cost
        self._last_step = step if kind == "weight" else None
