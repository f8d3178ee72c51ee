"""One message about one alert or many, as every channel says it: a title, and a few lines for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..findings import SEVERITIES
from .alert import SILENT, TEST, WRITES_AGAIN, Alert

#: Alerts that a message tells one by one; the rest is counted. What a digest says of each, in characters.
MOST, BRIEF = 20, 240
LAYERS = 3


@dataclass(frozen=True)
class Item:
    """What is said about one alert. `head` is "" where the message's title says it."""

    head: str
    body: str
    link: str


class Message:
    """What is sent. The worst alerts come first.

    Args:
        alerts: at least one.
    """

    def __init__(self, alerts: Sequence[Alert]) -> None:
        self.alerts = tuple(sorted(alerts, key=lambda a: -SEVERITIES.index(a.severity)))
        self.severity = self.alerts[0].severity
        single = len(self.alerts) == 1
        self.title = _head(self.alerts[0]) if single else _counted(self.alerts)
        self.items = [_whole(self.alerts[0])] if single else [_brief(a) for a in self.alerts[:MOST]]
        rest = self.alerts[MOST:]
        self.rest = "" if single or not rest else f"and {len(rest)} more: {_by_problem(rest)}"

    def text(self) -> str:
        """As plain text, without the title."""
        parts = ["\n".join(line for line in (item.head, item.body, item.link) if line) for item in self.items]
        return "\n\n".join([*parts, self.rest] if self.rest else parts)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every alert with all that is known of it."""
        return {
            "version": 1,
            "sender": "layerwatch",
            "title": self.title,
            "text": self.text(),
            "severity": self.severity,
            "alerts": [alert.to_dict() for alert in self.alerts],
        }


def _head(alert: Alert) -> str:
    words = {
        SILENT: f"{alert.run} has stopped writing",
        WRITES_AGAIN: f"{alert.run} writes again",
        TEST: "a test of layerwatch's alerts",
    }.get(alert.problem, f"{alert.words} in {alert.run}")
    return " ".join(f"{alert.severity}: {words}".split())


def _whole(alert: Alert) -> Item:
    layers = ", ".join(alert.layers[:LAYERS])
    more = f" and {len(alert.layers) - LAYERS} more" if len(alert.layers) > LAYERS else ""
    lines = [
        alert.summary,
        f"Since step {alert.first_step}." if alert.first_step >= 0 else "",
        f"Layers: {layers}{more}" if layers else "",
        f"Try first: {alert.advice}" if alert.advice else "",
        f"Owner: {alert.owner}" if alert.owner else "",
        f"Tags: {', '.join(alert.tags)}" if alert.tags else "",
    ]
    return Item("", "\n".join(" ".join(line.split()) for line in lines if line), alert.link)


def _brief(alert: Alert) -> Item:
    since = f", since step {alert.first_step}" if alert.first_step >= 0 else ""
    return Item(f"{_head(alert)}{since}", cut(alert.summary, BRIEF), alert.link)


def _counted(alerts: Sequence[Alert]) -> str:
    by = Counter(alert.severity for alert in alerts)
    counts = ", ".join(f"{by[severity]} {severity}" for severity in reversed(SEVERITIES) if by[severity])
    runs = {alert.key: alert.run for alert in alerts}
    where = next(iter(runs.values())) if len(runs) == 1 else f"{len(runs)} runs"
    return f"{len(alerts)} alerts in {where}: {counts}"


def _by_problem(alerts: Sequence[Alert]) -> str:
    counted = Counter(alert.words for alert in alerts).most_common()
    return ", ".join(f"{count} × {words}" for words, count in counted)


def duration(seconds: float) -> str:
    """As people say it: 90 s, 45 min, 3 h, 2 days."""
    for most, unit, words in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < most:
            return f"{seconds / unit:.0f} {words}"
    return f"{seconds / 86400:.0f} days"


def cut(text: str, most: int) -> str:
    """A text of at most so many characters, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
