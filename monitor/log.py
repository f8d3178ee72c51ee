"""Writing a run: the write-ahead file of this process, its rotation into Parquet parts, and their merging.

    <run>/run.json                         who, when, where, which tensors
    <run>/wal/r0-000003.wal                what came last, readable by `Run`
    <run>/stats/r0-000001-000002.parquet   the rest; likewise values/, scalars/, events/

A part is named after the range of write-ahead files it holds and is written whole, then renamed. A reader
ignores a write-ahead file, or a part, whose range a wider part of the same table covers: there is no moment
at which a row is missing or double, and nothing but names has to agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import RunError, RunExistsError
from .schema import SCHEMA_VERSION, SORT_KEYS, TABLES, VALUES
from .wal import WalReader, WalWriter

#: A write-ahead file is turned into Parquet at this size, or at an age of 30 s or a tenth of the run's age.
SEGMENT_BYTES = 32 << 20
SEGMENT_SECONDS = 30.0
#: Parts are merged at close up to this size in all; more is left to `layerwatch compact`.
MERGE_BYTES = 256 << 20
#: Rows of a Parquet row group, the least that a reader decodes; a row of `values` may hold 4,096 numbers.
ROW_GROUP, VALUES_ROW_GROUP = 20_000, 500

_NAME = re.compile(r"(?P<writer>.+?)-(?P<first>\d{6})(?:-(?P<last>\d{6}))?\.(?:wal|parquet)$")


class Span(NamedTuple):
    """Which write-ahead files of one writer a file holds."""

    writer: str
    first: int
    last: int

    @classmethod
    def of(cls, path: Path) -> Span | None:
        """Read from the file's name; None for a foreign file."""
        found = _NAME.match(path.name)
        if not found:
            return None
        first = int(found["first"])
        return cls(found["writer"], first, int(found["last"] or first))

    def covers(self, other: Span) -> bool:
        return self.writer == other.writer and self.first <= other.first and other.last <= self.last

    @property
    def stem(self) -> str:
        return f"{self.writer}-{self.first:06d}" + (f"-{self.last:06d}" if self.last > self.first else "")


def spans(folder: Path, suffix: str) -> dict[Span, Path]:
    """The files below `folder` that count: those that no other of them covers, in order."""
    found = {span: p for p in folder.glob(f"*{suffix}") if (span := Span.of(p))}
    return {s: found[s] for s in sorted(found) if not any(o != s and o.covers(s) for o in found)}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write whole, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, default=str))
    os.replace(temporary, path)


class LogWriter:
    """One process's writer of a run. Not thread-safe: the hooks call it from the training thread.

    Args:
        path: the run folder, made if missing.
        info: the content of run.json; `schema_version`, `created`, `closed` are added.
        resume: go on in a folder that already holds a run.

    Raises:
        RunExistsError: the folder holds a run and `resume` is false.
        RunError: the path cannot be a run folder, or there is nothing to resume.
    """

    def __init__(self, path: Path, info: dict[str, Any], *, resume: bool = False, writer: str = "r0") -> None:
        self.path, self.writer = path, writer
        self._claim(resume)
        self.info = {"schema_version": SCHEMA_VERSION, "created": time.time(), **info, "closed": False}
        if resume:
            old = json.loads((path / "run.json").read_text())
            self.info["created"] = old.get("created", self.info["created"])
        taken = [
            s.last for folder in ("wal", *TABLES) for p in (path / folder).glob("*") if (s := Span.of(p))
        ]
        self._sequence = max(taken, default=0)
        self._thread: threading.Thread | None = None
        write_json(path / "run.json", self.info)
        self._open_segment()

    def _claim(self, resume: bool) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise RunError(f"expected a folder for the run, but {path} is a file: choose another run=")
        exists = (path / "run.json").exists()
        if exists and not resume:
            raise RunExistsError(
                f"the run {path} exists already: "
                "pass resume=True to continue it, or another run= to start a new one"
            )
        if resume and not exists:
            raise RunError(f"expected a run to resume at {path}, found none: drop resume=True to start it")
        for folder in ("wal", *TABLES):
            (path / folder).mkdir(parents=True, exist_ok=True)

    def _open_segment(self) -> None:
        self._sequence += 1
        self._opened = time.monotonic()
        name = Span(self.writer, self._sequence, self._sequence).stem
        header = {"writer": self.writer, "pid": os.getpid(), "time": time.time()}
        self._wal = WalWriter(self.path / "wal" / f"{name}.wal", header)

    def update_info(self, **changes: Any) -> None:
        """Change run.json."""
        self.info.update(changes)
        write_json(self.path / "run.json", self.info)

    def stats(self, batch: pa.RecordBatch) -> None:
        """Append rows of `schema.STATS`: on disk (page cache) when this returns."""
        self._wal.append_batch("stats", batch)
        self._rotate_if_due()

    def values(self, rows: Sequence[tuple[int, float, str, str, Iterable[float]]]) -> int:
        """Append rows of `schema.VALUES`; returns the bytes written."""
        if not rows:
            return 0
        columns = list(zip(*rows, strict=True))
        arrays = [pa.array(c, f.type) for c, f in zip(columns, VALUES, strict=True)]
        return self._wal.append_batch("values", pa.RecordBatch.from_arrays(arrays, schema=VALUES))

    def scalars(self, step: int, when: float, numbers: dict[str, float]) -> None:
        """Append one number per name."""
        if numbers:
            self._wal.append_rows("scalars", [[step, when, name, value] for name, value in numbers.items()])
        self._rotate_if_due()

    def event(self, step: int, event: str, message: str) -> None:
        """Append something that happened to the run itself."""
        self._wal.append_rows("events", [[step, time.time(), event, message]])

    def _rotate_if_due(self) -> None:
        now = time.monotonic()
        due = max(SEGMENT_SECONDS, 0.1 * (time.time() - self.info["created"]))
        busy = self._thread is not None and self._thread.is_alive()
        if not busy and (self._wal.size > SEGMENT_BYTES or now - self._opened > due):
            self._wal.close()
            self._open_segment()
            self._thread = threading.Thread(
                target=self._compact_closed, args=(self._sequence,), name="layerwatch-compact", daemon=True
            )
            self._thread.start()

    def _compact_closed(self, before: int) -> None:
        """In the background: write-ahead files before this number become Parquet, or stay as they are."""
        # A failure here loses nothing: `close` tries again, and what fails then is reported.
        with contextlib.suppress(OSError, pa.ArrowException):
            for span in list(spans(self.path / "wal", ".wal")):
                if span.writer == self.writer and span.last < before:
                    compact_wal(self.path, span)

    def close(self) -> None:
        """Turn everything into Parquet and mark the run as closed. Safe to call twice."""
        if self.info["closed"]:
            return
        self._wal.close()
        if self._thread is not None:
            self._thread.join()
        compact(self.path, limit=MERGE_BYTES)
        self.update_info(closed=True, ended=time.time())


def compact_wal(run: Path, span: Span) -> None:
    """Write the Parquet parts of a finished write-ahead file, then delete it. Interruptible at any point."""
    wal = run / "wal" / f"{span.stem}.wal"
    reader = WalReader(wal)
    reader.read()
    if reader.damaged:  # the file goes, what was wrong with it stays on record
        message = f"{wal.name}: {reader.damaged} damaged bytes were skipped"
        rows = [{"step": 0, "time": time.time(), "event": "note", "message": message}]
        reader.tables["events"].append(pa.RecordBatch.from_pylist(rows, TABLES["events"]))
    for table in TABLES:
        write_part(run, table, span, reader.tables[table])
    wal.unlink(missing_ok=True)


def write_part(run: Path, table: str, span: Span, batches: Sequence[pa.RecordBatch]) -> Path:
    """One sorted Parquet part: zstd, page checksums, row groups that hold few tensors each."""
    content = pa.Table.from_batches(batches, TABLES[table]).sort_by(SORT_KEYS[table])
    content = content.replace_schema_metadata({"layerwatch_schema_version": str(SCHEMA_VERSION)})
    target = run / table / f"{span.stem}.parquet"
    temporary = target.with_name(f".{target.name}.tmp")
    strings = [f.name for f in TABLES[table] if pa.types.is_string(f.type)]
    pq.write_table(
        content,
        temporary,
        compression="zstd",
        use_dictionary=strings,  # type: ignore[arg-type]  # names are taken, too
        row_group_size=VALUES_ROW_GROUP if table == "values" else ROW_GROUP,
        write_page_checksum=True,
    )
    os.replace(temporary, target)
    return target


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
                batches = [b for p in parts.values() for b in _read_whole(p, TABLES[table]).to_batches()]
            except (OSError, ValueError, pa.ArrowException):
                continue  # damaged: it stays, and the reader says what is wrong with it
            write_part(
                run, table, Span(writer, min(s.first for s in parts), max(s.last for s in parts)), batches
            )
            replaced += len(parts)
            _remove_covered(run / table)
    return replaced


def _read_whole(part: Path, schema: pa.Schema) -> pa.Table:
    return pq.read_table(part, schema=schema, page_checksum_verification=True).cast(schema)


def _remove_covered(folder: Path) -> None:
    keep = set(spans(folder, ".parquet").values())
    for path in folder.glob("*.parquet"):
        if path not in keep and Span.of(path):
            path.unlink(missing_ok=True)
