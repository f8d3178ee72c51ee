"""What a captured step has yielded so far: rows, and what is still on a device."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from ..monitor.summary import Summary
from .device import DeviceBatch
from .lora import STABLE_RANK, AdaptedRows
from .rows import Block, Rows, broken

_NO_BUCKETS, _NO_COUNTS = np.empty(0, np.int16), np.empty(0, np.int64)


@dataclass(slots=True)
class Gradient:
    """A gradient's row, before it is written: in a block, as a summary, or on a device by ticket."""

    stage: str
    block: Block | None = None
    job: int = 0
    summary: Summary | None = None
    ticket: int = -1
    batch: DeviceBatch | None = None

    @property
    def zero(self) -> bool:
        if self.block is not None:
            return self.block.zero[self.job]
        return self.summary is not None and self.summary.zeros == self.summary.count

    @property
    def squares(self) -> float:
        if self.block is not None:
            return self.block.squares[self.job]
        return 0.0 if self.summary is None else squares_of(self.summary)


@dataclass(slots=True)
class Line:
    """A row whose numbers are still on a device."""

    ticket: int
    row: dict[str, object]
    gradient: int  # the gradient's ticket, -1 without
    residual: float | None = None


@dataclass
class Taken:
    """The rows of a step, and the norms over all its gradients; some may still be on a device."""

    step: int
    time: float
    rows: Rows
    total_sq: float = 0.0  # as the gradients came
    used_sq: float = 0.0  # as the optimizer used them
    clipped: bool = False
    states: dict[str, str] = field(default_factory=dict)  # of those whose gradient turned out to be zero
    device: DeviceBatch = field(default_factory=DeviceBatch)
    lines: list[Line] = field(default_factory=list)
    norms: list[tuple[int, int]] = field(default_factory=list)  # tickets of a gradient as it came, as used
    adapted: AdaptedRows = field(default_factory=AdaptedRows)
    vectors: list[tuple[str, str, np.ndarray]] = field(default_factory=list)  # found by `batch`

    def ready(self) -> bool:
        """Nothing is waited for any more."""
        return (not self.lines or self.device.ready()) and self.adapted.ready()

    def batch(self) -> pa.RecordBatch | None:
        """All rows; waits for the device if need be."""
        if self.lines:
            self.device.wait()
            found = self.device.results()
            for line in self.lines:
                zero = line.gradient >= 0 and found[line.gradient].zeros == found[line.gradient].count
                row = line.row
                if zero and row["state"] == "trainable":
                    row["state"] = self.states[str(row["tensor"])] = "zero_gradient"
                summary = found[line.ticket]
                if row["kind"] == "gradient_norm":
                    summary = norm_alone(summary)
                if line.residual is not None:
                    summary = replace(summary, residual_sq=line.residual)
                self.rows.add(self.step, self.time, summary=summary, **row)  # type: ignore[arg-type]
            self.total_sq += sum(squares_of(found[came]) for came, _ in self.norms)
            self.used_sq += sum(squares_of(found[used]) for _, used in self.norms)
            self.lines, self.norms = [], []
        for row, summary, rank in self.adapted.results():
            self.rows.add(self.step, self.time, summary=summary, **row)
            if math.isfinite(rank):
                self.vectors.append((row["tensor"], STABLE_RANK, np.array([rank])))
        return self.rows.batch(self.step, self.time)


def norm_alone(summary: Summary) -> Summary:
    """What is known when only the norm was asked for; what is not finite is counted all the same."""
    return replace(
        summary, sum=math.nan, min=math.nan, max=math.nan, zeros=0, subnormals=0,
        buckets=_NO_BUCKETS, counts=_NO_COUNTS,
    )  # fmt: skip


def squares_of(summary: Summary) -> float:
    """Sum of squares; not finite when an element is not."""
    return summary.sum_sq + broken(summary.nans, summary.pos_infs + summary.neg_infs)
