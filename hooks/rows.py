"""Summaries on their way into the log: rows of `schema.STATS` collected for one append."""

from __future__ import annotations

from dataclasses import fields
from operator import attrgetter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..monitor.schema import STATS
from ..monitor.summary import Summary

_FROM_SUMMARY = [name for name in STATS.names if name in {f.name for f in fields(Summary)}]
_OTHERS = ["step", "time", "tensor", "kind", "stage", "state", "skipped"]
_ORDER = [(_OTHERS + _FROM_SUMMARY).index(name) for name in STATS.names]
_values_of = attrgetter(*_FROM_SUMMARY)


class Rows:
    """Rows of one or more captures; `batch` empties it."""

    def __init__(self) -> None:
        self._rows: list[tuple[Any, ...]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self, step: int, time: float, tensor: str, kind: str, summary: Summary,
        *, stage: str | None = None, state: str | None = None, skipped: bool = False,
    ) -> None:  # fmt: skip
        """One row."""
        self._rows.append((step, time, tensor, kind, stage, state, skipped, *_values_of(summary)))

    def batch(self) -> pa.RecordBatch:
        """All rows as one Arrow batch."""
        columns = list(zip(*self._rows, strict=True))
        self._rows = []
        arrays = [pa.array(columns[place], f.type) for place, f in zip(_ORDER, STATS, strict=True)]
        return pa.RecordBatch.from_arrays([*map(_finite_or_null, arrays, STATS.names)], schema=STATS)


def _finite_or_null(column: pa.Array, name: str) -> pa.Array:
    """The range of a tensor without a finite element is unknown."""
    if name not in ("min", "max"):
        return column
    finite = pc.call_function("is_finite", [column])
    return pc.call_function("if_else", [finite, column, pa.scalar(None, column.type)])
