"""A root's table: what an earlier scan has read is not read again, by scans that are kept and by looks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..durations import moment_of
from ..errors import RunError, StoreError
from ..store import joined
from .scanning import Progress, scan
from .table import TABLE, DamagedTableError, NoTableError, ScanTable, read_table, write_table


def table_of(root: str | Path) -> str | Path:
    """Where the table of a root lies when nobody says where."""
    return joined(root, TABLE)


def scan_and_keep(
    root: str | Path, *, out: str | Path | None = None, since: str | float | None = None, **options: Any
) -> ScanTable:
    """Scan a root and write the table; runs that have not changed since the last time keep their rows.

    Args:
        root: a folder, or its URL in an object store.
        out: the table, a file or a URL; None: layerwatch-scan.parquet in the root.
        since: a length of time such as "7d", a date, or unix seconds: of runs that were not written to since
            then only rows that the table has already are in the new one.
        options: engine ("serial", "processes" or "dask"), scheduler, workers, progress: see `scanning.scan`.

    Returns:
        The table: `rows` (dictionaries), `to_pandas()`, `to_arrow()`, `notes`.

    Raises:
        RunError: an argument is not as described; `out` is there and no scan table: it is left as it is. Or
            the table cannot be written: nothing of the scan is lost, it is the error's attribute `table`.
        StoreError: the object store cannot be listed.
        ValueError: `since` is no moment.
    """
    place = table_of(root) if out is None else out
    moment = moment_of(since) if isinstance(since, str) else since
    before, trouble = _earlier(place)
    if trouble and out is not None:  # it may be anything: only a table of our own name is replaced
        raise RunError(
            f"expected a scan table or no file yet at {place}: it is neither, choose another --out"
        )
    table = scan(root, before=before, since=moment, **options)
    if trouble:
        table = replace(table, notes=[*table.notes, trouble])
    try:
        write_table(table, place)
    except (OSError, ValueError) as error:
        raise NotKeptError(place, error, table) from None
    return table


def look(root: str | Path, *, progress: Progress | None = None) -> ScanTable:
    """Every run of a root as it is now; nothing is written.

    Runs that have not changed since the root's own table was made are not read again, and are new or worse
    where they were so in that scan. A table that cannot be used counts for nothing.

    Args:
        root, progress: see `scanning.scan`.

    Raises:
        RunError: the root is no folder. StoreError: the object store cannot be listed.
    """
    try:
        before, _ = _earlier(table_of(root))
    except StoreError:
        raise
    except RunError:  # of a newer layerwatch
        before = None
    table = scan(root, before=before, progress=progress)
    known = {row["run"]: row for row in before.rows} if before is not None else {}
    for row in table.rows:
        past = known.get(row["run"])
        if past is not None and past["scanned"] == row["scanned"]:
            row["health_before"] = past["health_before"]
    return table


def _earlier(place: str | Path) -> tuple[ScanTable | None, str]:
    """The table that is there, and what is wrong with it. A damaged one is made anew."""
    try:
        return read_table(place), ""
    except NoTableError:
        return None, ""
    except DamagedTableError as error:
        return None, f"every run was read anew: {error}"


class NotKeptError(RunError):
    """The table of a scan cannot be written. `table`: the scan."""

    def __init__(self, place: str | Path, error: Exception, table: ScanTable) -> None:
        reason = getattr(error, "strerror", None) or error
        super().__init__(f"the scan cannot be kept at {place} ({reason}): choose another --out")
        self.table = table
