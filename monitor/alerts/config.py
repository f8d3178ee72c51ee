"""layerwatch.toml: who is told of what, by which channels."""

from __future__ import annotations

import datetime as dt
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from ..findings import CAUSES, SEVERITIES
from .alert import SILENT, TEST, WRITES_AGAIN
from .channels import Channel, channel_of
from .routing import DAYS, Quiet, Route
from .settings import ConfigError, Table, closest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "layerwatch.toml"
#: What is not said: a run that writes nothing for so long is silent; messages of a channel are at least so
#: far apart; a message that cannot be sent is given up. In seconds.
SILENT_SECONDS, DIGEST_SECONDS, GIVE_UP_SECONDS = 1800.0, 60.0, 6 * 3600.0


@dataclass(frozen=True)
class Config:
    """The table [alerts] of a settings file; times are seconds. See docs/alerts.md.

    Attributes:
        source: the file, "" of a mapping. repeat, silent: None is never.
    """

    channels: Mapping[str, Channel]
    routes: tuple[Route, ...]
    severity: str = "warning"
    repeat: float | None = None
    silent: float | None = SILENT_SECONDS
    digest: float = DIGEST_SECONDS
    give_up: float = GIVE_UP_SECONDS
    quiet: Quiet | None = None
    dashboard: str = ""
    root: str = ""
    source: str = field(default="", compare=False)

    def link(self, run: str, problem: str) -> str:
        """The page of the dashboard about a problem of a run, "" when nobody said where it is.

        Args:
            run: its path below the root of the dashboard.
        """
        if not self.dashboard:
            return ""
        page = f"{self.dashboard}/run/{quote(run)}"
        if problem in (SILENT, WRITES_AGAIN, TEST):
            return f"{page}/alerts"
        return f"{page}/overview?finding={problem}"

    def name_of(self, folder: str | Path) -> str:
        """A run's name below the root that the dashboard serves, else its folder's."""
        place = Path(os.path.abspath(folder))
        if self.root and place.is_relative_to(self.root) and place != Path(self.root):
            return place.relative_to(self.root).as_posix()
        return place.name

    def unset(self) -> dict[str, list[str]]:
        """Channel -> environment variables that it needs and that are not set."""
        missing = {
            name: [v for v in channel.variables() if not os.environ.get(v, "").strip()]
            for name, channel in self.channels.items()
        }
        return {name: variables for name, variables in missing.items() if variables}


def read_config(path: str | Path) -> Config:
    """Read a settings file.

    Raises:
        ConfigError: it cannot be read, or does not say what is expected.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"expected a settings file, but {path} does not exist: see docs/alerts.md"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text in UTF-8: save it as such") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from None
    try:
        for key in content:
            if key != "alerts":
                raise ConfigError(f'unknown table or key "{key}"{closest(key, ["alerts"])}')
        if "alerts" not in content:
            raise ConfigError("the table [alerts] is missing: see docs/alerts.md")
        return config_of(content["alerts"], path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def config_of(content: Any, source: Path | None = None) -> Config:
    """The settings in a table.

    Args:
        content: what stands in the table [alerts]. source: the file, which `root` is relative to.

    Raises:
        ConfigError: it does not say what is expected.
    """
    table = Table(content, "[alerts]")
    severity = table.choice("severity", SEVERITIES, "warning")
    listed = table.table("channels")
    channels = {name: channel_of(name, listed.table(name)) for name in listed.keys()}  # noqa: SIM118
    routes = tuple(_route(one, list(channels), severity) for one in table.tables("routes"))
    folder = source.absolute().parent if source else Path.cwd()
    root = table.text("root", "")
    config = Config(
        channels=channels,
        routes=routes or (Route(tuple(channels), severity),),
        severity=severity,
        repeat=table.seconds("repeat", None, never=True),
        silent=table.seconds("silent", SILENT_SECONDS, never=True),
        digest=table.seconds("digest", DIGEST_SECONDS) or 0.0,
        give_up=table.seconds("give_up", GIVE_UP_SECONDS) or 0.0,
        quiet=_quiet(table.table("quiet")) if "quiet" in table else None,
        dashboard=_dashboard(table),
        root=os.path.normpath(folder / root) if root else "",
        source=str(source or ""),
    )
    table.done()
    if not channels:
        raise ConfigError("[alerts] has no channel: add a table [alerts.channels.<name>]")
    return config


def _route(table: Table, channels: list[str], severity: str) -> Route:
    known = [*CAUSES, SILENT, WRITES_AGAIN]
    if not set(table.texts("problems")) <= set(known):  # of a detector that somebody has added
        from ..detectors import registered

        known += [problem for problem, _ in registered()[0]]
    route = Route(
        channels=table.choices("channels", channels) or tuple(channels),
        severity=table.choice("severity", SEVERITIES, severity),
        problems=table.choices("problems", dict.fromkeys(known)),
        tags=table.texts("tags"),
        runs=table.texts("runs"),
        owners=table.texts("owners"),
    )
    table.done()
    return route


def _quiet(table: Table) -> Quiet:
    hours, zone = table.text("hours", ""), table.text("timezone", "")
    days = frozenset(DAYS.index(day) for day in table.choices("days", DAYS))
    critical = table.flag("critical", False)
    table.done()
    if not hours and not days:
        raise ConfigError(f'{table.where} lacks hours, as in hours = "22:00-07:00", or days')
    if len(days) == len(DAYS):
        raise table.wrong("days", "fewer than all seven: nothing would ever be sent")
    return Quiet(_hours(table, hours) if hours else None, days, _zone(table, zone), critical)


def _hours(table: Table, text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,2}):(\d\d)\s*-\s*(\d{1,2}):(\d\d)", text.strip())
    numbers = [int(part) for part in found.groups()] if found else []
    good = numbers and all(n < limit for n, limit in zip(numbers, (24, 60, 24, 60), strict=True))
    if not good or numbers[:2] == numbers[2:]:
        raise table.wrong("hours", 'a span of the day such as "22:00-07:00"', text)
    return numbers[0] * 60 + numbers[1], numbers[2] * 60 + numbers[3]


def _zone(table: Table, name: str) -> dt.tzinfo | None:
    if not name:
        return None
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        expected = 'a time zone such as "Europe/Berlin" that is known here (package tzdata)'
        raise table.wrong("timezone", expected, name) from None


def _dashboard(table: Table) -> str:
    text = table.text("dashboard", "").rstrip("/")
    if not text:
        return ""
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        raise table.wrong("dashboard", "an address such as https://layerwatch.example.org") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise table.wrong("dashboard", "an address without login, token or query: it is sent to everybody")
    if not good:
        raise table.wrong("dashboard", "an address such as https://layerwatch.example.org", text)
    return text


def find_config(folder: str | Path | None = None) -> Path | None:
    """The settings file that counts for the runs in a folder: the one in it, or in the nearest folder above,
    else in the working directory.

    Args:
        folder: of runs; None, or a URL of an object store: the working directory only.

    Raises:
        ConfigError: it belongs to another user, whose commands would be run.
    """
    try:
        path = next((path for path in _candidates(folder) if path.is_file()), None)
        owner = path.stat().st_uid if path is not None else 0
    except OSError:  # the working directory was removed, or a folder may not be looked into
        return None
    if hasattr(os, "getuid") and owner not in (os.getuid(), 0):
        raise ConfigError(
            f"{path} belongs to another user, and settings may run commands: it is used only when it "
            f"is named, as in alerts={str(path)!r}"
        )
    return path


def _candidates(folder: str | Path | None) -> Iterator[Path]:
    if folder is not None and "://" not in str(folder):
        place = Path(os.path.abspath(folder))
        yield from (one / FILE for one in (place, *place.parents))
    yield Path.cwd() / FILE
