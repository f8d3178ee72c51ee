"""Who is told of what, and when: routes, quiet hours, and what was told already."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..findings import SEVERITIES
from .alert import SILENT, Alert

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


@dataclass(frozen=True)
class Route:
    """Alerts that fit every condition go to these channels. An empty condition fits all."""

    channels: tuple[str, ...]
    severity: str = "warning"
    problems: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()  # shell patterns, of the whole name or its last part
    owners: tuple[str, ...] = ()

    def fits(self, alert: Alert) -> bool:
        """Severe enough, and one of each list that is given."""
        names = (alert.run, alert.run.rpartition("/")[2])
        return (
            SEVERITIES.index(alert.severity) >= SEVERITIES.index(self.severity)
            and (not self.problems or alert.problem in self.problems)
            and (not self.tags or not set(self.tags).isdisjoint(alert.tags))
            and (not self.runs or any(fnmatchcase(name, run) for run in self.runs for name in names))
            and (not self.owners or alert.owner in self.owners)
        )


def receivers(routes: Iterable[Route], alert: Alert) -> list[str]:
    """The channels that an alert goes to, each once."""
    return list(dict.fromkeys(name for route in routes if route.fits(alert) for name in route.channels))


@dataclass(frozen=True)
class Quiet:
    """When nobody is to be disturbed.

    Attributes:
        hours: from, to in minutes of the day; the end may lie on the next day. days: quiet as a whole, 0 is
            Monday. zone: whose clock; None: this machine's. critical: critical alerts pass.
    """

    hours: tuple[int, int] | None = None
    days: frozenset[int] = frozenset()
    zone: dt.tzinfo | None = None
    critical: bool = False

    def holds(self, alert: Alert, now: float) -> bool:
        """It has to wait. `now`: unix seconds."""
        return self.at(now) and not (self.critical and alert.severity == "critical")

    def at(self, now: float) -> bool:
        """It is quiet."""
        local = self._local(now)
        if local.weekday() in self.days:
            return True
        if self.hours is None:
            return False
        (start, end), minute = self.hours, local.hour * 60 + local.minute
        return start <= minute < end if start < end else minute >= start or minute < end

    def ends(self, now: float) -> float:
        """When it will not be quiet any more, unix seconds; `now` when it is not."""
        end = now
        for minute in range(9 * 24 * 60):
            if not self.at(end):
                return end
            end = now - now % 60 + 60 * (minute + 1)
        return end

    def clock(self, now: float) -> str:
        """The time of day when it ends, with the day if that is not today."""
        local, end = self._local(now), self._local(self.ends(now))
        return end.strftime("%H:%M") if end.date() == local.date() else end.strftime("%a %H:%M")

    def _local(self, now: float) -> dt.datetime:
        return dt.datetime.fromtimestamp(now, self.zone)


class Ledger:
    """What was told to whom: each problem of a run once to each channel, and again when it has become worse,
    or after `repeat` seconds while it lasts."""

    def __init__(self, repeat: float | None = None) -> None:
        self._repeat = repeat
        self._told: dict[str, dict[str, tuple[int, float]]] = {}  # key of the run -> "problem channel" -> ...

    def is_news(self, alert: Alert, channel: str, now: float, *, lasts: bool = True) -> bool:
        """It is to be told. `lasts`: off, it is not repeated."""
        severity, told = self._told.get(alert.key, {}).get(f"{alert.problem} {channel}", (-1, now))
        again = lasts and self._repeat is not None and now - told >= self._repeat
        return SEVERITIES.index(alert.severity) > severity or again

    def mark(self, alert: Alert, channel: str, now: float) -> None:
        """It is told, at this time."""
        self.note(alert.key, alert.problem, alert.severity, channel, now)

    def note(self, key: str, problem: str, severity: str, channel: str, time: float) -> None:
        """It was told, at this time, by us or by others."""
        if severity not in SEVERITIES:
            return
        told = self._told.setdefault(key, {})
        worst, latest = told.get(f"{problem} {channel}", (-1, 0.0))
        told[f"{problem} {channel}"] = max(worst, SEVERITIES.index(severity)), max(latest, time)

    def told_silence(self, key: str) -> list[str]:
        """The channels that know that a run has stopped writing; from now on they do not."""
        told = self._told.get(key, {})
        found = [place.partition(" ")[2] for place in told if place.startswith(f"{SILENT} ")]
        for channel in found:
            del told[f"{SILENT} {channel}"]
        return found

    def forget(self, known: Iterable[str]) -> None:
        """Runs other than these."""
        known = set(known)
        self._told = {key: told for key, told in self._told.items() if key in known}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {key: {place: list(one) for place, one in told.items()} for key, told in self._told.items()}

    def restore(self, content: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """What `to_dict` made.

        Raises:
            KeyError, TypeError, ValueError: it did not.
        """
        self._told = {
            str(key): {str(place): (int(one[0]), float(one[1])) for place, one in told.items()}
            for key, told in content.items()
        }
