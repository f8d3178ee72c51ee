"""Runs on an object store are written to a local folder and mirrored from there in the background."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from .errors import StoreError
from .mirror import Mirror, described

logger = logging.getLogger("layerwatch")

#: The spool is looked at so often, and whenever `poke` is called (seconds).
POLL_SECONDS = 5.0
#: After an error the next attempt comes after 1 s, then twice as long, up to this.
LONGEST_PAUSE = 60.0


class Uploader:
    """Mirrors a run folder to a URL from a thread of its own, while the run is written and after outages.

    Nothing it does raises in, or waits for, the training: trouble is told once in the log of Python and kept
    in `problem` until it has passed. What could not be sent stays in the run folder.

    Args:
        local: the run folder. url: where it goes; that the bucket exists is found out later.
        poll_seconds: how often the folder is looked at.
    """

    def __init__(self, local: Path, url: str, *, poll_seconds: float = POLL_SECONDS) -> None:
        self.problem: str | None = None
        self._local, self._url, self._poll = local, url, poll_seconds
        self._pid = os.getpid()
        self._wake, self._closing, self._given_up = threading.Event(), threading.Event(), threading.Event()
        self._mirror: Mirror | None = None
        self._thread = threading.Thread(target=self._work, name="layerwatch-upload", daemon=True)
        self._thread.start()

    def poke(self) -> None:
        """Look now: a part was written."""
        self._wake.set()

    def close(self, timeout: float = 60.0) -> list[str]:
        """Send the rest, which must be in Parquet by now; returns what could not be sent in time.

        When all is there (listed with the right sizes) and the run is closed, the run folder is removed.
        """
        if os.getpid() != self._pid:  # a forked child has no such thread
            return []
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout)
        self._given_up.set()
        if not self._local.is_dir():
            return []
        try:
            return (self._mirror or Mirror(self._local, self._url)).unsent()
        except (StoreError, OSError):
            return ["run.json"]

    def _work(self) -> None:
        pause = 0.0
        while not self._given_up.is_set():
            if pause and not self._closing.is_set():
                self._closing.wait(pause)
            elif pause:
                self._given_up.wait(min(pause, 2.0))
            else:
                self._wake.wait(1.0 if self._closing.is_set() else self._poll)
            self._wake.clear()
            if self._given_up.is_set():
                return
            try:
                if self._pass():
                    return
                pause = 0.0
            except Exception as error:  # an error of ours must not end the upload either
                pause = min(max(1.0, 2 * pause), LONGEST_PAUSE)
                self._failed(error)

    def _pass(self) -> bool:
        """True when there is nothing left to do."""
        closing = self._closing.is_set()
        try:
            if self._mirror is None:
                self._mirror = Mirror(self._local, self._url)
            self._mirror.send()
        except FileNotFoundError:  # parts were merged while they were being sent: look again
            if closing and not self._local.is_dir():  # somebody has sent it by hand
                return True
            self._given_up.wait(1.0)
            return False
        if self.problem:
            logger.info("layerwatch can send to %s again", self._url)
            self.problem = None
        if not closing:
            return False
        if not self._mirror.finish():  # nobody waits for write-ahead files: they are not sent
            return all(name.startswith("wal/") for name in self._mirror.unsent())
        if described(self._mirror.local.read("run.json")).get("closed"):
            self._mirror.remove_local()
        return True

    def _failed(self, error: Exception) -> None:
        if self.problem is None:
            logger.warning(
                "layerwatch cannot send the run now: training goes on, the log is kept in %s (%s)",
                self._local, error,
            )  # fmt: skip
        self.problem = str(error)
        self._mirror = None  # connect afresh: credentials may be renewed, the store may have lost its data
