"""Summaries on their way into the log: rows of `schema.STATS` collected for one append."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa

from ..monitor.schema import STATS
from ..monitor.summary import Summary

_FROM_SUMMARY = [name for name in STATS.names if name in Summary.__dataclass_fields__]


class Rows:
    """Rows of one or more captures; `batch` empties it."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in STATS.names}

    def __len__(self) -> int:
        return len(self._columns["step"])

    def add(
        self, step: int, time: float, tensor: str, kind: str, summary: Summary,
        *, stage: str | None = None, state: str | None = None, skipped: bool = False,
    ) -> None:  # fmt: skip
        """One row."""
        columns = self._columns
        for name in _FROM_SUMMARY:
            columns[name].append(getattr(summary, name))
        if not math.isfinite(summary.min):  # nothing finite
            columns["min"][-1] = columns["max"][-1] = None
        others = {
            "step": step, "time": time, "tensor": tensor, "kind": kind,
            "stage": stage, "state": state, "skipped": skipped,
        }  # fmt: skip
        for name, value in others.items():
            columns[name].append(value)

    def batch(self) -> pa.RecordBatch:
        """All rows as one Arrow batch."""
        arrays = [pa.array(self._columns[f.name], f.type) for f in STATS]
        self._columns = {name: [] for name in STATS.names}
        return pa.RecordBatch.from_arrays(arrays, schema=STATS)
