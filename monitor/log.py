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
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from .compact import compact, compact_wal
from .errors import RunError, RunExistsError
from .schema import GIVEN, SCHEMA_VERSION, TABLES
from .spans import Span, spans
from .wal import WalWriter

#: A write-ahead file is turned into Parquet at this size, or at an age of 30 s or a tenth of the run's age.
SEGMENT_BYTES = 32 << 20
SEGMENT_SECONDS = 30.0
#: Parts are merged at close up to this size in all; more is left to `layerwatch compact`.
MERGE_BYTES = 256 << 20


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
        self.session = 0
        self._captured = (-1, -1)  # the latest captured step, and its ordinal
        self.info = {"schema_version": SCHEMA_VERSION, "created": time.time(), **info, "closed": False}
        if resume:
            old = json.loads((path / "run.json").read_text())
            self.info["created"] = old.get("created", self.info["created"])
            self.session = int(old.get("session", 0)) + 1
        self.info["session"] = self.session
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
        """Append rows of `schema.GIVEN["stats"]`: on disk (page cache) when this returns."""
        steps = batch["step"].to_numpy()
        captures = np.empty(len(steps), np.int64)
        for step in np.unique(steps):
            captures[steps == step] = self._ordinal(int(step), batch, steps == step)
        columns = [*batch.columns, self._sessions(len(steps)), pa.array(captures)]
        self._wal.append_batch("stats", pa.RecordBatch.from_arrays(columns, schema=TABLES["stats"]))
        self._rotate_if_due()

    def _ordinal(self, step: int, batch: pa.RecordBatch, rows: NDArray[np.bool_]) -> int:
        """Which capture of this session a step is; gradient norms between captures belong to the last one."""
        latest, ordinal = self._captured
        if step <= latest or pc.all(pc.equal(batch["kind"].filter(pa.array(rows)), "gradient_norm")).as_py():
            return max(ordinal, 0)
        self._captured = step, ordinal + 1
        return ordinal + 1

    def _sessions(self, rows: int) -> pa.Array:
        return pa.array(np.full(rows, self.session, np.int32))

    def values(self, rows: Sequence[tuple[int, float, str, str, Iterable[float]]]) -> int:
        """Append rows of `schema.GIVEN["values"]`; returns the bytes written."""
        if not rows:
            return 0
        columns = list(zip(*rows, strict=True))
        arrays = [pa.array(c, f.type) for c, f in zip(columns, GIVEN["values"], strict=True)]
        arrays.append(self._sessions(len(rows)))
        return self._wal.append_batch("values", pa.RecordBatch.from_arrays(arrays, schema=TABLES["values"]))

    def scalars(self, step: int, when: float, numbers: dict[str, float]) -> None:
        """Append one number per name."""
        if numbers:
            rows = [[step, when, name, value, self.session] for name, value in numbers.items()]
            self._wal.append_rows("scalars", rows)
        self._rotate_if_due()

    def event(self, step: int, event: str, message: str) -> None:
        """Append something that happened to the run itself."""
        self._wal.append_rows("events", [[step, time.time(), event, message, self.session]])

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
