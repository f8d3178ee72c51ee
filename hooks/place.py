"""Where a run is written: a folder, or a spool folder whose content is sent to an object store."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..monitor import LogWriter
from ..monitor.spool import ROTATE_SECONDS, RemoteRun, is_url, open_remote_run, spool_of
from ..monitor.upload import Uploader
from .distributed import World, unnamed_run


@dataclass(frozen=True)
class Place:
    """Of one run.

    Attributes:
        folder: that is written. shown: what the user gave, or what was made up for it.
        source: what `Run` reads before the training goes on.
    """

    folder: Path
    shown: Path | str
    source: Path | str
    remote: RemoteRun | None = None

    @classmethod
    def of(cls, run: str | Path | None, *, resume: bool, here: World) -> Place:
        """Of the argument `run` of `watch`; of the first of several processes, an object store is asked.

        Raises:
            RunError: see `open_remote_run`.
        """
        if run is None:
            run = unnamed_run() if here.several else _new_run()
        if not is_url(run):
            return cls(Path(run), Path(run), Path(run))
        if here.rank:
            return cls(spool_of(str(run)), str(run), str(run))
        remote = open_remote_run(str(run), resume=resume)
        return cls(remote.spool, remote.url, remote.source, remote)

    @property
    def is_remote(self) -> bool:
        """On an object store."""
        return self.folder != self.source

    @property
    def name(self) -> str:
        """The run's name."""
        return self.remote.name if self.remote else self.folder.name

    def writer(self, info: dict[str, Any], **options: Any) -> LogWriter:
        """See `LogWriter`."""
        if self.remote is not None:
            options |= {"rotate_seconds": ROTATE_SECONDS, "follows": self.remote.follows}
        return LogWriter(self.folder, info, **options)

    def uploader(self) -> Uploader | None:
        """Sends what is written, of a run on an object store."""
        return Uploader(self.folder, self.remote.url) if self.remote else None


def _new_run() -> Path:
    stamp = time.strftime("%Y-%m-%d-%H%M%S")
    numbers = (Path("runs") / (stamp if i == 0 else f"{stamp}-{i}") for i in range(int(1e6)))
    return next(path for path in numbers if not path.exists())
