"""Which files a run has while they are written and merged, and what is wrong with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from .errors import StoreError
from .scan import Part
from .schema import SCHEMA_VERSION, SCHEMAS, TABLES
from .spans import Span, counting
from .store import Store
from .wal import WalReader

#: A frame that is being written is whole after this many seconds; what is not by then was torn.
TORN_SECONDS = 0.02


class LogFiles:
    """The files of one run as `refresh` saw them last. Thread-safe.

    Args:
        source: the run's store or folder.
    """

    def __init__(self, source: Store | Path) -> None:
        self.store = Store(source) if isinstance(source, Path) else source
        self._lock = threading.RLock()
        self._wals: dict[Span, WalReader] = {}
        self._parts: dict[str, dict[Span, str]] = {table: {} for table in SCHEMAS}
        self._opened: dict[tuple[str, str], Part] = {}
        self._kept: dict[Any, Any] = {}  # what was computed since the last news
        self._torn: dict[Span, tuple[int, int]] = {}
        self._misplaced: dict[str, str] = {}
        self._unreadable: dict[str, str] = {}
        self._damaged: dict[str, str] = {}
        self._lost: set[str] = set()  # damaged parts of which nothing can be read
        #: Grows whenever something new was seen.
        self.generation = 0
        self.refresh()

    @property
    def problems(self) -> dict[str, str]:
        """Damaged files, by name: what is wrong with each. The damaged rows are skipped."""
        with self._lock:
            return {**self._misplaced, **self._unreadable, **self._damaged}

    def refresh(self) -> bool:
        """True when something new is on disk.

        Raises:
            StoreError: the store cannot be read.
        """
        with self._lock:
            self.store.refresh()
            before = self.problems
            self._misplaced = {}
            # Write-ahead files first: one that is compacted meanwhile is then covered by a part, never lost
            # between.
            news = self._follow(counting(n for n in self._list("wal") if n.endswith(".wal")))
            parts = self._listed()
            half = [s for s in self._wals if 0 < self._covers(parts, s) < len(TABLES)]
            if half:  # it is finished: so that all tables show the same steps, take in the rest of it
                news |= self._follow({s: f"{s.stem}.wal" for s in half})
                parts = self._listed()
            if parts != self._parts:
                self._parts, news = parts, True
            for span in [s for s in self._wals if self._covers(parts, s) == len(TABLES)]:
                del self._wals[span]
                self._unreadable.pop(f"wal/{span.stem}.wal", None)
            self._tell_compacted()
            present = {(table, name) for table in parts for name in parts[table].values()}
            self._opened = {key: part for key, part in self._opened.items() if key in present}
            self._lost = {name for name in self._lost if tuple(name.split("/")) in present}
            self._damaged = {n: w for n, w in self._damaged.items() if tuple(n.split("/")) in present}
            news |= before != self.problems
            if news:
                self._kept = {}
                self.generation += 1
        return news

    def _listed(self) -> dict[str, dict[Span, str]]:
        return {table: counting(n for n in self._list(table) if n.endswith(".parquet")) for table in SCHEMAS}

    @staticmethod
    def _covers(parts: Mapping[str, Mapping[Span, str]], span: Span) -> int:
        """In how many tables a part holds this write-ahead file."""
        return sum(any(part.covers(span) for part in parts[table]) for table in TABLES)

    def _list(self, folder: str) -> dict[str, int]:
        try:
            found = self.store.list(folder)
        except StoreError:
            raise
        except OSError as error:
            self._misplaced[folder] = f"cannot be listed ({error.strerror or error}): its rows are skipped"
            return {}
        path = self.store.path and self.store.path / folder
        if path and not found and path.exists() and not path.is_dir():
            self._misplaced[folder] = "is a file where a folder was expected: its rows are missing"
        elif path and path.is_dir():
            for entry in path.iterdir():
                if entry.name not in found and Span.of(entry.name) and entry.is_dir():
                    self._misplaced[f"{folder}/{entry.name}"] = "is a folder where a file was expected"
        return found

    def _follow(self, files: Mapping[Span, str]) -> bool:
        news = False
        for span, name in files.items():
            reader = self._wals.get(span)
            if reader is None:
                opened = None if self.store.path else lambda name=name: self.store.open(f"wal/{name}")
                reader = self._wals[span] = WalReader((self.store.path or Path()) / "wal" / name, opened)
            try:
                news |= reader.read()
                if (reader.tail or not reader.offset) and self._torn.get(span) != (
                    reader.offset,
                    reader.tail,
                ):
                    time.sleep(TORN_SECONDS)
                    news |= reader.read()
                    self._torn[span] = reader.offset, reader.tail
            except StoreError:
                raise
            except (OSError, pa.ArrowException) as error:
                self._unreadable[f"wal/{name}"] = f"cannot be read and is skipped: {first_line(error)}"
            else:
                self._judge(f"wal/{name}", reader)
        return news

    def _judge(self, name: str, reader: WalReader) -> None:
        told = []
        if reader.newer:
            told.append(
                f"of log format {reader.version}, this layerwatch reads up to {SCHEMA_VERSION}: "
                "upgrade layerwatch to see its rows"
            )
        if reader.damaged:
            told.append(f"{reader.damaged} damaged bytes were skipped")
        if reader.tail:
            told.append(f"its last {reader.tail} bytes are damaged, or their writing was interrupted")
        elif not reader.offset:
            told.append("it is empty")
        if told:
            self._unreadable[name] = "; ".join(told)
        else:
            self._unreadable.pop(name, None)

    def _tell_compacted(self) -> None:
        for name in self._list("damaged"):
            self._misplaced[f"damaged/{name}"] = (
                "was damaged: what could be read of it is in the Parquet parts"
            )

    def fingerprint(self) -> str:
        """Changes whenever the log has grown."""
        with self._lock:
            wals = [f"{s.stem}:{r.offset}" for s, r in sorted(self._wals.items())]
            parts = [f"{s.stem}" for table in SCHEMAS for s in self._parts[table]]
        return "|".join(wals + parts)

    def files(self, name: str) -> dict[Span, str]:
        """The parts of one table that count."""
        with self._lock:
            return dict(self._parts[name])


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
