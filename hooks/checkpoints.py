"""`Watcher.checkpoint`: what a saved weight file holds and comes from, recorded in the run's folder.

Files are opened in the call and read afterwards, in a thread: one that is removed meanwhile (as trainers do
with old checkpoints) is still read whole; one that is written to is not recorded, and that is told.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..monitor import LogWriter, RunError
from ..monitor.errors import WeightsError
from ..monitor.lineage import VERSION, Records, write_record
from ..monitor.weights import SafetensorsFile, Shards, Weights
from ..monitor.weights.digests import (
    FileDigest,
    digests_of,
    name_in,
    sha256_of_file,
    sha256_of_files,
    sha256_of_set,
    weight_files,
)
from ..monitor.weights.opening import SUFFIXES
from .torch_file import TorchFile

logger = logging.getLogger("layerwatch")

#: Of the thread that reads: the training goes first where there are few cores.
NICE = 10
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Opened:
    """The weight files at a path, opened now.

    Raises:
        OSError: they cannot be. FileNotFoundError: there are none.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._files: list[tuple[str, int]] = []
        try:
            for file in weight_files(self.path):
                self._files.append((name_in(self.path, file), os.open(file, os.O_RDONLY)))
            self._stamps = self._look()
        except BaseException:
            self.close()
            raise
        if not self._files:
            raise FileNotFoundError(f"there is no weight file at {path}")

    def _look(self) -> list[tuple[int, int]]:
        return [(s.st_size, s.st_mtime_ns) for _, file in self._files for s in (os.fstat(file),)]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(size for size, _ in self._stamps)

    def digests(self, stop: Callable[[], bool]) -> dict[str, Any]:
        """The part of a record that the files tell.

        Raises:
            ValueError: they were written to after they had been opened. InterruptedError: `stop` said so.
        """
        files = []
        for name, number in self._files:
            with open(number, "rb", closefd=False, buffering=0) as file:
                file.seek(0)
                sha256, size = sha256_of_file(file, stop)
                files.append(FileDigest(name, size, sha256))
        with self._weights() as weights:
            tensors, problems = digests_of(weights, stop)
        if self._look() != self._stamps:
            raise ValueError(
                "it was written to while it was read: give each checkpoint a name of its own, and call "
                "checkpoint() when its file is complete"
            )
        dtypes: dict[str, int] = {}
        for digest in tensors.values():
            dtypes[digest.entry.dtype] = dtypes.get(digest.entry.dtype, 0) + digest.entry.elements
        return {
            "path": str(self.path),
            "sha256": sha256_of_files(files),
            "weights_sha256": sha256_of_set(tensors) if tensors and not problems else None,
            "size": self.size,
            "files": [file._asdict() for file in files],
            "dtypes": dtypes,
            "tensors": {name: str(digest) for name, digest in tensors.items()},
            "unread": problems,
        }

    def _weights(self) -> Weights:
        parts, problems = [], {}
        for name, number in self._files:
            if name.endswith(".index.json"):
                continue
            again = f"/dev/fd/{number}"  # the file itself, whatever has happened to its name
            try:
                if not name.endswith(SUFFIXES):
                    raise WeightsError("tensors in files of this format are not read")
                parts.append(
                    SafetensorsFile(again) if name.endswith(".safetensors") else TorchFile(again, name)
                )
            except WeightsError as error:
                problems[name] = str(error).replace(again, name)
        opened = Shards(str(self.path), parts)
        opened.problems |= problems
        return opened

    def close(self) -> None:
        """Close the files. May be called again."""
        while self._files:
            os.close(self._files.pop()[1])


@dataclass
class _Job:
    """One call of `Watcher.checkpoint`."""

    opened: Opened
    number: int
    facts: dict[str, Any]
    parent: Opened | dict[str, Any] | None = None  # None: what went before


@dataclass
class Checkpoints:
    """Those of one session of a run.

    Args:
        log: of the run; its info tells the reference. source: where the run lies, its path or URL.
        first_step: of this session.
    """

    log: LogWriter
    source: Path | str
    first_step: int
    _jobs: queue.SimpleQueue[_Job | None] = field(default_factory=queue.SimpleQueue)
    _thread: threading.Thread | None = None
    _number: int = 0
    _stopping: bool = False
    _before: dict[str, Any] | None = None  # the digests of the checkpoint before
    _told: list[tuple[int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        reference = self.log.info.get("reference")
        self._reference = None
        if reference not in (None, "start", "state_dict"):
            try:
                self._reference = Opened(reference)
            except OSError:  # `watch` has read it just now: something that is no file
                logger.info("the reference %s is not recorded as a parent of checkpoints", reference)

    def add(self, step: int, next_step: int, path: str | Path, data: Any, parent: str | Path | None) -> None:
        """Open the files, and record them in the background."""
        self.tell()
        try:
            opened = Opened(path)
        except OSError as error:
            self._told.append((step, f"{path}: not recorded: {error.strerror or error}"))
            self.tell()
            return
        self._number += 1
        info = self.log.info
        facts = {
            "version": VERSION, "run": info.get("name"), "run_created": info["created"],
            "session": self.log.session, "step": step, "next_step": next_step, "time": time.time(),
            "data": data, "git_commit": info.get("git_commit"), "seed": info.get("seed"),
            "config": info.get("config") or {}, "layerwatch": (info.get("versions") or {}).get("layerwatch"),
            "tied": [t["names"] for t in info["tensors"] if len(t["names"]) > 1],
        }  # fmt: skip
        self._jobs.put(_Job(opened, self._number, facts, None if parent is None else _given(parent)))
        note = f", data: {data}" if isinstance(data, str) else ""
        self.log.event(step, "checkpoint", f"{path}, {opened.size:,} bytes{note}")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="layerwatch-checkpoints", daemon=True)
            self._thread.start()

    def tell(self) -> None:
        """Log what could not be recorded, from the thread that may write the log."""
        while self._told:
            step, message = self._told.pop(0)
            logger.warning("checkpoint %s", message)
            self.log.event(step, "checkpoint", message)

    def finish(self, timeout: float | None = None) -> None:
        """Wait until all are recorded; after `timeout` seconds the rest is given up, which is told."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(timeout)
            self._stopping = True
            self._thread.join()
            self._thread = None
        self.tell()
        if self._reference is not None:
            self._reference.close()

    def _run(self) -> None:
        if sys.platform == "linux":  # there it is this thread's own
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while (job := self._jobs.get()) is not None:
            try:
                self._record(job)
            except InterruptedError:
                self._fail(job, "the process was asked to end before it had been read")
            except Exception as error:  # the training has nothing to do with it
                self._fail(job, " ".join(str(error).split()) or type(error).__name__)
            finally:
                job.opened.close()
                if isinstance(job.parent, Opened):
                    job.parent.close()

    def _fail(self, job: _Job, why: str) -> None:
        self._told.append((job.facts["step"], f"{job.opened.path}: not recorded: {why}"))

    def _record(self, job: _Job) -> None:
        found = job.opened.digests(lambda: self._stopping)
        record = {**job.facts, **found, "parent": self._parent(job)}
        write_record(self.log.path, record, f"s{self.log.session}-{job.number:06d}")
        self._before = {"how": "before", "run": record["run"], "step": record["step"], **_digests(found)}

    def _parent(self, job: _Job) -> dict[str, Any] | None:
        if job.parent is not None:
            return self._read(job.parent, "given") if isinstance(job.parent, Opened) else job.parent
        if self._before is not None:
            return self._before
        if self.log.session:
            return self._resumed()
        if self._reference is None:
            return None
        try:
            return self._read(self._reference, "reference")
        finally:
            self._reference.close()

    def _read(self, opened: Opened, how: str) -> dict[str, Any]:
        try:
            return {"how": how, **_digests(opened.digests(lambda: self._stopping))}
        except (OSError, ValueError) as error:
            if isinstance(error, InterruptedError):
                raise
            return {"how": how, "path": str(opened.path), "sha256": None, "problem": str(error)}

    def _resumed(self) -> dict[str, Any]:
        """The checkpoint from which the training has gone on: the last one that was saved at this step."""
        try:
            before = [c.record for c in Records([self.source]) if c.record["session"] < self.log.session]
        except RunError:
            before = []
        here = [record for record in before if record["next_step"] == self.first_step]
        if here:
            last = here[-1]
            return {"how": "resumed", "run": last["run"], "step": last["step"], **_digests(last)}
        why = f"the training went on at step {self.first_step}, of which no checkpoint is recorded"
        return {"how": "resumed", "path": None, "sha256": None, "problem": why}


def _digests(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("path", "sha256", "weights_sha256")}


def _given(parent: str | Path) -> Opened | dict[str, Any]:
    """What the user named as parent: a file or folder, or a digest of one."""
    if isinstance(parent, str) and _DIGEST.fullmatch(parent):
        return {"how": "given", "path": None, "sha256": parent, "weights_sha256": parent}
    try:
        return Opened(parent)
    except OSError as error:
        logger.warning("the parent %s of a checkpoint cannot be read: %s", parent, error.strerror or error)
        problem = f"it could not be read: {error.strerror or error}"
        return {"how": "given", "path": str(parent), "sha256": None, "problem": problem}


def checked(data: Any) -> Any:
    """The note on data, as JSON can hold it.

    Raises:
        TypeError: it is neither text nor a mapping of names to plain values.
    """
    plain = (str, int, float, bool, type(None))
    if data is None or isinstance(data, str):
        return data
    if isinstance(data, Mapping) and all(isinstance(value, plain) for value in data.values()):
        return {str(name): value for name, value in data.items()}
    raise TypeError(
        f"expected data as text or a mapping of names to plain values, got {type(data).__name__}: pass "
        "the data's name, version or digest"
    )
