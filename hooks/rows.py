"""Summaries on their way into the log: rows of `schema.STATS` collected for one append."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..monitor import sweep
from ..monitor.schema import STATS
from ..monitor.summary import Summary

_FROM_SUMMARY = [name for name in STATS.names if name in {f.name for f in fields(Summary)}]
_OTHERS = ["step", "time", "tensor", "kind", "stage", "state", "skipped"]
_ORDER = [(_OTHERS + _FROM_SUMMARY).index(name) for name in STATS.names]
_values_of = attrgetter(*_FROM_SUMMARY)

GRADIENT, WEIGHT, UPDATE, DRIFT = range(4)
_KINDS = np.array(["gradient", "weight", "update", "drift"], object)


@dataclass
class Block:
    """The rows of one `sweep`: for each job those of gradient, weight, update and drift that it asked for.

    A row waits until `decide` has told its state, or it is dropped.
    """

    names: list[str]  # of the jobs
    counts: NDArray[np.int64]  # elements, of the jobs
    rows: NDArray[np.int64]  # (jobs, 4): the row of each kind, -1 without
    numbers: NDArray[np.float64]
    counters: NDArray[np.int64]
    buckets: NDArray[np.int16]
    bucket_counts: NDArray[np.int64]
    residuals: NDArray[np.float64]  # of the jobs, NaN without
    lost_known: NDArray[np.bool_]  # of the jobs
    units: list[int]  # of the jobs, 0 without
    active: list[bytes | None]
    rename: dict[str, str] = field(default_factory=dict)  # kind -> the name it gets

    def __post_init__(self) -> None:
        jobs = len(self.names)
        self._states: list[str | None] = [None] * jobs
        self._stages: list[str | None] = [None] * jobs
        self._skipped, self._due = [False] * jobs, [False] * jobs
        self.left = jobs
        gradients = self.rows[:, GRADIENT] >= 0
        rows = self.rows[gradients, GRADIENT]
        counters, squares = self.counters[rows], np.zeros(jobs)
        infinite = counters[:, sweep.POS_INFS] + counters[:, sweep.NEG_INFS] > 0
        squares[gradients] = self.numbers[rows, sweep.SUM_SQ]
        squares[gradients] += np.where(counters[:, sweep.NANS] > 0, np.nan, np.where(infinite, np.inf, 0.0))
        zero = np.zeros(jobs, bool)
        zero[gradients] = counters[:, sweep.ZEROS] == self.counts[gradients]
        #: Of each job's gradient: sum of squares, not finite when an element is not; all elements are zero.
        self.squares: list[float] = squares.tolist()
        self.zero: list[bool] = zero.tolist()

    def decide(self, job: int, state: str | None, *, skipped: bool = False, stage: str | None = None) -> None:
        """The rows of this job are complete; `stage` is that of its gradient."""
        self._states[job], self._skipped[job], self._due[job] = state, skipped, True
        self._stages[job] = stage or self._stages[job]

    def drop(self, job: int) -> None:
        """The rows of this job are not wanted any more."""
        self.rows[job] = -1
        self.left -= 1

    @property
    def is_due(self) -> bool:
        """Some rows are complete."""
        return any(self._due)

    def batch(self, step: int, time: float) -> pa.RecordBatch:
        """The rows that are due, which leaves the others."""
        due = np.array(self._due, bool)
        jobs, kinds = np.nonzero((self.rows >= 0) & due[:, None])
        order = self.rows[jobs, kinds]
        self.left -= int(due.sum())
        self._due = [False] * len(due)
        numbers, counters = self.numbers[order], self.counters[order]
        ends = self.counters[order, sweep.END]
        starts = np.where(order > 0, self.counters[order - 1, sweep.END], 0)
        offsets = np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int32)
        buckets, bucket_counts = self.buckets, self.bucket_counts
        if offsets[-1] != buckets.size:
            picked = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)] or [[]])
            buckets, bucket_counts = buckets[picked.astype(int)], bucket_counts[picked.astype(int)]
        update, drift, gradient = kinds == UPDATE, kinds == DRIFT, kinds == GRADIENT
        finite = np.isfinite(numbers[:, sweep.MIN]) & ~drift
        names, units = np.array(self.names, object)[jobs], np.array(self.units, np.int64)[jobs]
        has_units = gradient & (units > 0)
        kind_names = _KINDS if not self.rename else np.array([self.rename.get(k, k) for k in _KINDS], object)
        columns: dict[str, Any] = {
            "step": np.full(order.size, step),
            "time": np.full(order.size, time),
            "tensor": pa.array(names, pa.string()),
            "kind": pa.array(kind_names[kinds], pa.string()),
            "captures": np.ones(order.size, np.int64),
            "count": self.counts[jobs],
            "sum": numbers[:, sweep.SUM],
            "sum_sq": numbers[:, sweep.SUM_SQ],
            "min": (numbers[:, sweep.MIN], finite),
            "max": (numbers[:, sweep.MAX], finite),
            "zeros": counters[:, sweep.ZEROS],
            "subnormals": counters[:, sweep.SUBNORMALS],
            "nans": counters[:, sweep.NANS],
            "pos_infs": counters[:, sweep.POS_INFS],
            "neg_infs": counters[:, sweep.NEG_INFS],
            "buckets": pa.ListArray.from_arrays(offsets, pa.array(buckets)),
            "counts": pa.ListArray.from_arrays(offsets, pa.array(bucket_counts)),
            "ref_sum_sq": (numbers[:, sweep.REF_SUM_SQ], update | drift),
            "dot": (numbers[:, sweep.DOT], update | drift),
            "residual_sq": (self.residuals[jobs], drift & ~np.isnan(self.residuals[jobs])),
            "sign_flips": (counters[:, sweep.FLIPS], drift),
            "lost": (counters[:, sweep.LOST], update & self.lost_known[jobs]),
            "samples": pa.nulls(order.size, pa.int64()),
            "units": (units, has_units),
            "active": pa.array(np.array(self.active, object)[jobs], pa.binary(), mask=~has_units),
            "stage": pa.array(np.array(self._stages, object)[jobs], pa.string(), mask=~gradient),
            "state": pa.array(np.array(self._states, object)[jobs], pa.string()),
            "skipped": np.array(self._skipped, bool)[jobs],
        }  # fmt: skip
        return pa.RecordBatch.from_arrays([_column(columns[f.name], f.type) for f in STATS], schema=STATS)


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    if isinstance(values, tuple):
        return pa.array(values[0], kind, mask=~values[1])
    return pa.array(values, kind)


def broken(nans: int, infinities: int) -> float:
    """What makes a sum of the finite elements' squares as little finite as the elements are."""
    return np.nan if nans else np.inf if infinities else 0.0


class Rows:
    """Rows of one or more captures; `batch` takes those that are complete."""

    def __init__(self) -> None:
        self._rows: list[tuple[Any, ...]] = []
        self._blocks: list[Block] = []

    def add(
        self, step: int, time: float, tensor: str, kind: str, summary: Summary,
        *, stage: str | None = None, state: str | None = None, skipped: bool = False,
    ) -> None:  # fmt: skip
        """One row."""
        self._rows.append((step, time, tensor, kind, stage, state, skipped, *_values_of(summary)))

    def extend(self, block: Block) -> None:
        """The rows of a sweep, once they are decided."""
        self._blocks.append(block)

    def batch(self, step: int, time: float) -> pa.RecordBatch | None:
        """All complete rows as one Arrow batch; those of blocks are of this step. None when there is none."""
        batches = [block.batch(step, time) for block in self._blocks if block.is_due]
        self._blocks = [block for block in self._blocks if block.left]
        if self._rows:
            batches.append(self._summaries())
        if len(batches) < 2:
            return batches[0] if batches else None
        return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]

    def _summaries(self) -> pa.RecordBatch:
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
