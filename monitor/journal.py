"""Appending rows whatever the disk does: rotation, gaps, and going on when it works again."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .parts import sync_folder
from .schema import TABLES
from .spans import Span
from .wal import Frame, WalWriter, rows_frame

logger = logging.getLogger("layerwatch")

#: After an error the disk is tried again after this many seconds, then twice as many, up to the longest.
RETRY_SECONDS, LONGEST_RETRY = 1.0, 30.0
#: Scalars and events wait in memory while the disk cannot take them; captures do not.
HELD_BYTES = 1 << 20
#: More room will not come by opening another file.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class _Gap:
    """What could not be written."""

    first: int
    reason: str
    last: int = 0
    captures: int = 0
    held: list[Frame] = field(default_factory=list)

    @property
    def held_bytes(self) -> int:
        return sum(len(payload) for _, payload in self.held)

    def drop(self, step: int, frames: tuple[Frame, ...]) -> None:
        self.last = step
        self.captures += any(table == "stats" for table, _ in frames)
        for frame in frames:
            if frame[0] in ("scalars", "events") and self.held_bytes + len(frame[1]) <= HELD_BYTES:
                self.held.append(frame)

    def words(self, step: int) -> str:
        lost = f"{self.captures} capture{'s' * (self.captures != 1)} could not be written"
        return f"{lost} from step {self.first} to {self.last} ({self.reason}); written again from step {step}"


class Journal:
    """The write-ahead files of one writer, one after the other.

    Only the thread that made it writes; `sync` may be called from another. An error of the disk never reaches
    the caller: it is told once, what cannot be written is left out, and the gap is marked as soon as the disk
    takes rows again. Scalars and events wait for that in memory.

    Args:
        path: the run folder. writer: of whom. number: of the last write-ahead file that was there before.
        header: what the files' first frame tells. restore: makes the run folder again after it was removed.

    Raises:
        OSError: the first file cannot be made.
    """

    def __init__(
        self, path: Path, writer: str, number: int, header: dict[str, Any], restore: Callable[[], None]
    ) -> None:
        self._path, self._writer, self._number = path, writer, number
        self._header, self._restore = header, restore
        self._pid = os.getpid()
        self._lock = threading.Lock()  # of the open file, for `sync`
        self._gap: _Gap | None = None
        self._pause, self._retry_at = RETRY_SECONDS, 0.0
        self._told = False
        self._finished: list[WalWriter] = []  # open until they are on the disk
        self._synced: tuple[Path, int] | None = None
        self._file = self._open()

    def _open(self) -> WalWriter:
        while True:
            self._number += 1
            name = f"{self.span.stem}.wal"
            with contextlib.suppress(FileExistsError):  # of another process that writes under our name
                return WalWriter(self._path / "wal" / name, {**self._header, "time": time.time()})

    @property
    def span(self) -> Span:
        """Of the file that is being written."""
        return Span(self._writer, self._number, self._number)

    @property
    def size(self) -> int:
        """Bytes in the file that is being written."""
        return self._file.size

    @property
    def failing(self) -> bool:
        """The disk did not take the last rows."""
        return self._gap is not None

    def write(self, step: int, *frames: Frame) -> int:
        """Append frames that belong together; in the page cache when this returns, or dropped.

        Returns the bytes written.
        """
        if os.getpid() != self._pid:  # a forked child shares the file
            return 0
        if self._gap is None or time.monotonic() >= self._retry_at:
            try:
                return self._append(step, frames)
            except OSError as error:
                self._fail(step, error)
        if self._gap is not None:
            self._gap.drop(step, frames)
        return 0

    def _append(self, step: int, frames: tuple[Frame, ...]) -> int:
        if self._file.removed:
            self._gap = self._gap or _Gap(step, "the run's folder was removed, and what it held", step)
            self._restore()
            self.rotate()
        if self._gap is not None:
            event = [step, time.time(), "gap", self._gap.words(step), self._header["session"]]
            frames = (*self._gap.held, rows_frame("events", [event]), *frames)
        written = self._file.write(*frames)
        self._gap = None
        if any(table == "stats" for table, _ in frames):
            self._pause = RETRY_SECONDS
        return written

    def _fail(self, step: int, error: OSError) -> None:
        reason = error.strerror or str(error)
        if not self._told:
            self._told = True
            logger.warning(
                "layerwatch cannot write to %s (%s): training goes on, captures are left out until it can",
                self._path, reason,
            )  # fmt: skip
        if self._gap is None:
            self._gap = _Gap(step, reason, step)
        elif error.errno not in _FULL:  # the file itself may be the trouble: a mount that went away
            with contextlib.suppress(OSError):
                self._restore()
                self.rotate()
        self._retry_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_RETRY)

    def rotate(self) -> Span:
        """Begin a new file; returns the finished one.

        Raises:
            OSError: it cannot be made; the old one goes on.
        """
        finished, number = self.span, self._number
        try:
            following = self._open()
        except OSError:
            self._number = number
            raise
        with self._lock:
            self._finished.append(self._file)
            self._file = following
        return finished

    def sync(self) -> None:
        """Have the disk keep what was appended, also when the power fails. From any thread.

        Raises:
            OSError: the disk does not.
        """
        with self._lock:
            finished, self._finished = self._finished, []
            state = self._file.path, self._file.size
            descriptor = os.dup(self._file.descriptor) if state != self._synced else -1
        try:
            for file in finished:
                os.fsync(file.descriptor)
            if descriptor >= 0:
                os.fsync(descriptor)
                sync_folder(self._path / "wal")
                self._synced = state
        finally:
            for file in finished:
                file.close()
            if descriptor >= 0:
                os.close(descriptor)

    def close(self) -> Span:
        """Returns the last file."""
        with contextlib.suppress(OSError):
            self.sync()
        self._file.close()
        return self.span


def make_folders(path: Path) -> None:
    """The folders of a run, below one that exists.

    Raises:
        OSError: they cannot be made.
    """
    path.mkdir(exist_ok=True)
    for folder in ("wal", *TABLES):
        (path / folder).mkdir(exist_ok=True)
