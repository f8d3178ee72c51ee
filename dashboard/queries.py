"""The runs below one folder, for many tabs at once: found, refreshed and judged as often as needed."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotReady
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..monitor import Run, RunError, StoreError
from ..monitor.runs import each, run_folders
from ..monitor.store import store_of

if TYPE_CHECKING:
    from ..monitor.findings import Finding

log = logging.getLogger(__name__)

SCAN_SECONDS = 3.0  # a new run appears after so long
REFRESH_SECONDS = 0.5  # one look at a run's files serves every request in this time
REMOTE = 10  # times as long on an object store, where every look is a request that is paid for
MEMO_ENTRIES = 96
Result = TypeVar("Result")


@dataclass(frozen=True)
class Judgement:
    """What the detectors said about one state of a run. `error` is set when they could not finish."""

    stamp: str
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""
    again: float = 0.0  # monotonic time before which a live run is not judged again

    @property
    def alarms(self) -> list[Finding]:
        """The findings that are more than a remark."""
        return [finding for finding in self.findings if finding.severity != "info"]

    @property
    def health(self) -> str:
        """The worst severity, "healthy" without an alarm."""
        severities = {finding.severity for finding in self.findings}
        return next(
            (s for s in ("critical", "warning") if s in severities), "unknown" if self.error else "healthy"
        )


class Library:
    """Every run at or below `root`, a folder or a URL, by its path relative to it. Safe to use from several
    threads.

    A name from a URL is looked up among the folders that were found, never joined to a path.
    """

    def __init__(self, root: str | Path):
        local = isinstance(root, Path) or "://" not in root
        self._store = store_of(Path(root).resolve() if local else root)
        self.root = self._store.url
        self._patience = 1 if local else REMOTE
        self._lock = threading.RLock()
        self._runs: dict[str, Run] = {}
        self._broken: dict[str, str] = {}
        self._scanned = float("-inf")
        self._fault: StoreError | None = None
        self._refreshed: dict[str, float] = {}
        self._judged: dict[str, Judgement] = {}
        self._pending: dict[
            str, Future[Judgement]
        ] = {}  # in the order of the wish: the latest is served first
        self._judge = ThreadPoolExecutor(1, thread_name_prefix="layerwatch-judge")
        self._judges: OrderedDict[str, Run] = OrderedDict()
        self._memo: OrderedDict[Hashable, Any] = OrderedDict()

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
                reason or f"There is no run named {name!r} in {self.root}. The Runs page lists what is there."
            )
        now = time.monotonic()
        if now - self._refreshed.get(name, float("-inf")) > REFRESH_SECONDS * self._patience:
            self._refreshed[name] = now
            run.refresh()
        return run

    def judgement(self, name: str, wait: float = 0.0) -> Judgement | None:
        """The findings of a run. Computed beside the requests; None while there are none yet.

        A run that grew shows its previous findings until the new ones are ready; `wait` seconds are waited.
        """
        stamp = self.run(name).fingerprint()
        with self._lock:
            known = self._judged.get(name)
            if known and (known.stamp == stamp or time.monotonic() < known.again):
                return known
            future = self._pending.pop(name, None) or Future()
            self._pending[name] = future
            self._judge.submit(self._judge_latest)
        try:
            return future.result(timeout=wait)
        except NotReady:
            return known

    def cursor(self, name: str) -> tuple[str, str]:
        """What changes when the log of a run grew, and what changes when the detectors said something new.

        "" asks for all runs. Two cursors, because new findings are no reason to draw every plot again.
        """
        runs = {name: self.run(name)} if name else self.runs()
        if name:
            self.judgement(name)
        logs = [f"{key}{run.fingerprint()}{run.live}" for key, run in runs.items()]
        said = [known.stamp for key in runs if (known := self._judged.get(key))]
        return _digest(logs), _digest(said)

    def memo(self, run: Run, key: Hashable, make: Callable[[], Result]) -> Result:
        """`make()`, remembered until the run grows. The least recently used answers are forgotten."""
        full = (run.url, run.fingerprint(), key)
        with self._lock:
            if full in self._memo:
                self._memo.move_to_end(full)
                return self._memo[full]
        value = make()
        with self._lock:
            self._memo[full] = value
            while len(self._memo) > MEMO_ENTRIES:
                self._memo.popitem(last=False)
        return value

    def _scan(self) -> None:
        """Look for run folders. Known runs keep their object, and with it what they have read."""
        self._scanned = time.monotonic()
        try:
            folders, self._fault = run_folders(self._store), None
        except StoreError as fault:  # what is known stays; a later scan may do better
            self._fault, self._broken = fault, {self.root: str(fault)}
            return
        runs, broken = {}, {}
        for folder, found in zip(folders, each(self._store, folders, self._opened), strict=True):
            (runs if isinstance(found, Run) else broken)[folder or self._store.name] = found
        newest = sorted(runs, key=lambda name: -float(runs[name].info.get("created") or 0))
        self._runs = {name: runs[name] for name in newest}
        self._broken = broken

    def _opened(self, folder: str) -> Run | str:
        """A run, or what is wrong with it."""
        try:
            return self._runs.get(folder or self._store.name) or Run(self._store.at(folder).url)
        except (RunError, OSError) as error:
            return str(error)

    def _judge_latest(self) -> None:
        """Judge the run that was asked for last: somebody waits for it, the others are rows of a table."""
        with self._lock:
            if not self._pending:
                return
            name = next(reversed(self._pending))
            future, run = self._pending[name], self._runs.get(name)
            url = run.url if run else self._store.at(name).url
        result = self._find(url)
        with self._lock:
            self._judged[name] = result
            self._pending.pop(name, None)
        future.set_result(result)

    def _find(self, url: str) -> Judgement:
        """Judge a run on a reader of its own, because a reader is locked while its detectors work."""
        began, stamp = time.monotonic(), ""
        try:
            judge = self._judges.pop(url, None) or Run(url)
            self._judges[url] = judge
            if len(self._judges) > 3:
                self._judges.popitem(last=False)
            judge.refresh()
            stamp = judge.fingerprint()
            return Judgement(stamp, judge.findings(), judge.notes(), again=_later(began))
        except Exception as error:  # a detector may raise anything; the page must still open
            log.exception("the detectors failed on %s", url)
            return Judgement(stamp, error=f"{type(error).__name__}: {error}", again=_later(began))


def _digest(parts: list[str]) -> str:
    return hashlib.blake2b("|".join(parts).encode(), digest_size=8).hexdigest()


def _later(began: float) -> float:
    """Judging may take at most about a fifth of the time."""
    now = time.monotonic()
    return now + min(4 * (now - began), 60.0)
