"""The runs below one folder, for many tabs at once: found, refreshed and judged as often as needed."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotReady
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ..monitor import Run, RunError, StoreError
from ..monitor.answers import Answers
from ..monitor.runs import each, run_folders
from ..monitor.store import store_of
from .judging import Judgement, Judges, from_plain, to_plain
from .remembered import Shelf
from .summaries import Summary, facts, summarise

SCAN_SECONDS = 3.0  # a new run appears after so long
REFRESH_SECONDS = 0.5  # one look at a run's files serves every request in this time
RESTING = 20  # times as long when no process writes the run
REMOTE = 10  # times as long on an object store, where every look is a request that is paid for
MEMO_BYTES = 96 * 2**20  # of what was made of runs: grids, for the most part
Result = TypeVar("Result")


class Library:
    """Every run at or below `root`, a folder or a URL, by its path relative to it. Safe to use from several
    threads.

    A name from a URL is looked up among the folders that were found, never joined to a path.
    """

    def __init__(self, root: str | Path):
        local = isinstance(root, Path) or "://" not in root
        self._store = store_of(Path(root).resolve() if local else root)
        self.root = self._store.url
        #: What a browser may read of it: the folder's name, or the address without the user and the options.
        self.title = self._store.name if local else public_url(self.root)
        self._patience = 1 if local else REMOTE
        self._lock = threading.RLock()
        self._runs: dict[str, Run] = {}
        self._broken: dict[str, str] = {}
        self._scanned = float("-inf")
        self._fault: StoreError | None = None
        self._refreshed: dict[str, float] = {}
        self._judged: dict[str, Judgement] = {}
        self._asked: dict[str, Future[Judgement]] = {}
        shelf = self._verdicts = Shelf("judgements")
        self._judges = Judges(lambda url, judged: shelf.put(url, judged.stamp, to_plain(judged)))
        self._summaries: dict[str, tuple[str, Summary]] = {}
        self._summary_shelf = Shelf("summaries")
        self._reader: threading.Thread | None = None
        self._memo = Answers(MEMO_BYTES)
        self.close = weakref.finalize(self, self._judges.close)  # ends the worker; runs at exit, too

    def runs(self) -> dict[str, Run]:
        """Name -> run, newest first.

        Raises:
            StoreError: the object store cannot be read, and never could.
        """
        with self._lock:
            if time.monotonic() - self._scanned > SCAN_SECONDS * self._patience:
                self._scan()
            if self._fault and not self._runs:
                raise self._fault
            return dict(self._runs)

    def broken(self) -> dict[str, str]:
        """Name -> what is wrong, for folders that look like a run and cannot be read."""
        self.runs()
        with self._lock:
            return dict(self._broken)

    def run(self, name: str) -> Run:
        """One run, refreshed.

        Raises:
            RunError: there is no such run below the root, or it cannot be read any more.
        """
        run = self.runs().get(name)
        if run is None:
            with self._lock:
                self._scan()
                run = self._runs.get(name)
        if run is None:
            reason = self._broken.get(name)
            raise RunError(
                reason
                or f"There is no run named {name!r} in {self.title}. The Runs page lists what is there."
            )
        now, rest = time.monotonic(), 1 if run.live else RESTING
        due = min(REFRESH_SECONDS * self._patience * rest, 10.0)
        if now - self._refreshed.get(name, float("-inf")) > due:
            self._refreshed[name] = now
            run.refresh()
        return run

    def judgement(self, name: str, wait: float = 0.0) -> Judgement | None:
        """The findings of a run. Computed beside the requests; None while there are none yet.

        A run that grew shows its previous findings until the new ones are ready; `wait` seconds are waited.
        """
        run = self.run(name)
        stamp = run.fingerprint()
        self._collect()
        with self._lock:
            if name not in self._judged and (kept := self._verdicts.get(run.url, stamp)):
                with contextlib.suppress(KeyError, TypeError):  # it was meddled with
                    self._judged[name] = self._published(from_plain(kept))
            known = self._judged.get(name)
            if known and (known.stamp == stamp or time.monotonic() < known.again):
                return known
            future = self._asked[name] = self._judges.ask(run.url)
        try:
            future.result(timeout=wait)
        except NotReady:
            return known
        self._collect()
        return self._judged.get(name)

    def _collect(self) -> None:
        """Take the judgements that are ready."""
        with self._lock:
            for name in [name for name, future in self._asked.items() if future.done()]:
                self._judged[name] = self._published(self._asked.pop(name).result())

    def _published(self, judged: Judgement) -> Judgement:
        notes = [self.public(note) for note in judged.notes]
        return replace(judged, notes=notes, error=self.public(judged.error))

    def explain(self, error: Exception) -> str:
        """What a browser may read of an error: not where the runs lie on this machine."""
        if isinstance(error, OSError) and not isinstance(error, RunError) and error.strerror:
            return f"{type(error).__name__}: {error.strerror}"
        return self.public(str(error))

    def public(self, text: str) -> str:
        """A text without the absolute path of the root."""
        if len(self.root) < 2:  # the root of the file system
            return text
        return text.replace(f"{self.root}/", "").replace(self.root, self.title)

    def summary(self, name: str) -> Summary:
        """The numbers of a run for a table (see `summaries.Summary`), computed when its log has grown.

        Raises:
            RunError: there is no such run below the root, or it cannot be read any more.
        """
        run = self.run(name)
        stamp = run.fingerprint()
        known = self._summaries.get(name)
        if known is None and (kept := self._summary_shelf.get(run.url, stamp)):
            known = stamp, kept
        if known is None or known[0] != stamp:
            known = stamp, summarise(run)
            self._summary_shelf.put(run.url, stamp, known[1])
        self._summaries[name] = known
        return known[1] | facts(run)

    def summaries(self, patience: float = 0.25) -> dict[str, Summary]:
        """`summary` of every run, newest first, in little more than `patience` seconds.

        What takes longer is read behind, and `cursor("")` changes when there is more: until then a run has
        what run.json says, with `read` False, or its previous numbers. A run that cannot be read has `error`.
        """
        until = time.monotonic() + patience
        found: dict[str, Summary] = {}
        late = False
        for name, run in self.runs().items():
            if time.monotonic() < until or (self._summaries.get(name, ("",))[0] == run.fingerprint()):
                found[name] = self._summary_or_error(name)
            else:
                late = True
                known = self._summaries.get(name)
                found[name] = {"read": False, **(known[1] if known else {}), **facts(run)}
        if late and (self._reader is None or not self._reader.is_alive()):
            reader = weakref.WeakMethod(self._read_all)
            self._reader = threading.Thread(target=_call, args=(reader,), name="layerwatch-read", daemon=True)
            self._reader.start()
        return found

    def _summary_or_error(self, name: str) -> Summary:
        try:
            return self.summary(name)
        except (RunError, OSError) as error:
            return {"read": False, "error": self.explain(error)}

    def _read_all(self) -> None:
        for name in self.runs():
            self._summary_or_error(name)
            time.sleep(0.002)  # the pages first

    def cursor(self, name: str) -> tuple[str, str]:
        """What changes when the log of a run grew, and what changes when the detectors said something new.

        "" asks for all runs. Two cursors, because new findings are no reason to draw every plot again.
        """
        runs = {name: self.run(name)} if name else self.runs()
        if name:
            self.judgement(name)
        for key in (key for key, run in runs.items() if not name and run.live):
            with contextlib.suppress(RunError, OSError):  # its row says so
                self.run(key)
        self._collect()
        logs = [f"{key}{run.fingerprint()}{run.live}" for key, run in runs.items()]
        if not name:
            logs.append(
                str(len(self._summaries) * 10 // max(len(runs), 1))
            )  # news at every tenth that was read
        said = [known.stamp for key in runs if (known := self._judged.get(key))]
        return _digest(logs), _digest(said)

    def memo(self, run: Run, key: Hashable, make: Callable[[], Result]) -> Result:
        """`make()`, remembered until the run grows. The least recently used answers are forgotten."""
        return self._memo.get((run.url, run.fingerprint(), key), make)

    def _scan(self) -> None:
        """Look for run folders. Known runs keep their object, and with it what they have read."""
        self._scanned = time.monotonic()
        try:
            folders, self._fault = run_folders(self._store), None
        except StoreError as fault:  # what is known stays; a later scan may do better
            self._fault, self._broken = fault, {self.title: self.explain(fault)}
            return
        runs, broken = {}, {}
        for folder, found in zip(folders, each(self._store, folders, self._opened), strict=True):
            (runs if isinstance(found, Run) else broken)[folder or self._store.name] = found
        for name in runs:
            self._refreshed.setdefault(name, self._scanned)
        newest = sorted(runs, key=lambda name: -float(runs[name].info.get("created") or 0))
        self._runs = {name: runs[name] for name in newest}
        self._broken = broken

    def _opened(self, folder: str) -> Run | str:
        """A run, or what is wrong with it."""
        try:
            return self._runs.get(folder or self._store.name) or Run(self._store.at(folder).url)
        except (RunError, OSError) as error:
            return self.explain(error)


def _call(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    if found := method():
        found()


def public_url(url: str) -> str:
    """The address of an object store without the user and the options."""
    scheme, _, place = url.partition("?")[0].partition("://")
    return f"{scheme}://{place.rpartition('@')[2]}"


def _digest(parts: list[str]) -> str:
    return hashlib.blake2b("|".join(parts).encode(), digest_size=8).hexdigest()
