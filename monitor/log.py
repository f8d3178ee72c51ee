"""Writing a run: rows are appended to a write-ahead file at once; the rest happens in the background.

    <run>/run.json                         who, when, where, which tensors
    <run>/wal/r0-000003.wal                what came last, readable by `Run`
    <run>/stats/r0-000001-000002.parquet   the rest; likewise values/, scalars/, events/, rollup16/, ...

A part is named after the range of write-ahead files it holds and is written whole, then renamed. A reader
ignores a write-ahead file, or a part, whose range a wider part of the same table covers: there is no moment
at which a row is missing or double, and nothing but names has to agree.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .background import Background
from .compact import advance, compact
from .description import describe, write_json
from .errors import RunError, RunExistsError
from .journal import Journal, make_folders
from .process import alive, started, waits
from .ranks import FIRST, FOLDER, description_of, descriptions
from .schema import GIVEN, SCHEMA_VERSION, TABLES
from .spans import Span
from .store import store_of
from .wal import Frame, batch_frame, rows_frame

#: A write-ahead file is turned into Parquet at this size, or at an age of 30 s or a tenth of the session's.
SEGMENT_BYTES = 32 << 20
SEGMENT_SECONDS = 30.0
#: Parts are merged at close up to this size in all; more is left to `layerwatch compact`.
MERGE_BYTES = 256 << 20
#: Captures are left out while so many bytes wait to be turned into Parquet: the disk is too slow for them,
BACKLOG_BYTES = 8 * SEGMENT_BYTES
#: and after an append that took long, until it has taken at most this share of the time. One that waited for
#: nothing but a processor says nothing about the disk.
SLOW_SECONDS, WRITE_SHARE = 0.25, 0.1
#: Rows of a step may come while so many later captures are written already.
LATE_CAPTURES = 2


class LogWriter:
    """One process's writer of a run. Not thread-safe: the hooks call it from the training thread.

    Args:
        path: the run folder, made if missing.
        info: the content of run.json; `id`, `schema_version`, `created`, `closed` and `keep` are added.
        resume: go on in a folder that already holds a run, with the next session; what the new
            `info` does not tell stays in run.json.
        writer: whose files they are. "r0" owns run.json; the others join the run, whether it is there yet or
            not, and describe themselves in `ranks/<writer>.json`.
        keep: "full", or "rollup": old captures are kept in the roll-ups only.
        sync_seconds: what was appended is forced to the disk so often: the most that a power cut takes.
        rotate_seconds: write-ahead files are turned into Parquet so often; None: ever more rarely.
        follows: with `resume`, the latest session and the highest number of a file that are known elsewhere.
        session: of a writer that joins; None: the next one.

    Raises:
        RunExistsError: the folder holds a run and `resume` is false.
        RunError: the path cannot be a run folder, there is nothing to resume, or a process writes it.

    Once made, it never raises because of the disk: rows that cannot be written are left out, which is told
    once and marked in the log as `gap`.
    """

    def __init__(
        self, path: Path, info: dict[str, Any], *, resume: bool = False, writer: str = "r0",
        keep: str = "full", sync_seconds: float = 5.0, rotate_seconds: float | None = None,
        follows: tuple[int, int] = (0, 0), session: int | None = None,
    ) -> None:  # fmt: skip
        self.path, self.writer, self.keep = path, writer, keep
        old = self._claim(resume)
        if session is None:
            session = max(self._last_session(), follows[0]) + 1 if resume else 0
        self.session = session
        self._rotate_seconds = rotate_seconds
        created = old.get("created", time.time())
        new = {"id": uuid.uuid4().hex} if writer == FIRST else {}
        self.info = {**new, **old, "schema_version": SCHEMA_VERSION, "created": created, **info, "keep": keep}
        self.info |= {"session": self.session, "process_started": started(), "closed": False}
        self.info.pop("checksum", None)
        self.info.pop("ended", None)
        self._step = 0
        self._captures = 0
        self._ordinals: dict[int, int] = {}  # of the latest captured steps, in order
        self._together: list[Frame] | None = None
        self._thinned: tuple[int, int] | None = None  # since which step, how many captures
        self._next_write = 0.0
        self._info_written = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_folders()
            self._write_info()
            header = {
                "writer": writer, "session": self.session,
                "host": socket.gethostname(), "pid": os.getpid(), "process_started": started(),
            }  # fmt: skip
            self._journal = Journal(path, writer, self._last_number() or follows[1], header, self._restore)
        except OSError as error:
            raise RunError(
                f"expected a folder that the run can be written to, but {path} cannot be used "
                f"({error.strerror or error}): choose another run=, or make room"
            ) from None
        self._begun = self._opened = time.monotonic()
        self._background = Background(self._sync, self._advance, sync_seconds)

    def _claim(self, resume: bool) -> dict[str, Any]:
        """The run.json that is there, if it is sound."""
        path = self.path
        if path.exists() and not path.is_dir():
            raise RunError(f"expected a folder for the run, but {path} is a file: choose another run=")
        there = (path / description_of(self.writer)).exists() or self._last_number() > 0
        if there and not resume:
            raise RunExistsError(
                f"the run {path} exists already: "
                "pass resume=True to continue it, or another run= to start a new one"
            )
        if resume and not there and self.writer == FIRST:
            raise RunError(f"expected a run to resume at {path}, found none: drop resume=True to start it")
        if self.writer != FIRST:
            return descriptions(store_of(path)).get(self.writer, {})
        old = describe(store_of(path))[0] if there else {}
        here = not old.get("closed") and old.get("host") == socket.gethostname()
        if here and old.get("pid") != os.getpid() and alive(old.get("pid"), old.get("process_started")):
            raise RunError(
                f"expected a run that has ended, but process {old['pid']} still writes {path}: "
                "stop it first, or choose another run="
            )
        return old

    def _last_session(self) -> int:
        from .reader import LogReader

        return max(LogReader(self.path).starts, default=0)

    def _last_number(self) -> int:
        folders = [self.path / folder for folder in ("wal", "damaged", *TABLES)]
        found = [span for folder in folders for p in folder.glob("*") if (span := Span.of(p))]
        return max((span.last for span in found if span.writer == self.writer), default=0)

    def _restore(self) -> None:
        """The run folder was removed: make it again, below a folder that is still there."""
        self._make_folders()
        self._write_info()

    def _make_folders(self) -> None:
        make_folders(self.path)
        if self.writer != FIRST:
            (self.path / FOLDER).mkdir(exist_ok=True)

    # run.json

    def update_info(self, **changes: Any) -> None:
        """Change run.json."""
        self.info.update(changes)
        with contextlib.suppress(OSError):  # tried again when the log is synchronised
            self._write_info()

    def _write_info(self) -> None:
        self._info_written = False
        write_json(self.path / description_of(self.writer), dict(self.info))
        self._info_written = True

    # Rows

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is appended inside is read together or not at all: one capture."""
        self._together = []
        try:
            yield
        finally:
            frames, self._together = self._together, None
            if frames:
                self._append(self._step, *frames)
        self._rotate_if_due()

    def _append(self, step: int, *frames: Frame) -> int:
        self._step = step
        if self._together is not None:
            self._together.extend(frames)
            return sum(len(payload) for _, payload in frames)
        start, waited = time.monotonic(), waits()
        written = self._journal.write(step, *frames)
        took = time.monotonic() - start
        if took > SLOW_SECONDS and not 0 < waits() == waited:
            self._next_write = start + took / WRITE_SHARE
        return written

    def begin(self, first_step: int) -> None:
        """The training starts, or goes on, at this step; what earlier sessions logged from there on is done
        again."""
        where = f"process {os.getpid()} on {socket.gethostname()}"
        if self.session:
            again = "steps logged before from there on are superseded"
            self.event(first_step, "restart", f"goes on at step {first_step}, {where}; {again}")
        else:
            self.event(first_step, "start", where)

    def stats(self, batch: pa.RecordBatch) -> None:
        """Append rows of `schema.GIVEN["stats"]`: on disk (page cache) when this returns."""
        steps = batch["step"].to_numpy()
        if not len(steps):
            return
        captures = np.empty(len(steps), np.int64)
        for step in np.unique(steps).tolist():
            rows = steps == step
            if step not in self._ordinals:
                self._number(step, batch["kind"].filter(pa.array(rows)).unique().to_pylist())
            captures[rows] = self._ordinals.get(step, max(self._captures - 1, 0))
        columns = [*batch.columns, self._sessions(len(steps)), pa.array(captures)]
        rows = pa.RecordBatch.from_arrays(columns, schema=TABLES["stats"])
        self._append(int(steps.max()), batch_frame("stats", rows))
        self._rotate_if_due()

    def _number(self, step: int, kinds: list[str]) -> None:
        """A step is captured for the first time. Gradient norms alone, between captures, are none."""
        if kinds != ["gradient_norm"]:
            self._ordinals[step] = self._captures
            self._captures += 1
            if len(self._ordinals) > LATE_CAPTURES + 1:
                del self._ordinals[next(iter(self._ordinals))]

    def _sessions(self, rows: int) -> pa.Array:
        return pa.array(np.full(rows, self.session, np.int32))

    def values(self, rows: Sequence[tuple[int, float, str, str, Iterable[float]]]) -> int:
        """Append rows of `schema.GIVEN["values"]`; returns the bytes written."""
        if not rows:
            return 0
        columns = list(zip(*rows, strict=True))
        arrays = [pa.array(c, f.type) for c, f in zip(columns, GIVEN["values"], strict=True)]
        arrays.append(self._sessions(len(rows)))
        batch = pa.RecordBatch.from_arrays(arrays, schema=TABLES["values"])
        return self._append(rows[0][0], batch_frame("values", batch))

    def scalars(self, step: int, when: float, numbers: dict[str, float]) -> None:
        """Append one number per name."""
        if numbers:
            rows = [[step, when, name, value, self.session] for name, value in numbers.items()]
            self._append(step, rows_frame("scalars", rows))
        self._rotate_if_due()

    def event(self, step: int, event: str, message: str) -> None:
        """Append something that happened to the run itself."""
        self._append(step, rows_frame("events", [[step, time.time(), event, message, self.session]]))

    # A disk that is too slow

    def has_room(self, step: int) -> bool:
        """Whether the disk keeps up, so that this step can be captured. What is left out is on record."""
        behind = self._background.waiting > BACKLOG_BYTES
        if behind or time.monotonic() < self._next_write:
            if self._thinned is None:
                self._thinned = step, 0
                self.event(step, "thinned", "the disk is too slow for every capture: some are left out")
            self._thinned = self._thinned[0], self._thinned[1] + 1
            return False
        if self._thinned is not None and self._background.waiting <= BACKLOG_BYTES // 2:
            since, left_out = self._thinned
            self._thinned = None
            self.event(step, "thinning ended", f"{left_out} captures were left out since step {since}")
        return True

    @property
    def background_seconds(self) -> float:
        """What compaction, roll-ups and synchronisation have taken so far: CPU seconds of another thread."""
        return self._background.seconds

    # In the background

    def _rotate_if_due(self) -> None:
        if self._together is not None:
            return
        now, size = time.monotonic(), self._journal.size
        due = self._rotate_seconds or max(SEGMENT_SECONDS, 0.1 * (now - self._begun))
        if size > SEGMENT_BYTES or (now - self._opened > due and not self._background.waiting):
            self._opened = now
            with contextlib.suppress(OSError):  # the old file goes on
                self._background.put(self._journal.rotate(), size, self._complete())

    def _complete(self) -> int:
        """How many captures of this session have all their rows."""
        return max(0, self._captures - LATE_CAPTURES)

    def _sync(self) -> None:
        self._journal.sync()
        if not self._info_written:
            self._write_info()

    def _advance(self, segments: Sequence[Span], complete: int) -> None:
        advance(
            self.path, self.writer, segments, session=self.session, complete=complete, keep=self.keep,
            stop=lambda: self._background.stopping,
        )  # fmt: skip

    def close(self, *, quick: bool = False) -> None:
        """Turn everything into Parquet and mark the run as closed. Safe to call twice.

        Args:
            quick: leave the write-ahead files as they are, which every reader can read.
        """
        if self.info["closed"]:
            return
        left = [*self._background.stop(), self._journal.close()]
        self.info.update(closed=True, ended=time.time())
        try:
            if not quick:
                self._advance_all(left)
        finally:
            self.update_info()

    def _advance_all(self, segments: Sequence[Span]) -> None:
        advance(
            self.path, self.writer, segments, session=self.session, complete=self._captures, over=True,
            keep=self.keep,
        )  # fmt: skip
        compact(self.path, writer=self.writer, limit=MERGE_BYTES)
