"""Scan a root: read the runs that have changed, keep the rows of the others, say what became worse."""

from __future__ import annotations

import functools
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..alerts.message import duration
from ..description import describe
from ..errors import RunError
from ..findings import SEVERITIES
from ..process import alive
from ..run import LIVE_SECONDS
from ..store import Store, store_of
from . import engines
from .places import Place, places, storable, within
from .reading import Row, read_below, unreadable
from .table import HEALTHS, ScanTable

#: What is told of the progress: runs read, runs to be read.
Progress = Callable[[int, int], object]
#: A file that is newer than this scan by more has the date of another clock (seconds).
SKEW = 120.0


def scan(
    root: str | Path,
    *,
    engine: str = "serial",
    scheduler: str | None = None,
    workers: int | None = None,
    since: float | None = None,
    before: ScanTable | None = None,
    progress: Progress | None = None,
) -> ScanTable:
    """Read every run below a root into one table.

    Args:
        root: a folder, or its URL in an object store.
        engine: serial (here), processes (of this machine), dask (`scheduler`, or processes of this machine
            under Dask).
        scheduler: the address of a Dask scheduler; only with the engine dask.
        workers: how many processes; None: one a core. Not with `scheduler`.
        since: unix seconds: of the runs that were not written to since then only the rows of `before` are
            kept.
        before: the table of an earlier scan: runs whose files are as they were are not read again.
        progress: called after each run.

    Returns:
        The table: a run that cannot be read is a row with the reason.

    Raises:
        RunError: an argument is not as described, the root is no folder, the engine cannot be started.
        StoreError: the object store cannot be listed.
    """
    _check(engine, scheduler, workers)
    store = _opened(root)
    now, clock = time.time(), time.monotonic()
    # By the path below the root, which may be mounted elsewhere by now.
    known = {row["run"]: row for row in before.rows} if before is not None else {}
    private: list[str] = []
    found = places(store, private)
    for name, row in known.items():
        if within(name, private):
            found += _unlisted(store, row)
    kept, unread, left_out = _sorted_out(found, known, since)
    rows = {place.name: row | {"url": place.url, "wrote": place.wrote} for place, row in kept}
    for done, (place, answer) in enumerate(_read(store, unread, engine, scheduler, workers), 1):
        row = unreadable(place, answer) if isinstance(answer, str) else answer
        rows[place.name] = _with_past(_relative(row, store.url), known)
        if progress is not None:
            progress(done, len(unread))
    _opened(root)  # a share that has gone meanwhile is no root without runs
    ended = now + time.monotonic() - clock
    for name, row in rows.items():
        _hear(row, known.get(name), before, now)
        _judge(row, known.get(name), before, ended)
        row["live"] = _live(store, row, now)
    _mark_copies(list(rows.values()))
    newest = sorted(rows.values(), key=lambda row: -(row["created"] or row["wrote"] or 0.0))
    notes = _notes(newest, left_out, private, now)
    return ScanTable(store.url, newest, ended, before.scanned if before is not None else None, notes)


def _check(engine: str, scheduler: str | None, workers: int | None) -> None:
    if engine not in engines.ENGINES:
        raise RunError(f"expected an engine among {', '.join(engines.ENGINES)}, got {engine!r}")
    if scheduler is not None and engine != "dask":
        raise RunError(f"expected no scheduler with the engine {engine}: choose the engine dask, or drop it")
    if workers is not None and (workers < 1 or engine == "serial" or scheduler is not None):
        raise RunError(
            f"expected workers above 0 with the engines processes and dask, got {workers} with {engine}"
            + (" and a scheduler, which has its own" if scheduler else "")
        )


def _opened(root: str | Path) -> Store:
    store = store_of(root)
    if store.path is None:
        return store
    if not store.path.is_dir():
        raise RunError(f"expected a folder that holds runs, but {root} is none: check the path")
    return Store(store.path.resolve())  # the table's rows are opened from anywhere


def _sorted_out(
    found: list[Place], known: dict[str, Row], since: float | None
) -> tuple[list[tuple[Place, Row]], list[Place], int]:
    """Places with rows that are good still; places to be read; how many there are of neither kind."""
    kept, unread, left_out = [], [], 0
    for place in found:
        row = known.get(place.name)
        old = since is not None and place.wrote < since
        if row is not None and (row["key"] == place.key or old):
            kept.append((place, row))
        elif old:
            left_out += 1
        else:
            unread.append(place)
    return kept, unread, left_out


def _unlisted(store: Store, row: Row) -> list[Place]:
    """A run of the earlier table in a folder that is not listed: by its own listing where that is allowed;
    none when it has gone."""
    run = row["run"]
    try:
        own = [place for place in places(store.at(run)) if not place.run]
    except OSError:
        return [Place(run, run, store.at(run).url, "", row["wrote"] or 0.0, row["bytes"] or 0)]
    return [place._replace(run=run, name=run) for place in own]


def _read(
    store: Store, unread: list[Place], engine: str, scheduler: str | None, workers: int | None
) -> Iterator[engines.Done[Place, Row]]:
    work = functools.partial(read_below, store.url)
    if not unread or engine == "serial":
        return engines.serial(work, unread)
    if engine == "processes":
        return engines.processes(work, unread, workers)
    return engines.dask(work, unread, workers, scheduler)


def _relative(row: Row, root: str) -> Row:
    """What is wrong with a run, without the place of the root: the table may be read anywhere."""
    error = row["error"] and row["error"].replace(f"{root}/", "")
    return row | {"error": error, "notes": [note.replace(f"{root}/", "") for note in row["notes"]]}


def _with_past(row: Row, known: dict[str, Row]) -> Row:
    """Of a run that cannot be read any more: what was known of it."""
    past = known.get(row["run"])
    if row["error"] is None or past is None or past["steps"] is None:
        return row
    news = ("url", "health", "error", "key", "wrote", "bytes", "scanned", "seconds", "live")
    return past | {name: row.get(name) for name in news}


def _hear(row: Row, past: Row | None, before: ScanTable | None, now: float) -> None:
    """When the run was last seen to write, by our clock: that of the writer may be any."""
    wrote = row["wrote"] or 0.0
    if past is not None and past.get("heard") is not None and past["wrote"] == row["wrote"]:
        row["heard"] = past["heard"]
    elif past is not None and before is not None:
        row["heard"] = wrote if before.scanned - SKEW <= wrote <= now else now
    else:
        row["heard"] = min(wrote, now)


def _live(store: Store, row: Row, now: float) -> bool:
    """A process is writing."""
    if row["closed"] or row["steps"] is None:
        return False
    if row["host"] == socket.gethostname():
        try:
            info, _ = describe(_folder(store, row))
        except (ValueError, OSError):
            return False
        return not info.get("closed") and alive(info.get("pid"), info.get("process_started"))
    return now - row["heard"] < (LIVE_SECONDS if store.path is not None else 2 * LIVE_SECONDS)


def _folder(store: Store, row: Row) -> Store:
    return store if row["url"] == store.url else store.at(row["run"])


def _judge(row: Row, past: Row | None, before: ScanTable | None, now: float) -> None:
    """What is new against the scan before: since when each finding is known, and whether it got worse."""
    told = {f["problem"]: f for f in past["findings"]} if past is not None else {}
    # What the first scan finds may be old: it was there when the run wrote last.
    noticed = now if before is not None else min(row["wrote"] or now, now)
    row["findings"] = [dict(finding) for finding in row["findings"]]
    for finding in row["findings"]:
        earlier = told.get(finding["problem"])
        known = earlier is not None and _rank(earlier) >= _rank(finding)
        finding["noticed"] = earlier["noticed"] if earlier is not None and known else noticed
    row["health_before"] = past["health"] if past is not None else None
    row["worse"] = past["worse"] if past is not None else None
    sick = row["health"] not in ("healthy", "unknown")
    if past is None and before is not None and sick:
        row["worse"] = now
    if past is not None and HEALTHS.index(row["health"]) < HEALTHS.index(past["health"]):
        row["worse"] = now


def _rank(finding: Row) -> int:
    return SEVERITIES.index(finding["severity"])


def _mark_copies(rows: list[Row]) -> None:
    """Of folders with one training, the one that went furthest is it; the others are copies."""
    trainings: dict[str, list[Row]] = {}
    for row in rows:
        row["copy_of"] = None
        if row["id"] is not None:
            trainings.setdefault(row["id"], []).append(row)
    for same in trainings.values():
        first, *others = sorted(same, key=lambda row: (-(row["steps"] or 0), -row["live"], row["run"]))
        for row in others:
            row["copy_of"] = first["run"]


def _notes(rows: list[Row], left_out: int, private: list[str], now: float) -> list[str]:
    """What is wrong with the scan as a whole."""
    notes = []
    if private:
        many = "1 folder" if len(private) == 1 else f"{len(private):,} folders"
        notes.append(
            f"{many} may not be listed, {storable(min(private))} for one: "
            "what is new there is not seen, scan as someone who may read it"
        )
    if left_out:
        notes.append(
            f"{_runs(left_out, 'was', 'were')} not written to since then, and in no earlier table: left out"
        )
    ahead = {row["run"]: max(row["wrote"] or 0.0, row["created"] or 0.0) - now for row in rows}
    ahead = {run: seconds for run, seconds in ahead.items() if seconds > SKEW}
    if ahead:
        notes.append(
            f"{_runs(len(ahead))} dated up to {duration(max(ahead.values()))} after this scan, "
            f"{next(iter(ahead))} for one: set the clocks of the machines that wrote them, or of this one"
        )
    copies = [row for row in rows if row["copy_of"]]
    if copies:
        notes.append(
            f"{_runs(len(copies), 'is a copy', 'are copies')} of others, such as {copies[0]['run']} of "
            f"{copies[0]['copy_of']}"
        )
    return notes


def _runs(count: int, one: str = "is", more: str = "are") -> str:
    return f"1 run {one}" if count == 1 else f"{count:,} runs {more}"


def worsened(table: ScanTable, since: float | None = None) -> list[tuple[Row, list[dict[str, Any]]]]:
    """Runs that got worse, or got a new alarm, at this scan or since then; with their new alarms.

    Of the first scan, which has nothing to compare with: none.
    """
    if table.before is None and since is None:
        return []
    start = table.scanned if since is None else since
    found = []
    for row in table.rows:
        new = [f for f in row["findings"] if f["severity"] != "info" and f["noticed"] >= start]
        if (row["worse"] or 0.0) >= start or (new and row["copy_of"] is None):
            found.append((row, new))
    return sorted(found, key=lambda pair: HEALTHS.index(pair[0]["health"]))
