"""The runs below one folder, for many tabs at once: found, refreshed and judged as often as needed."""

from __future__ import annotations

import contextlib
import hashlib
import time
import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotReady
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ..monitor import Run, RunError
from ..monitor.answers import Answers
from .judging import Judgement, Judges, from_plain, to_plain
from .remembered import Shelf
from .roots import Root
from .summaries import Summary, facts, summarise

REFRESH_SECONDS = 0.5  # one look at a run's files serves every request in this time
RESTING = 20  # times as long when no process writes the run
MEMO_BYTES = 96 * 2**20  # of what was made of runs: grids, for the most part
Result = TypeVar("Result")


class Library(Root):
    """The runs of a root with what is known of each, refreshed as often as needed; see `roots.Root`."""

    def __init__(self, root: str | Path):
        super().__init__(root)
        self._judged: dict[str, Judgement] = {}
        self._asked: dict[str, Future[Judgement]] = {}
        shelf = self._verdicts = Shelf("judgements")
        self._judges = Judges(lambda url, judged: shelf.put(url, judged.stamp, to_plain(judged)))
        self._summaries: dict[str, tuple[str, Summary]] = {}
        self._summary_shelf = Shelf("summaries")
        self._memo = Answers(MEMO_BYTES)
        self.close = weakref.finalize(self, self._judges.close)  # ends the worker; runs at exit, too

    def run(self, name: str) -> Run:
        """One run, refreshed.

        Raises:
            RunError: there is no such run below the root, or it cannot be read any more.
        """
        run = self.runs().get(name) or self.late(name)
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

    def verdict(self, name: str) -> Judgement | None:
        """`judgement`, of a run that is not open that of the scan table."""
        return self.table.judgement(name) if self.asleep(name) else self.judgement(name)

    def _collect(self) -> None:
        """Take the judgements that are ready."""
        with self._lock:
            for name in [name for name, future in self._asked.items() if future.done()]:
                self._judged[name] = self._published(self._asked.pop(name).result())

    def _published(self, judged: Judgement) -> Judgement:
        notes = [self.public(note) for note in judged.notes]
        return replace(judged, notes=notes, error=self.public(judged.error))

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
        for name in self.runs():
            if self.asleep(name):
                found[name] = self.table.summary(name)
                continue
            run = self._runs.get(name)
            if run is None:  # it has just gone
                continue
            if time.monotonic() < until or (self._summaries.get(name, ("",))[0] == run.fingerprint()):
                found[name] = self._summary_or_error(name)
            else:
                late = True
                known = self._summaries.get(name)
                found[name] = {"read": False, **(known[1] if known else {}), **facts(run)}
        if late:
            self.behind_us("read", self._read_all)
        return found

    def _summary_or_error(self, name: str) -> Summary:
        try:
            return self.summary(name)
        except (RunError, OSError) as error:
            return {"read": False, "error": self.explain(error)}

    def _read_all(self) -> None:
        for name in [name for name in self.runs() if not self.asleep(name)]:
            self._summary_or_error(name)
            time.sleep(0.002)  # the pages first

    def cursor(self, name: str) -> tuple[str, str]:
        """What changes when the log of a run grew, and what changes when the detectors said something new.

        "" asks for all runs. Two cursors, because new findings are no reason to draw every plot again.
        """
        everything = self.runs()
        runs = {name: self.run(name)} if name else dict(self._runs)
        if name:
            self.judgement(name)
        for key in (key for key, run in runs.items() if not name and run.live):
            with contextlib.suppress(RunError, OSError):  # its row says so
                self.run(key)
        self._collect()
        logs = [f"{key}{run.fingerprint()}{run.live}" for key, run in runs.items()]
        if not name:
            read = len(self._summaries) * 10 // max(len(runs), 1)  # news at every tenth that was read
            logs += [str(read), str(len(everything)), self.table.stamp, str(len(self._newer))]
        said = [known.stamp for key in runs if (known := self._judged.get(key))]
        return _digest(logs), _digest(said)

    def memo(self, run: Run, key: Hashable, make: Callable[[], Result]) -> Result:
        """`make()`, remembered until the run grows. The least recently used answers are forgotten."""
        return self._memo.get((run.url, run.fingerprint(), key), make)


def _digest(parts: list[str]) -> str:
    return hashlib.blake2b("|".join(parts).encode(), digest_size=8).hexdigest()
