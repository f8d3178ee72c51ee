"""Which captures also store the values of small tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..monitor.bins import KEPT
from ..monitor.log import LogWriter
from ..monitor.schema import FACTORS
from .statistics import Array, array_of
from .tensors import WatchedTensor

#: Tensors up to this size have their values stored; of larger ones only summaries are kept.
MAX_ELEMENTS = 1024
#: They may take these shares of the log, weights and what is told of single units (dead, saturated, attention
#: of each head); counted in bytes after compaction as measured on real captures.
WEIGHTS_SHARE, UNITS_SHARE = 0.08, 0.02
STATS_ROW_BYTES = 90
VALUE_BYTES = 7.5
VALUE_ROW_BYTES = 8

Vector = tuple[str, str, Array]  # tensor, kind, values


class Values:
    """Stores the values of small tensors and of units, thinned to their shares of the log; the first and the
    last weights always."""

    def __init__(self, log: LogWriter) -> None:
        self._log = log
        self._written = self._units_used = self._used = 0.0  # bytes
        self._captures = 0
        self._last_step: int | None = None

    def captured(self, rows: int) -> None:
        """A capture was written, with so many rows of statistics: they pay for values. Where old captures are
        merged, later ones pay as little as will be left of them."""
        self._captures += 1
        merged = 1
        if self._log.keep == "rollup":
            pairs = zip(FACTORS, (1, *FACTORS), strict=False)
            merged = max([factor for factor, finer in pairs if self._captures > KEPT * finer], default=1)
        self._written += rows / merged * STATS_ROW_BYTES / (1 - WEIGHTS_SHARE - UNITS_SHARE)

    def store(
        self, step: int, time: float, tensors: Sequence[WatchedTensor], kind: str = "weight",
        *, always: bool = False,
    ) -> None:  # fmt: skip
        """Store the values of the small ones at this step if they are affordable, or `always`."""
        if self._last_step == step or not (always or self._used < WEIGHTS_SHARE * self._written):
            return
        small = [t for t in tensors if 0 < math.prod(t.shape) <= MAX_ELEMENTS]
        cost = sum(VALUE_ROW_BYTES + VALUE_BYTES * t.weight.numel() for t in small)
        if not small or not (always or self._used + cost <= WEIGHTS_SHARE * self._written):
            return
        self._log.values([(step, time, t.name, kind, array_of(t.weight)) for t in small])
        self._used += cost
        self._last_step = step if kind == "weight" else None

    def store_vectors(self, step: int, time: float, vectors: Sequence[Vector]) -> None:
        """Store what is told of single units, if it is affordable; the first ones always are."""
        cost = sum(VALUE_ROW_BYTES + VALUE_BYTES * values.size for _, _, values in vectors)
        if vectors and (not self._units_used or self._units_used + cost <= UNITS_SHARE * self._written):
            self._log.values([(step, time, tensor, kind, values) for tensor, kind, values in vectors])
            self._units_used += cost
