"""Detectors in the training process, for `on_finding`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..monitor import Run

if TYPE_CHECKING:
    from ..monitor import Finding

logger = logging.getLogger("layerwatch")

#: Detectors run in the training for at most this share of its time, and not more often.
CHECK_SHARE, CHECK_SECONDS = 0.01, 10.0


class LiveCheck:
    """Calls `on_finding` once for each new problem of the run."""

    def __init__(self, run: Path, on_finding: Callable[[Finding], None] | None) -> None:
        self._run, self._on_finding = run, on_finding
        self._reported: set[str] = set()
        self._checked, self._cost = time.perf_counter(), 0.0

    def report_if_due(self) -> bool:
        """After a capture; True when something new was found."""
        since = time.perf_counter() - self._checked
        if self._on_finding is None or since <= max(CHECK_SECONDS, self._cost / CHECK_SHARE):
            return False
        start = time.perf_counter()
        new = self.report()
        self._checked = time.perf_counter()
        self._cost = self._checked - start
        return new

    def report(self) -> bool:
        """Judge the run as it is now; True when something new was found."""
        if self._on_finding is None:
            return False
        before = len(self._reported)
        try:
            for finding in Run(self._run).findings():
                if finding.problem not in self._reported:
                    self._reported.add(finding.problem)
                    self._on_finding(finding)
        except Exception as error:  # a detector or the user's callback: neither may stop the training
            logger.warning("on_finding failed and is not called again: %r", error)
            self._on_finding = None
        return len(self._reported) > before
