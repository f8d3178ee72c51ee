"""Turning finished write-ahead files into Parquet parts, and merging parts.

Everything here may be interrupted at any point: files are written whole, then renamed, and only then is
removed what they cover. Running it again finishes the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from .parts import open_part, write_part
from .schema import TABLES, upgrade
from .spans import Span, spans
from .wal import WalReader


def never() -> bool:
    return False


def advance(
    run: Path,
    writer: str,
    segments: Sequence[Span],
    *,
    session: int,
    complete: int,
    keep: str = "full",
    stop: Callable[[], bool] = never,
) -> None:
    """What a writer does in the background: its finished write-ahead files become parts.

    Args:
        run: the run's folder. writer: whose files; those of others are left alone.
        segments: its write-ahead files that are finished.
        session: the current one. complete: captures of it that are complete, which roll-ups may hold.
        keep: "full", or "rollup": old rows are removed once a roll-up holds them.
        stop: asked between files; true ends the work early.

    Raises:
        OSError, pyarrow.ArrowException: nothing is lost, the next call tries again.
    """
    for span in segments:
        if stop():
            return
        compact_wal(run, span)


def compact_wal(run: Path, span: Span) -> None:
    """Write the Parquet parts of a finished write-ahead file, then delete it. Interruptible at any point."""
    wal = run / "wal" / f"{span.stem}.wal"
    if not wal.exists():  # done before: its rows are in parts that must not be written again without them
        return
    reader = WalReader(wal)
    reader.read()
    if reader.damaged:  # the file goes, what was wrong with it stays on record
        message = f"{wal.name}: {reader.damaged} damaged bytes were skipped"
        rows = [{"step": 0, "time": time.time(), "event": "note", "message": message, "session": 0}]
        reader.tables["events"].append(pa.RecordBatch.from_pylist(rows, TABLES["events"]))
    for table in TABLES:
        write_part(run, table, span, reader.tables[table])
    wal.unlink(missing_ok=True)


def compact(run: Path, *, limit: int | None = None) -> int:
    """Turn write-ahead files into Parquet and merge each table's parts into one.

    Only for a run that no process writes. `limit`: leave tables alone whose parts together exceed so many
    bytes. Returns the number of files that were replaced.
    """
    replaced = 0
    for span in list(spans(run / "wal", ".wal")):
        compact_wal(run, span)
        replaced += 1
    for table in TABLES:
        _remove_covered(run / table)
        for writer in {s.writer for s in spans(run / table, ".parquet")}:
            parts = {s: p for s, p in spans(run / table, ".parquet").items() if s.writer == writer}
            size = sum(p.stat().st_size for p in parts.values())
            if len(parts) < 2 or (limit is not None and size > limit):
                continue
            try:
                batches = [b for p in parts.values() for b in _read_whole(p, table).to_batches()]
            except (OSError, ValueError, pa.ArrowException):
                continue  # damaged: it stays, and the reader says what is wrong with it
            write_part(
                run, table, Span(writer, min(s.first for s in parts), max(s.last for s in parts)), batches
            )
            replaced += len(parts)
            _remove_covered(run / table)
    return replaced


def _read_whole(part: Path, table: str) -> pa.Table:
    return upgrade(open_part(part, table=table).read(), table)


def _remove_covered(folder: Path) -> None:
    keep = set(spans(folder, ".parquet").values())
    for path in folder.glob("*.parquet"):
        if path not in keep and Span.of(path):
            path.unlink(missing_ok=True)
