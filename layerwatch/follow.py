"""`layerwatch check --follow`: findings as they appear, from outside of the training."""

from __future__ import annotations

import argparse
import json
import time

from .monitor import Finding, Run, RunError
from .monitor.detectors.growing import Growing
from .monitor.findings import News
from .monitor.normal import Normal
from .terminal import tell


class Followed:
    """One run that may not exist yet. `found`: its latest findings."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.found: list[Finding] = []
        self.over = False
        self._growing: Growing | None = None
        self._news = News()
        self._waits = False

    def look(self, normal: Normal | None) -> list[Finding]:
        """What is new."""
        try:
            growing = self._growing or Growing(Run(self.path))
        except RunError as error:
            self._wait(f"{error}; waiting for it")
            return []
        # Asked before the rows are read: none can come after it.
        self.over = bool(growing.run.info.get("closed")) or not growing.run.live
        self._growing = growing
        self.found = growing.find(normal)[0]
        if growing.run.last_step < 0:
            self._wait(f"{self.path} is empty so far, waiting for its first steps")
        return self._news.of(self.found)

    @property
    def step(self) -> int:
        """The last one that is in the log."""
        return self._growing.run.last_step if self._growing else -1

    def ended(self) -> None:
        """Say so if nothing closed the log."""
        if self._growing and not self._growing.run.info.get("closed"):
            tell(f"{self.path}: the training ended without closing its log", error=True)

    def _wait(self, what: str) -> None:
        if not self._waits:
            self._waits = True
            tell(what, error=True)


def follow(options: argparse.Namespace, normal: Normal | None) -> list[Finding]:
    """Print each new finding until all runs are closed, or Ctrl-C; returns the latest findings."""
    runs = [Followed(path) for path in options.runs]
    try:
        while going := [run for run in runs if not run.over]:
            for run in going:
                for finding in run.look(normal):
                    _print(run, finding, options.format)
                if run.over:
                    run.ended()
            if not all(run.over for run in runs):
                time.sleep(options.interval)
    except KeyboardInterrupt:
        pass
    return [finding for run in runs for finding in run.found]


def _print(run: Followed, finding: Finding, form: str) -> None:
    if form == "json":
        print(json.dumps({**finding.to_dict(), "noticed": run.step}, allow_nan=False), flush=True)
    else:
        tell(f"{run.path}, step {run.step}: {finding.line()}")
