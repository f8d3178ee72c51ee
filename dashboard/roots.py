"""Which runs there are: the folders below a root, or the rows of a scan table, opened when needed."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

from ..monitor import Run, RunError, StoreError
from ..monitor.fleet.places import places, within
from ..monitor.runs import each, run_folders
from ..monitor.store import parted, store_of
from .scanned import Opening, Scanned, below, is_table

SCAN_SECONDS = 3.0  # a new run appears after so long
LOOK_SHARE = 20  # behind a scan table: so many times as long as the last look at all files took
REMOTE = 10  # times as long on an object store, where every look is a request that is paid for


class Root:
    """Every run at or below `root`, a folder or a URL, by its path relative to it; or every run of a scan
    table, its file or URL. Safe to use from several threads.

    A name from a URL is looked up among the folders and rows that were found, never joined to a path. Where
    a scan table lies in the root, its rows are there at once; runs that are newer are found behind them.

    Raises:
        RunError: `root` is a scan table and cannot be read.
    """

    def __init__(self, root: str | Path):
        local = isinstance(root, Path) or "://" not in root
        root = Path(root).resolve() if local else root
        self._store = store_of(parted(root)[0] if is_table(root) else root)
        self.table = Scanned(root, alone=True) if is_table(root) else below(self._store)
        #: What a browser may read of it: the folder's name, or the address without the user and the options.
        self.title = self._store.name if local else public_url(self._store.url)
        self.root = self._store.url
        if self.table.alone:
            self.root, self.title = self._of_table(), parted(root)[1]
        self._patience = 1 if local else REMOTE
        self._lock = threading.RLock()
        self._runs: dict[str, Run] = {}  # those that are open
        self._names: dict[str, None] = {}  # newest first
        self._broken: dict[str, str] = {}
        self._gone: set[str] = set()  # rows whose folders are not there any more
        self._newer: set[str] = set()  # than the scan table
        self._scanned = self._looked = float("-inf")
        self._fault: StoreError | None = None
        self._refreshed: dict[str, float] = {}
        self._behind: dict[str, threading.Thread] = {}

    def _of_table(self) -> str:
        """The root of a table that is all there is."""
        self.table.look()
        if self.table.table is None:
            raise RunError(
                self.table.fault
                or f"expected a scan table, but {self.table.path} does not exist: "
                "make one with `layerwatch scan`"
            )
        return self.table.table.root

    def runs(self) -> Mapping[str, Run]:
        """Name -> run, newest first. A run that the scan table knows is opened when it is asked for.

        Raises:
            StoreError: the object store cannot be read, and never could.
        """
        with self._lock:
            if time.monotonic() - self._scanned > SCAN_SECONDS * self._patience:
                self._scan()
            if self._fault and not self._names:
                raise self._fault
            return Opening(self._names, self._open)

    def at_hand(self) -> bool:
        """Whether all runs can be listed without waiting: they are in a scan table, or known and near."""
        return self.table.table is not None or (self._patience == 1 and bool(self._names))

    def broken(self) -> dict[str, str]:
        """Name -> what is wrong, for folders that look like a run and cannot be read."""
        self.runs()
        with self._lock:
            return dict(self._broken)

    def newer(self) -> int:
        """How many runs are new or have changed since the scan, as far as is known."""
        return len(self._newer)

    def live(self) -> bool:
        """Whether a process is writing any run."""
        self.runs()
        if any(run.live for run in list(self._runs.values())):
            return True
        return any(row["live"] for name, row in self.table.rows.items() if name not in self._runs)

    def asleep(self, name: str) -> bool:
        """Known from the scan table alone."""
        return name not in self._runs and name in self.table.rows

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

    def behind_us(self, name: str, work: Callable[[], None]) -> None:
        """Do something in a thread, unless it is at it."""
        known = self._behind.get(name)
        if known is None or not known.is_alive():
            method = weakref.WeakMethod(work)
            thread = threading.Thread(target=_call, args=(method,), name=f"layerwatch-{name}", daemon=True)
            self._behind[name] = thread
            thread.start()

    def _scan(self) -> None:
        """Look for runs: in the scan table, where there is one, else for their folders."""
        self._scanned = time.monotonic()
        try:
            if self.table.look() or (self.table.rows and not self._names):
                self._broken, self._gone, self._looked = {}, set(), float("-inf")
                self._arrange()
            if self.table.table is not None:
                self._fault = None
                if not self.table.alone and time.monotonic() > self._looked:
                    self.behind_us("look", self._look)
                return
            folders, self._fault = run_folders(self._store), None
        except StoreError as fault:  # what is known stays; a later scan may do better
            self._fault, self._broken = fault, {self.title: self.explain(fault)}
            return
        names = [folder or self._store.name for folder in folders]
        opened = each(self._store, folders, lambda folder: self._opened(folder, self._runs))
        found = dict(zip(names, opened, strict=True))
        # Other threads read meanwhile: a run that was there and still is never goes away for them.
        self._runs = {name: run for name, run in found.items() if not isinstance(run, str)}
        self._broken = {name: wrong for name, wrong in found.items() if isinstance(wrong, str)}
        for name in self._runs:
            self._refreshed.setdefault(name, time.monotonic())
        self._arrange()

    def _opened(self, folder: str, known: Mapping[str, Run]) -> Run | str:
        """A run, or what is wrong with it. A known one keeps what it has read."""
        try:
            return known.get(folder or self._store.name) or Run(self._store.at(folder).url)
        except (RunError, OSError) as error:
            return self.explain(error)

    def _take(self, name: str, found: Run | str) -> None:
        if isinstance(found, str):
            self._broken[name] = found
        else:
            self._runs[name] = found
            self._broken.pop(name, None)
            self._refreshed.setdefault(name, time.monotonic())

    def _arrange(self) -> None:
        """Newest first; what cannot be read is apart."""
        rows = {name: row for name, row in self.table.rows.items() if name not in self._gone}
        for name, row in rows.items():
            if row["health"] == "unreadable" and name not in self._runs:
                self._broken[name] = self.public(row["error"] or "it could not be read")
        began = {name: row["created"] for name, row in rows.items() if name not in self._broken}
        began |= {name: run.info.get("created") for name, run in self._runs.items()}
        self._names = dict.fromkeys(sorted(began, key=lambda name: -float(began[name] or 0)))

    def _open(self, name: str) -> Run:
        """A run of the table."""
        if (run := self._runs.get(name)) is None:
            run = Run(self.table.url(name, self._store))
            with self._lock:
                self._take(name, run)
        return run

    def late(self, name: str) -> Run:
        """A run that is not listed: it is new, or can be read by now.

        Raises:
            RunError: there is none, or it still cannot be read.
        """
        with self._lock:
            self._scan()
            if name in self._runs or name in self.table.rows:
                return self._open(name)
            if self.table.table is not None and not self.table.alone and name in run_folders(self._store):
                self._take(name, Run(self._store.at(name).url))
                self._arrange()
                return self._runs[name]
        none = f"There is no run named {name!r} in {self.title}. The Runs page lists what is there."
        raise RunError(self._broken.get(name) or none)

    def _look(self) -> None:
        """Behind a scan table: open runs that are new or have changed since, forget those that are gone."""
        began, private = time.monotonic(), list[str]()
        try:
            there = {place.name: place for place in places(self._store, private)}
        except (StoreError, OSError):
            return
        newer = {place.name for place in there.values() if self.table.newer(place)}
        going = {name for name, row in self.table.rows.items() if row["live"] and name in there}
        for name in sorted((newer | going) - self._runs.keys()):
            found = self._opened(there[name].run, {})
            with self._lock:
                self._take(name, found)
            time.sleep(0.002)  # the pages first
        with self._lock:
            gone = self.table.rows.keys() - there.keys()
            self._newer, self._gone = newer, {name for name in gone if not within(name, private)}
            for name in self._runs.keys() - there.keys():
                del self._runs[name]
            self._arrange()
            took = time.monotonic() - began
            self._looked = time.monotonic() + max(SCAN_SECONDS * self._patience, LOOK_SHARE * took)


def _call(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    if found := method():
        found()


def public_url(url: str) -> str:
    """The address of an object store without the user and the options."""
    scheme, _, place = url.partition("?")[0].partition("://")
    return f"{scheme}://{place.rpartition('@')[2]}"
