"""What a writer does beside the training: synchronise with the disk, turn finished files into Parquet."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import pyarrow as pa

from .spans import Span

logger = logging.getLogger("layerwatch")

#: Work that failed is tried again after this many seconds, then twice as many, up to the longest.
RETRY_SECONDS, LONGEST_RETRY = 1.0, 60.0


class Background:
    """One thread of a writer, which ends with it or with the process.

    Args:
        sync: called every `sync_seconds`.
        work: called with the finished write-ahead files and the number of complete captures, when there are
            some. It is called again with the same ones after an OSError or an ArrowException.
    """

    def __init__(
        self, sync: Callable[[], None], work: Callable[[Sequence[Span], int], None], sync_seconds: float
    ) -> None:
        self._sync, self._work, self._sync_seconds = sync, work, sync_seconds
        self._queue: list[tuple[Span, int]] = []  # and the bytes of each
        self._complete = 0
        self._pause, self._retry_at = RETRY_SECONDS, 0.0
        self._wake = threading.Condition()
        self._given_up = False
        self.stopping = False
        #: CPU time of the thread so far, in seconds.
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="layerwatch-log", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Bytes of finished files that are to become Parquet."""
        return 0 if self._given_up else sum(size for _, size in self._queue)

    def put(self, span: Span, size: int, complete: int) -> None:
        """A file is finished."""
        with self._wake:
            self._queue.append((span, size))
            self._complete = complete
            self._wake.notify()

    def stop(self) -> list[Span]:
        """End the thread, in the middle of its work if need be; returns the files that are left."""
        self.stopping = True
        with self._wake:
            self._wake.notify()
        self._thread.join()
        return [span for span, _ in self._queue]

    def _run(self) -> None:
        synced = time.monotonic()
        while not self.stopping:
            with self._wake:
                due = bool(self._queue) and time.monotonic() >= self._retry_at and not self._given_up
                if not due and not self.stopping:
                    self._wake.wait(
                        min(self._sync_seconds, self._pause) if self._queue else self._sync_seconds
                    )
            if time.monotonic() - synced >= self._sync_seconds:
                self._try(self._sync)
                synced = time.monotonic()
            if self._queue and time.monotonic() >= self._retry_at and not (self.stopping or self._given_up):
                self._work_off()
            self.seconds = time.thread_time()

    def _work_off(self) -> None:
        with self._wake:
            taken, complete = list(self._queue), self._complete
        if self._try(lambda: self._work([span for span, _ in taken], complete)) and not self.stopping:
            with self._wake:
                del self._queue[: len(taken)]
            self._pause, self._retry_at = RETRY_SECONDS, 0.0
        else:
            self._retry_at = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_RETRY)

    def _try(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except (OSError, pa.ArrowException) as error:  # nothing is lost: it is in the write-ahead file
            logger.info("layerwatch tries again later: %r", error)
            return False
        except Exception:
            logger.exception("layerwatch leaves the log as it is: it can be read, and compacted later")
            self._given_up = True
            return False
        return True
