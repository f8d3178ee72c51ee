"""What became of alerts: as lines of a run's log, which people read and the watchman as well."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd

    from .alert import Alert

#: The kind of the log's events that tell of alerts.
EVENT = "alert"
_SENT = re.compile(r"sent to ([\w-]+)(?: \(.*?\))?: (.*)", re.DOTALL)

Outcome = Literal["sent", "held", "delayed", "not sent"]


@dataclass(frozen=True)
class Record:
    """What became of one message.

    Attributes:
        outcome: `held`: quiet hours; `delayed`: the channel failed, it is tried again; `not sent`: nor will
            it be. channel: its name. alerts: what the message tells. time: unix seconds.
        reason: in a few words, which hold no secret.
    """

    outcome: Outcome
    channel: str
    alerts: tuple[Alert, ...]
    time: float
    reason: str = ""

    def line(self, *, runs: bool = False) -> str:
        """As text: `sent to team: critical nonfinite, warning dead_units`.

        Args:
            runs: name the run of each alert, too.
        """
        word = "for" if self.outcome in ("held", "delayed") else "to"
        reason = f" ({self.reason})" if self.reason else ""
        told = ", ".join(f"{a.severity} {a.problem}" + (f" of {a.run}" if runs else "") for a in self.alerts)
        return f"{self.outcome} {word} {self.channel}{reason}: {told}"


def alerted(events: pd.DataFrame) -> list[dict[str, Any]]:
    """What a training has told whom by itself.

    Args:
        events: `Run.events()`.

    Returns: problem, severity, channel (its name) and time (unix seconds, the latest) of each.
    """
    rows: Iterable[tuple[str, float, str]] = events.loc[
        events["event"] == EVENT, ["event", "time", "message"]
    ].itertuples(index=False, name=None)
    found = {}
    for _, time, message in rows:
        if sent := _SENT.fullmatch(message):
            for told in sent[2].split(", "):
                severity, _, problem = told.partition(" ")
                found[problem, severity, sent[1]] = float(time)
    return [
        {"problem": problem, "severity": severity, "channel": channel, "time": time}
        for (problem, severity, channel), time in found.items()
    ]
