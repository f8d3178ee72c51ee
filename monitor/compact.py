"""Turning finished write-ahead files into Parquet parts, rolling them up, merging them.

Everything here may be interrupted at any point: files are written whole, then renamed, and only then is
removed what they cover. Running it again finishes the work. No more is held in memory than one write-ahead
file, or a few thousand rows of each of the parts that are merged.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from .bins import roll_up_run, thin_out
from .parts import sync_folder, write_part
from .process import alive
from .schema import SCHEMAS, TABLES
from .spans import Span, spans
from .tiers import FAN_IN, Stop, Stopped, check, merge_parts
from .wal import MAGIC, WalReader, read_header

#: A write-ahead file of another machine is left alone until nothing came for so long.
QUIET_SECONDS = 3600.0


def never() -> bool:
    return False


def advance(
    run: Path,
    writer: str,
    segments: Sequence[Span],
    *,
    session: int,
    complete: int,
    over: bool = False,
    keep: str = "full",
    stop: Stop = never,
) -> None:
    """What a writer does in the background: its finished write-ahead files become parts, captures are rolled
    up, small parts are merged, and what is not to be kept is removed.

    Args:
        run: the run's folder. writer: whose files; those of others are left alone.
        segments: its write-ahead files that are finished; with them, older ones of its earlier sessions,
            as far as no other process of this name still writes them.
        session: the current one. complete: captures of it, from the first, that have all their rows.
        over: the session has ended.
        keep: "full", or "rollup": old rows are removed once a roll-up holds them.
        stop: asked between files and between row groups; true ends the work early.

    Raises:
        OSError, pyarrow.ArrowException: nothing is lost, the next call tries again.
    """
    newest = max((s.last for s in segments), default=0)
    try:
        files = [s for s in spans(run / "wal", ".wal") if s.writer == writer and s.last <= newest]
        theirs = [s for s in files if s not in segments and _in_use(run, s)]
        _absorb(run, writer, [s for s in files if s not in theirs], stop)
        roll_up_run(
            run,
            writer,
            {session: complete},
            over=over,
            keep=keep,
            only=session if theirs else None,
            stop=stop,
        )
        _merge_all(run, writer, stop=stop)
        if keep == "rollup":
            thin_out(run, writer)
    except Stopped:
        return


def compact(run: Path, *, writer: str | None = None, limit: int | None = None, stop: Stop = never) -> int:
    """Turn all write-ahead files of a run into Parquet, roll up, and merge each table's parts.

    Only for a run that no process writes. Uses less than 300 MB of memory, whatever the size of the run.

    Args:
        writer: only merge the parts of this one, which `advance` has made: others may still write.
        limit: leave parts alone that together exceed so many bytes. stop: see `advance`.

    Returns:
        The number of files that were replaced.

    Raises:
        OSError: the folder cannot be written to, or the disk is full; nothing is lost.
    """
    replaced = 0
    found = [spans(run / folder, suffix) for folder, suffix in _folders()]
    try:
        for name in sorted(
            {span.writer for files in found for span in files} if writer is None else {writer}
        ):
            if writer is None:
                files = [span for span in spans(run / "wal", ".wal") if span.writer == name]
                replaced += _absorb(run, name, files, stop)
                roll_up_run(run, name, {}, over=True, keep=_keep(run), stop=stop)
            replaced += _merge_all(run, name, limit=limit, whole=True, stop=stop)
            if _keep(run) == "rollup":
                thin_out(run, name)
    except Stopped:
        return replaced
    for table in SCHEMAS if writer is None else ():
        for leftover in (run / table).glob(".*.parquet.tmp"):
            leftover.unlink(missing_ok=True)
    return replaced


def _folders() -> list[tuple[str, str]]:
    return [("wal", ".wal"), *((table, ".parquet") for table in TABLES)]


def _keep(run: Path) -> str:
    try:
        return json.loads((run / "run.json").read_text())["keep"]
    except (OSError, ValueError, KeyError, TypeError):
        return "full"


def _absorb(run: Path, writer: str, files: Sequence[Span], stop: Stop) -> int:
    """Turn these write-ahead files of a writer into parts; returns how many."""
    absorbed = 0
    for span in files:
        check(stop)
        absorbed += compact_wal(run, span)
        if absorbed and absorbed % FAN_IN == 0:  # so that there are never many parts to merge or roll up
            _merge_all(run, writer, stop=stop)
    return absorbed


def _in_use(run: Path, span: Span) -> bool:
    """Whether another process may still append to a file; on another machine it cannot be asked."""
    wal = run / "wal" / f"{span.stem}.wal"
    try:
        header, changed = read_header(wal), wal.stat().st_mtime
    except FileNotFoundError:
        return False
    if header.get("host") == socket.gethostname():
        return alive(header.get("pid"), header.get("process_started"))
    return time.time() - changed < QUIET_SECONDS


def _merge_all(run: Path, writer: str, *, limit: int | None = None, whole: bool = False, stop: Stop) -> int:
    replaced = 0
    for table in SCHEMAS:
        if table in TABLES:
            writers = [writer]
        else:
            writers = sorted(
                {s.writer for s in spans(run / table, ".parquet") if s.writer.startswith(f"{writer}-s")}
            )
        for name in writers:
            replaced += merge_parts(run, table, name, limit=limit, whole=whole, stop=stop)
    return replaced


def compact_wal(run: Path, span: Span) -> bool:
    """Write the Parquet parts of a finished write-ahead file, then delete it. Interruptible at any point.

    A file of a newer version stays as it is, one with damaged bytes is moved to `damaged/` in the end.

    Returns:
        Whether it was turned into Parquet.
    """
    wal = run / "wal" / f"{span.stem}.wal"
    reader = WalReader(wal)
    reader.read()
    if reader.newer or not wal.exists():
        return False
    damaged = reader.damaged > 0 or _strange_tail(wal, reader)
    if damaged or reader.tail:  # what was wrong with it stays on record
        message = f"{wal.name}: {reader.damaged + reader.tail} damaged or torn bytes were skipped"
        rows = [{"step": 0, "time": time.time(), "event": "note", "message": message, "session": 0}]
        reader.tables["events"].append(pa.RecordBatch.from_pylist(rows, TABLES["events"]))
    for table in TABLES:
        if not any(part.covers(span) and part != span for part in spans(run / table, ".parquet")):
            write_part(run, table, span, reader.tables.pop(table))
    if damaged:
        (run / "damaged").mkdir(exist_ok=True)
        os.replace(wal, run / "damaged" / wal.name)
    else:
        wal.unlink(missing_ok=True)
    sync_folder(wal.parent)
    return True


def _strange_tail(wal: Path, reader: WalReader) -> bool:
    """Whether what follows the last whole frame is anything else than one that a killed process began."""
    with wal.open("rb") as file:
        file.seek(reader.offset)
        tail = file.read(len(MAGIC))
    return not MAGIC.startswith(tail)
