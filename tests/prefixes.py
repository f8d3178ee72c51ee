"""A finished run as it was judged while it was trained: its first captures, what was logged until then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from layerwatch.monitor import Finding, Run
from layerwatch.monitor.detectors import History
from layerwatch.monitor.detectors.history import Bools, Ints
from layerwatch.monitor.detectors.matrices import Matrices
from layerwatch.monitor.findings import judge


class Prefix:
    """A history's source that ends with this step."""

    def __init__(self, run: Run, until: int) -> None:
        self._run, self._until = run, until
        self.name, self.info = run.name, run.info
        self.tensors, self.modules = run.tensors, run.modules

    def _cut(self, frame: pd.DataFrame) -> pd.DataFrame:
        return frame[frame["step"] <= self._until]

    def scalars(self, name: str) -> pd.DataFrame:
        return self._cut(self._run.scalars(name))

    def scalar_names(self) -> list[str]:
        return [name for name in self._run.scalar_names() if len(self.scalars(name))]

    def stats(
        self, kind: str, tensor: str | None = None, columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        return self._cut(self._run.stats(kind, tensor, columns))

    def drift(self) -> pd.DataFrame:
        return self._cut(self._run.drift())

    def activity(self, kind: str, tensor: str) -> tuple[Ints, Bools]:
        steps, active = self._run.activity(kind, tensor)
        return steps[steps <= self._until], active[steps <= self._until]

    def events(self) -> pd.DataFrame:
        return self._cut(self._run.events())

    def checksums(self) -> pd.DataFrame:
        return self._cut(self._run.checksums())


def judged_prefixes(run: Run, every: int = 10) -> Iterator[tuple[int, list[Finding], list[str]]]:
    """The last step, the findings and the notes of the first `every`, 2 `every`, ... captures."""
    matrices = Matrices(run)
    steps = History(run, matrices).steps
    for captures in [*range(every, steps.size, every), steps.size]:
        until = int(steps[captures - 1]) if captures < steps.size else run.last_step
        history = History(Prefix(run, until), matrices)
        kept: dict[str, Any] = history.__dict__
        kept["steps"] = steps[:captures]  # the matrices hold more, which nothing shows
        found, notes = judge(history)
        yield until, found, notes


def first_alarms(run: Run, every: int = 10) -> dict[str, tuple[int, Finding]]:
    """Each problem that was an alarm at some prefix: the step at which it was noticed, and how."""
    alarms: dict[str, tuple[int, Finding]] = {}
    for step, found, _ in judged_prefixes(run, every):
        for finding in found:
            if finding.alarm:
                alarms.setdefault(finding.problem, (step, finding))
    return alarms


def captures_until(run: Run, step: int) -> int:
    """How many captures there were until this step."""
    return int(np.searchsorted(History(run).steps, step, side="right"))
