"""`layerwatch scan`: a whole lab's runs as one table, once or again and again."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .terminal import complain, tell

if TYPE_CHECKING:
    from collections.abc import Callable

    from .monitor.alerts.watchman import Watchman
    from .monitor.fleet import ScanTable

#: Without a terminal a line of progress is written so often (seconds).
LINE_SECONDS = 10.0
#: So many runs that became worse are listed; the others are in the table.
MOST_LISTED = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be typed."""
    parser.add_argument("root", metavar="ROOT", help="folder of runs, or s3://bucket/prefix")
    parser.add_argument(
        "--engine",
        choices=("serial", "processes", "dask"),
        default="serial",
        help="who reads the runs: this process, one a core, or a Dask cluster (default: %(default)s)",
    )
    parser.add_argument(
        "--scheduler", metavar="ADDRESS",
        help="of the engine dask: a running cluster, such as tcp://10.0.0.5:8786 (default: one of this "
        "machine's own)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes of this machine (default: one a core)"
    )
    parser.add_argument(
        "--since", metavar="WHEN",
        help="read only runs that were written to since then, and list what became worse since then: 7d, 12h "
        "or a date (default: since the scan before)",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="FILE",
        help="the table, a file or URL; what it holds already is not read again "
        "(default: layerwatch-scan.parquet in ROOT)",
    )  # fmt: skip
    parser.add_argument(
        "--every", metavar="TIME", help="scan again so often, such as 60s or 10min, until it is stopped"
    )
    parser.add_argument(
        "--where", default="", metavar="FILTER",
        help="print only runs that fit, such as 'health:critical age<7d lr>0.01'; the table holds all",
    )  # fmt: skip
    parser.add_argument(
        "--alerts", nargs="?", const="", metavar="FILE",
        help="tell people of new findings and of trainings that have gone silent, as a layerwatch.toml says "
        "(default: the nearest one at or above ROOT)",
    )  # fmt: skip
    parser.add_argument("--format", choices=("text", "json"), default="text", help="(default: %(default)s)")


def scan(options: argparse.Namespace) -> int:
    """One scan, or one after the other."""
    from .monitor.durations import moment_of, seconds_of
    from .monitor.fleet import table_of
    from .monitor.fleet.search import parse

    parse(options.where)  # better now than after the scan
    if options.since:
        moment_of(options.since)
    pause = None if options.every is None else seconds_of(options.every)
    if pause == 0:
        raise ValueError("expected a pause with --every, such as 60s, got none")
    place = options.out or table_of(options.root)
    with contextlib.ExitStack() as closing:
        watchman = None if options.alerts is None else closing.enter_context(_watchman(options, place))
        if pause is None:
            return _once(options, place, watchman)
        code, rounds = 0, 0
        try:
            while True:
                began = time.monotonic()
                try:
                    code = _once(options, place, watchman)
                except (ValueError, OSError) as error:
                    if not rounds:  # what was asked for is wrong; later on the next round may do better
                        raise
                    complain("scan", error)
                rounds += 1
                time.sleep(max(0.0, pause - (time.monotonic() - began)))
        except KeyboardInterrupt:
            return code


def _watchman(options: argparse.Namespace, place: str | Path) -> Watchman:
    """It remembers beside the table whom it has told."""
    from .monitor.alerts.config import find_config, read_config
    from .monitor.alerts.watchman import STATE, Watchman
    from .monitor.store import joined, parted

    path = options.alerts or find_config(options.root)
    if path is None:
        raise ValueError(
            f"expected a layerwatch.toml at or above {options.root}, found none: "
            "write one, or give --alerts FILE"
        )
    return Watchman(read_config(path), joined(parted(place)[0], STATE))


def _once(options: argparse.Namespace, place: str | Path, watchman: Watchman | None) -> int:
    from .monitor.durations import moment_of
    from .monitor.fleet import NotKeptError, scan_and_keep
    from .monitor.fleet.search import parse

    since, query, trouble = moment_of(options.since) if options.since else None, parse(options.where), None
    try:
        with Progress(sys.stderr) as progress:
            table = scan_and_keep(
                options.root, out=options.out or None, since=since, engine=options.engine,
                scheduler=options.scheduler, workers=options.workers, progress=progress.at,
            )  # fmt: skip
    except NotKeptError as error:
        table, trouble = error.table, error
    told = watchman.look(table) if watchman is not None else []
    shown = replace(table, rows=[row for row in table.rows if query.fits(row)])
    if options.format == "json":
        print(json.dumps(document(shown, since), indent=1, allow_nan=False), flush=True)
    else:
        tell(*lines_of(shown, since), *(f"alert {record.line(runs=True)}" for record in told))
        if trouble is None:
            tell(f"table: {place}")
    if trouble is not None:
        complain("scan", trouble)
        return 2
    return 0


def document(table: ScanTable, since: float | None = None) -> dict[str, Any]:
    """For JSON: counts by health, what became worse, every row, notes. Null where a number is not finite."""
    from .monitor.findings import plain
    from .monitor.fleet import worsened

    found = {
        "version": 1,
        "root": table.root,
        "scanned": table.scanned,
        "before": table.before,
        "health": dict(Counter(row["health"] for row in table.rows)),
        "worse": [
            {"run": row["run"], "before": row["health_before"], "health": row["health"], "findings": new}
            for row, new in worsened(table, since)
        ],
        "runs": [{**row, "config": json.loads(row["config"] or "{}")} for row in table.rows],
        "notes": table.notes,
    }
    return plain(found)


def lines_of(table: ScanTable, since: float | None = None) -> list[str]:
    """The counts, what became worse, what could not be read or only in part, and notes."""
    from .monitor.fleet import worsened
    from .monitor.fleet.table import HEALTHS

    counts = Counter(row["health"] for row in table.rows)
    live = sum(row["live"] for row in table.rows)
    many = f"{len(table.rows):,} run{'s' * (len(table.rows) != 1)}"
    parts = [f"{counts[health]:,} {health}" for health in HEALTHS if counts[health]]
    lines = [": ".join([many, ", ".join(parts)]) if parts else many]
    lines[0] += f"; {live:,} live" if live else ""
    worse = worsened(table, since)
    if table.before is None and since is None:
        lines.append("the first scan: the next one tells what became worse")
    else:
        start = table.before if since is None else since
        lines.append(f"worse since {_when(start)}: {len(worse) or 'none'}")
    lines += [_worse(row, new, last=since is None) for row, new in worse[:MOST_LISTED]]
    if len(worse) > MOST_LISTED:
        lines.append(f"  and {len(worse) - MOST_LISTED} more, in the table")
    lines += _listed("could not be read:", [row for row in table.rows if row["error"]], _reason)
    damaged = [row for row in table.rows if row["damaged"] and not row["error"]]
    lines += _listed("partly damaged, judged by the rest:", damaged, _damage)
    return [*lines, *(f"note: {note}" for note in table.notes)]


def _listed(title: str, rows: list[dict[str, Any]], what: Callable[[dict[str, Any]], str]) -> list[str]:
    lines = [title] * bool(rows) + [f"  {row['run']}: {what(row)}" for row in rows[:MOST_LISTED]]
    return lines + [f"  and {len(rows) - MOST_LISTED} more, in the table"] * (len(rows) > MOST_LISTED)


def _reason(row: dict[str, Any]) -> str:
    return row["error"]


def _damage(row: dict[str, Any]) -> str:
    first, *more = row["damaged"]
    return f"{first} ({len(more)} more)" if more else first


def _worse(row: dict[str, Any], new: list[dict[str, Any]], *, last: bool) -> str:
    """`last`: against the scan before; what a run was at another time is not known."""
    change = f"{row['health_before'] or 'new'} -> {row['health']}" if last else row["health"]
    what = "; ".join(f"{f['problem']} since step {f['first_step']}" for f in new) or row["error"] or ""
    return f"  {row['run']}: {change}" + (f": {what}" if what else "")


def _when(moment: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


class Progress:
    """How far a scan is: a bar on a terminal, else a line now and then. Nothing of a quick scan."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._began = self._told = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def at(self, done: int, total: int) -> None:
        """So many runs of so many are read."""
        now = time.monotonic()
        if self._stream.isatty():
            self._draw(done, total)
        elif now - self._told > LINE_SECONDS:
            self._told = now
            print(rate(done, total, now - self._began), file=self._stream, flush=True)

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("reading runs"), progress.BarColumn(), progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[rate]}"), progress.TimeRemainingColumn(),
                console=Console(file=self._stream), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=total, rate="")
            self._bar.start()
        speed = done / max(time.monotonic() - self._began, 1e-9)
        self._bar.update(self._task, completed=done, total=total, rate=f"{speed:.3g} a second")


def rate(done: int, total: int, seconds: float) -> str:
    """A line of progress.

    >>> rate(120, 1000, 30.0)
    '120 of 1,000 runs, 4 a second, 3 min 40 s left'
    """
    speed = done / max(seconds, 1e-9)
    minutes, rest = divmod(round((total - done) / speed), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{done:,} of {total:,} runs, {speed:.3g} a second, {left} left"
