"""Anchors: steps at which a small linear sketch of every tensor is stored, to be compared later."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..monitor.sketch import COUNTERS, add_sketch, sketch
from .shards import is_sharded
from .statistics import Array, parts_of
from .tensors import WatchedTensor

#: So many anchors at most: the log grows by 4,096 numbers for each of them and each large tensor.
MOST = 64

Row = tuple[int, float, str, str, Array]


class AnchorSketches:
    """Which steps are anchors, and what is stored there.

    Args:
        anchors: steps, up to 64 (the weights after each of them are stored); or N for the steps 0, N, 2 N,
            ..., 63 N.

    Raises:
        ValueError: neither of the two.
    """

    def __init__(self, anchors: int | Sequence[int]) -> None:
        every = not isinstance(anchors, Iterable)
        steps = [anchors] if not isinstance(anchors, Iterable) else list(anchors)
        if not steps or not all(type(s) is int and s >= every for s in steps):
            raise ValueError(
                f"expected anchors as steps from 0 on, or as N from 1 on for every N-th step, got {anchors!r}"
            )
        self._steps = frozenset(range(0, MOST * steps[0], steps[0]) if every else steps)
        if len(self._steps) > MOST:
            raise ValueError(f"expected at most {MOST} anchors, got {len(self._steps)}: choose among them")
        add_sketch(np.zeros(1, np.float32), "", np.zeros(2))  # compiles, or loads, before a step is timed

    def wants(self, step: int) -> bool:
        """Is this step an anchor?"""
        return step in self._steps

    def rows(
        self, step: int, time: float, tensors: Sequence[WatchedTensor], kind: str = "sketch"
    ) -> list[Row]:
        """Rows of the `values` table: the tensors' sketches, of 4,096 counters in float32 precision; tensors
        of up to 4,096 elements as they are. What is on an accelerator is copied to the host for it."""
        found = []
        for tensor in tensors:
            if tensor.piece is not None or is_sharded(
                tensor.parameter
            ):  # a sketch needs to know where in the whole an element is
                continue
            values = parts_of(tensor.weight)
            if values.size > COUNTERS:
                values = sketch(values, tensor.name, COUNTERS).astype(np.float32)
            found.append((step, time, tensor.name, kind, values.astype(np.float64)))
        return found
