"""The watchman looks at scan tables, and tells what trainings cannot tell, their own death included."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from .alert import SILENT, WRITES_AGAIN, Alert
from .config import Config
from .message import duration
from .records import Record
from .statefile import StateFile
from .teller import Teller

if TYPE_CHECKING:
    from ..fleet.table import ScanTable

#: The state's name in the folder of the runs.
STATE = "layerwatch-alerts.json"
VERSION = 1
#: A live training tells its own channels itself, for so long after a scan has seen the problem (seconds).
LEAVE_SECONDS = 600.0
#: Runs that were not seen for so long are forgotten, and so many records are kept.
FORGET_SECONDS, RECORDS = 30 * 86400.0, 500
#: A run that appears between two looks may have begun then; clocks of stores may be wrong by so much.
SKEW_SECONDS = 3600.0


@dataclass
class _Writing:
    """A run that is not closed. steps, bytes: how far its log has come; since: the scan that saw that first,
    by the clock of the scans alone, so that a wrong clock of the writer's is no silence."""

    steps: int
    bytes: int
    since: float
    armed: bool  # it was seen to live: its silence is news
    silent: bool = False  # which was told


class Watchman:
    """Tells of what the scans find: each finding once, over restarts, and not what a training has told.

    At its first look, and for a channel that was not there before, what ended runs have is known and not
    told. A context manager.

    Args:
        config: channels and routes.
        state_path: the file that it remembers in, or its URL; made if missing.
        clock: the time, in unix seconds.

    Raises:
        RunError: the state is damaged, or another watchman uses it. StoreError: see `StateFile`.
    """

    def __init__(
        self, config: Config, state_path: str | Path, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._news: list[Record] = []
        self._teller = Teller(config, self._note, clock=clock)
        self._looked: float | None = None
        self._channels: set[str] = set()  # that were there at the look before
        self._seen: dict[str, float] = {}
        self._writing: dict[str, _Writing] = {}
        self._records: list[dict[str, Any]] = []
        self._file = StateFile(state_path)
        try:
            self._restore()
        except BaseException:
            self._file.close()
            raise

    def look(self, table: ScanTable, *, timeout: float = 30.0) -> list[Record]:
        """Tell what is new in a scan.

        Args:
            timeout: how long to wait for the channels, in seconds; what is not sent by then is tried on, by
                this process or at the next look.

        Returns: what became of messages since the look before.
        """
        with self._lock:
            letters: dict[str, list[Alert]] = {}
            for row in table.rows:
                if row.get("copy_of"):
                    continue
                self._seen[_key(row)] = table.scanned
                for alert, channels in [*self._findings(row), *self._silence(row, table.scanned)]:
                    for name in channels:
                        letters.setdefault(name, []).append(alert)
            self._forget(table.scanned)
            self._looked, self._channels = table.scanned, set(self._teller.config.channels)
            self._teller.delivery.put(letters)
            self._save()
        self._teller.delivery.settle(timeout)
        self._save()
        with self._lock:
            news, self._news = self._news, []
        return news

    def close(self, timeout: float = 5.0) -> None:
        """Stop to send; what waits is sent by the next watchman."""
        self._teller.delivery.close(timeout, "", tell=False)
        if self._looked is not None:
            self._save()
        self._file.close()

    def __enter__(self) -> Watchman:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What is told

    def _findings(self, row: Mapping[str, Any]) -> Iterator[tuple[Alert, list[str]]]:
        """What is new to which channels."""
        ledger, live = self._teller.ledger, bool(row.get("live"))
        for told in row.get("alerted") or ():
            ledger.note(_key(row), told["problem"], told["severity"], told["channel"], told["time"])
        for finding in row.get("findings") or ():
            alert = self._alert(
                row, finding["problem"], finding["severity"], finding.get("summary") or "",
                layers=tuple(finding.get("layers") or ()), advice=finding.get("advice") or "",
                first_step=_step(finding.get("first_step")), last_step=_step(finding.get("last_step")),
            )  # fmt: skip
            fresh = alert.time - (finding.get("noticed") or 0.0) < LEAVE_SECONDS
            own = set(row.get("alerts") or ()) if live and fresh else set()

            def leave(channel: str, alert: Alert = alert, own: set[str] = own) -> bool:
                if not live and channel not in self._channels:  # it is no news that it was so
                    ledger.mark(alert, channel, alert.time)
                    return True
                return channel in own

            yield alert, self._teller.receivers(alert, lasts=live, leave=leave)

    def _silence(self, row: Mapping[str, Any], scanned: float) -> Iterator[tuple[Alert, list[str]]]:
        """A training that was seen to live and writes nothing any more, or writes again."""
        limit, key = self._teller.config.silent, _key(row)
        if row.get("health") == "unreadable" or limit is None:
            return
        known, steps, size = self._writing.get(key), row.get("steps") or 0, row.get("bytes") or 0
        last = steps - 1
        if row["closed"]:
            self._writing.pop(key, None)
            if known is not None and known.silent:
                yield self._again(row, "it has gone on, and ended in order")
        elif known is None:
            self._writing[key] = _Writing(steps, size, scanned, self._lived(row))
        elif known.steps != steps:
            self._writing[key] = _Writing(steps, size, scanned, armed=True)
            if known.silent:
                yield self._again(row, f"it goes on, now at step {last}")
        elif known.bytes != size:  # a long validation, or somebody labels or compacts what has long ended
            known.bytes, known.since = size, scanned
        elif known.armed and not known.silent and scanned - known.since >= limit:
            known.silent = True
            text = (
                f"Nothing was written for {duration(scanned - known.since)} since step {last}, and the log "
                "was not closed: the training was killed, hangs, or cannot reach the place it writes to."
            )
            advice = "See whether its process still runs; the log shows what happened until then."
            alert = self._alert(row, SILENT, "critical", text, advice=advice, last_step=last)
            yield alert, self._teller.receivers(alert, lasts=False)

    def _lived(self, row: Mapping[str, Any]) -> bool:
        """A run that is seen for the first time is a training under way, or was one since the last look."""
        if row.get("live") or self._looked is None:
            return bool(row.get("live"))
        return (row.get("wrote") or 0.0) > self._looked - SKEW_SECONDS

    def _again(self, row: Mapping[str, Any], what: str) -> tuple[Alert, list[str]]:
        """To those who were told of the silence."""
        alert = self._alert(row, WRITES_AGAIN, "info", f"After its silence {what}.")
        told = self._teller.ledger.told_silence(alert.key)
        return alert, [name for name in told if name in self._teller.config.channels]

    def _alert(self, row: Mapping[str, Any], problem: str, severity: Any, summary: str, **more: Any) -> Alert:
        return Alert(
            run=row["run"], key=_key(row), problem=problem, severity=severity, summary=summary,
            owner=row.get("owner") or "", tags=tuple(row.get("tags") or ()),
            link=self._teller.config.link(row["run"], problem), time=self._clock(), **more,
        )  # fmt: skip

    # What is remembered

    def _note(self, record: Record) -> None:
        with self._lock:
            self._news.append(record)
            self._records.append({"time": record.time, "text": record.line(runs=True)})
            del self._records[:-RECORDS]
        if record.outcome == "sent":  # now, so that it is not sent again after a crash
            self._save()

    def _forget(self, scanned: float) -> None:
        self._seen = {key: seen for key, seen in self._seen.items() if scanned - seen < FORGET_SECONDS}
        self._writing = {key: one for key, one in self._writing.items() if key in self._seen}
        self._teller.ledger.forget(self._seen)

    def _save(self) -> None:
        with self._lock:
            waiting = self._teller.delivery.state()
            self._file.write(
                {
                    "version": VERSION,
                    "looked": self._looked,
                    "channels": sorted(self._channels),
                    "seen": self._seen,
                    "told": self._teller.ledger.to_dict(),
                    "waiting": {
                        name: [[alert.to_dict(), tried] for alert, tried in alerts]
                        for name, alerts in waiting.items()
                    },
                    "writing": {key: asdict(one) for key, one in self._writing.items()},
                    "records": self._records,
                }
            )

    def _restore(self) -> None:
        state = self._file.read()
        if state is None:
            return
        try:
            if state["version"] > VERSION:
                raise RunError(f"{self._file.path} is of a newer layerwatch: upgrade this one")
            self._looked, self._channels = float(state["looked"]), set(state["channels"])
            self._seen = {str(key): float(seen) for key, seen in state["seen"].items()}
            self._teller.ledger.restore(state["told"])
            self._writing = {key: _Writing(**one) for key, one in state["writing"].items()}
            self._records = list(state["records"])
            waiting = {
                name: [(Alert.from_dict(alert), tried) for alert, tried in alerts]
                for name, alerts in state["waiting"].items()
            }
        except RunError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._file.damaged() from None
        self._teller.delivery.restore(waiting)
        for name in waiting.keys() - self._teller.config.channels.keys():
            lost = tuple(alert for alert, _ in waiting[name])
            if lost:
                self._note(Record("not sent", name, lost, self._clock(), "there is no such channel any more"))


def _key(row: Mapping[str, Any]) -> str:
    """What a training is known by, whatever its folder is called."""
    return row.get("id") or row["url"]


def _step(value: Any) -> int:
    return -1 if value is None else int(value)
