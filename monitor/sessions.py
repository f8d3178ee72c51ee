"""Sessions: a training that is resumed goes on at an earlier step, and what it does again supersedes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .scan import Bounds, select

#: A step that no row reaches.
NEVER = int(np.iinfo(np.int64).max)


class Start(NamedTuple):
    """When a session began: its first step, and unix seconds (NaN when no event tells)."""

    step: int
    time: float


class Cut(NamedTuple):
    """By session: the first step whose rows no longer count."""

    steps: NDArray[np.int64]

    @classmethod
    def of(cls, starts: Mapping[int, Start], latest: int, *, superseded: bool = True) -> Cut:
        """What counts while `latest` is the latest session: nothing of a later one.

        Args:
            superseded: leave out what a session up to `latest` has done again.
        """
        highest = max(starts, default=0)
        steps = np.full(max(highest, latest) + 1, NEVER)
        for session in range(len(steps)):
            later = [starts[s].step for s in range(session + 1, latest + 1) if s in starts]
            if session > latest:
                steps[session] = -1
            elif later and superseded:
                steps[session] = min(later)
        return cls(steps)

    @property
    def everything(self) -> bool:
        """Nothing is left out."""
        return bool((self.steps == NEVER).all())

    def at(self, sessions: NDArray) -> NDArray[np.int64]:
        """The first step that no longer counts of each of these sessions."""
        return self.steps[np.clip(sessions, 0, len(self.steps) - 1)]

    def keep(self, rows: pa.Table) -> pa.Table:
        """The rows that count; columns session and step."""
        session, step = rows["session"].to_numpy(), rows["step"].to_numpy()
        return select(rows, step < self.at(session))

    def groups(self, sessions: Bounds, steps: Bounds, among: Iterable[int]) -> tuple[list[int], list[int]]:
        """The row groups whose rows all count, and those where only some may.

        Args:
            sessions, steps: lowest and highest in every row group. among: the row groups to judge.
        """
        (first, last), (low, high) = sessions, steps
        clean, mixed = [], []
        for group in among:
            if first[group] is None or low[group] is None:
                mixed.append(group)
                continue
            ends = self.at(np.arange(first[group], last[group] + 1))
            if high[group] < ends.min():
                clean.append(group)
            elif low[group] < ends.max():
                mixed.append(group)
        return clean, mixed
