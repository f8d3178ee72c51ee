"""Findings of a training told to people: behind it, and never in its way."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..monitor.alerts.alert import Alert
from ..monitor.alerts.config import FILE, Config, config_of, find_config, read_config
from ..monitor.alerts.records import EVENT, Record, alerted
from ..monitor.alerts.settings import ConfigError
from ..monitor.alerts.teller import Teller

if TYPE_CHECKING:
    from ..monitor import Finding, LogWriter, Run
    from .place import Place

logger = logging.getLogger("layerwatch")

#: What the end of a training waits for messages under way; and when the process is asked to end, in seconds.
CLOSE_SECONDS, TERMINATE_SECONDS = 5.0, 1.0

#: See `watch`.
Alerts = bool | str | Path | Mapping[str, Any] | None


def chosen(alerts: Alerts, place: Place) -> tuple[Config | None, list[str]]:
    """The settings that `watch(alerts=...)` means, and notes about them.

    Raises:
        ConfigError: settings were asked for, and are none or not as expected. A file that was only found is
            told of in a note: it may be somebody else's, and is no reason not to train.
        TypeError: `alerts` is something else.
    """
    if alerts is False:
        return None, []
    if isinstance(alerts, Mapping):
        return config_of(alerts), []
    if isinstance(alerts, str | Path):
        return read_config(alerts), []
    if alerts is not None and alerts is not True:
        raise TypeError(
            f"expected alerts as a path, a mapping, True, False or None, got {type(alerts).__name__}"
        )
    try:
        path = find_config(None if place.is_remote else place.folder.absolute().parent)
        if path is None and alerts:
            raise ConfigError(
                f"expected {FILE} in a folder above the run or in the working directory, found none: "
                "write one, or give its path as alerts="
            )
        return (read_config(path) if path else None), []
    except ConfigError as error:
        if alerts:
            raise
        logger.warning("nobody is alerted: %s", error)
        return None, [f"nobody is alerted: {error}"]


class Alerting:
    """Tells the findings of a run to the channels of its settings, and what became of that to its log.

    Args:
        config: the settings. place: the run's, whose name people are told. log: where records go.
    """

    def __init__(self, config: Config, place: Place, log: LogWriter) -> None:
        self._name = place.name if place.is_remote else config.name_of(place.folder)
        self._log = log
        self._records: deque[Record] = deque()  # of other threads
        self._teller = Teller(config, self._records.append)
        self._knows = not log.session  # what earlier sessions have told
        self._failed = False
        for channel, variables in config.unset().items():
            logger.warning("alerts to %s cannot be sent: set %s", channel, " and ".join(variables))

    def look(self, step: int, findings: Sequence[Finding], run: Run) -> None:
        """Tell what is news among the findings of a run; nothing that goes wrong here is passed on."""
        if self._failed:
            return
        try:
            if not self._knows:
                self._knows = True
                for told in alerted(run.events()):
                    self._teller.ledger.note(
                        self._name, told["problem"], told["severity"], told["channel"], told["time"]
                    )
            owner, tags = run.info.get("owner") or "", run.info.get("tags") or ()
            about = {
                "run": self._name, "key": self._name, "time": time.time(),
                "owner": str(owner), "tags": tuple(str(tag) for tag in tags),
            }  # fmt: skip
            link = self._teller.config.link
            self._teller.tell([Alert.of(f, link=link(self._name, f.problem), **about) for f in findings])
            self.write(step)
        except Exception as error:  # what it says may hold anything
            self._failed = True
            logger.warning("nobody is alerted any more after an error: %s", type(error).__name__)

    def write(self, step: int) -> None:
        """What became of messages since the last time, into the log."""
        while self._records:
            self._log.event(step, EVENT, self._records.popleft().line())

    def close(self, step: int, *, quick: bool = False) -> None:
        """Wait for messages under way, a moment; what is not sent by then is recorded."""
        if quick:
            self._teller.delivery.close(TERMINATE_SECONDS, "the process was asked to end")
        else:
            self._teller.delivery.close(CLOSE_SECONDS, "the training has ended")
        self.write(step)
