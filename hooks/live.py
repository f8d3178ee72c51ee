"""Detectors in the training process: new problems are told when they are noticed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..monitor import LogWriter, Run
from ..monitor.findings import News

if TYPE_CHECKING:
    from ..monitor import Finding
    from ..monitor.detectors.growing import Growing
    from .alerting import Alerting

logger = logging.getLogger("layerwatch")

#: Detectors run in the training for at most this share of its time, and not more often.
CHECK_SHARE, CHECK_SECONDS = 0.01, 10.0


class StopTraining(Exception):
    """Raise it in `on_finding` to end the training: it is raised again where the optimizer steps.

    Any other exception there is logged once, and the callback is not called again.
    """


class LiveCheck:
    """Judges the run now and then; tells each problem once, and again when it has become worse.

    Telling is: one line at WARNING by the logger `layerwatch` (alarms only), an event `finding` in the log,
    the user's callback, and alerts.

    Args:
        folder: the run's. shown: its name for people. log: where the events go.
        on_finding: the user's callback. wanted: whether to judge at all. alerting: tells people.
    """

    def __init__(
        self,
        folder: Path,
        shown: str | Path,
        log: LogWriter,
        on_finding: Callable[[Finding], None] | None,
        *,
        wanted: bool,
        alerting: Alerting | None = None,
    ) -> None:
        self._folder, self._shown, self._log, self._on_finding = folder, shown, log, on_finding
        self._wanted, self._alerting = wanted, alerting
        self._always = on_finding is not None or alerting is not None
        self._growing: Growing | None = None
        self._news = News()
        self._stop: StopTraining | None = None
        self._checked, self._cost = time.perf_counter(), 0.0
        #: How often the run was judged, and what that took.
        self.looks, self.seconds = 0, 0.0

    def report_if_due(self, step: int) -> bool:
        """After a capture; True when something new was found."""
        if self._alerting is not None:
            self._alerting.write(step)
        since = time.perf_counter() - self._checked
        if not self._wanted or since <= max(CHECK_SECONDS, self._cost / CHECK_SHARE):
            return False
        return self._report(step)

    def finish(self, step: int) -> None:
        """The last look, at the end of a training; of one that was too short for any only when somebody waits
        for it."""
        if self._wanted and (self.looks or self._always):
            self._report(step)
            self._stop = None  # it has ended
        if self._alerting is not None:
            self._alerting.close(step)

    def terminate(self, step: int) -> None:
        """The process is about to end."""
        if self._alerting is not None:
            self._alerting.close(step, quick=True)

    def stop_if_asked(self) -> None:
        """Raises StopTraining if the callback has."""
        if self._stop is not None:
            stop, self._stop = self._stop, None
            raise stop

    def _report(self, step: int) -> bool:
        start = time.perf_counter()
        try:
            from ..monitor.detectors.growing import Growing

            self._growing = self._growing or Growing(Run(self._folder))
            findings = self._growing.find()[0]
            news = self._news.of(findings)
        except Exception as error:  # no trouble of ours may stop the training
            logger.warning("the run %s is not judged any more while it trains: %r", self._shown, error)
            self._wanted = False
            return False
        self._checked = time.perf_counter()
        self._cost = self._checked - start
        self.looks, self.seconds = self.looks + 1, self.seconds + self._cost
        for finding in news:
            self._tell(step, finding)
        if self._alerting is not None:
            self._alerting.look(step, findings, self._growing.run)
        return bool(news)

    def _tell(self, step: int, finding: Finding) -> None:
        if finding.alarm:
            logger.warning("%s, step %d: %s", self._shown, step, finding.line())
        self._log.event(step, "finding", finding.line())
        if self._on_finding is None:
            return
        try:
            self._on_finding(finding)
        except StopTraining as stop:
            self._stop = stop
            self._log.event(step, "stop", f"on_finding raised StopTraining at {finding.problem}: {stop}")
        except Exception as error:  # the user's own: it may not stop the training
            logger.warning("on_finding failed and is not called again: %r", error)
            self._on_finding = None
