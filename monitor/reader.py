"""Reading a run's tables from Parquet parts and write-ahead files, while it may still be written."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from .errors import RunError, StoreError
from .parts import captures_of
from .scan import Between, Part, Where, coded, encoded, keep
from .schema import ROLLUPS, SCHEMA_VERSION, SCHEMAS, TABLES
from .sessions import Cut, Start
from .spans import Span, counting
from .store import Store
from .wal import WalReader

#: A frame that is being written is whole after this many seconds; what is not by then was torn.
TORN_SECONDS = 0.02
Answer = TypeVar("Answer")
Position = tuple[int, int]  # session, capture


class LogReader:
    """The tables of one run. `refresh` looks at the disk, everything else answers from what it saw.

    Rows that a later session has done again are left out. Thread-safe.

    Args:
        source: the run's store or folder.
        session: read the log as it was when this session was the latest; None: as it is.
    """

    def __init__(self, source: Store | Path, session: int | None = None) -> None:
        self.store = Store(source) if isinstance(source, Path) else source
        self.session = session
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

    # What is on disk

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
                self._unreadable[f"wal/{name}"] = f"cannot be read and is skipped: {_line(error)}"
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

    # Rows

    def table(
        self,
        name: str,
        columns: Sequence[str] | None = None,
        where: Where | None = None,
        *,
        coded: bool = False,
    ) -> pa.Table:
        """Rows of one table, in no particular order.

        Args:
            name: one of `schema.SCHEMAS`. columns: all when None.
            where: column -> allowed values, or a `Between`; row groups without such rows are not read.
            coded: leave the strings of `scan.ENCODED` as Arrow dictionaries, which is faster.
        """
        schema = SCHEMAS[name]
        wanted = list(columns or schema.names)
        found = pa.concat_tables([rows for _, rows in self.pieces(name, wanted, where)])
        return found if coded else found.cast(pa.schema([schema.field(c) for c in wanted]))

    def pieces(
        self, name: str, columns: Sequence[str], where: Where | None = None
    ) -> list[tuple[str, pa.Table]]:
        """The rows of `table(coded=True)` by file: the name of the file's writer, its rows. At least one."""
        conditions = {c: a if isinstance(a, Between) else sorted(set(a)) for c, a in (where or {}).items()}
        return self._steady(lambda: self._pieces(name, columns, conditions, self._cut(name)))

    def distinct(self, name: str, column: str) -> set[Any]:
        """The values of a column. Most are told by the footers."""
        return self._steady(lambda: set(self._values(name, column, {}, self._cut(name), extremes=False)))

    def latest(self, name: str, where: Where | None = None) -> int:
        """The highest step, -1 when there is no row. Mostly told by the footers."""
        found = self._steady(lambda: self._values(name, "step", where or {}, self._cut(name), extremes=True))
        return max(found, default=-1)

    def first_of(self, name: str, column: str, where: Where) -> list[Any]:
        """A value of a column among the rows that meet the conditions, in a list; [] when there is no row."""
        found = self._steady(lambda: self._values(name, column, where, self._cut(name), extremes=True))
        return found[:1]

    @property
    def starts(self) -> dict[int, Start]:
        """When each session began."""
        with self._lock:
            if "starts" not in self._kept:
                self._kept["starts"] = self._steady(self._find_starts)
            return self._kept["starts"]

    def _find_starts(self) -> dict[int, Start]:
        columns = ["event", "session", "step", "time"]
        where = {"event": ["restart", "start"]}
        rows = pa.concat_tables([rows for _, rows in self._pieces("events", columns, where, None)])
        starts: dict[int, Start] = {}
        for row in rows.to_pylist():
            before = starts.get(row["session"], Start(row["step"], row["time"]))
            starts[row["session"]] = Start(min(row["step"], before.step), min(row["time"], before.time))
        # An event may be lost by damage: then the rows tell where the session began.
        written = [
            s for t in ("stats", "scalars") for s in self._values(t, "session", {}, None, extremes=True)
        ]
        for session in range(1, max(written, default=0) + 1):
            if session not in starts:
                where = {"session": [session]}
                steps = [
                    v
                    for t in ("stats", "scalars")
                    for v in self._values(t, "step", where, None, extremes=True)
                ]
                if steps:
                    starts[session] = Start(min(steps), math.nan)
        return starts

    @property
    def cut(self) -> Cut | None:
        """Which rows count; None: all do."""
        return self._cut("stats")

    def ranges(self, name: str) -> dict[str, list[tuple[Position | None, Position | None]]]:
        """For each writer the stretches of its log that are there: the first and the last capture of each.

        There is one stretch unless parts were removed or are damaged. None instead of a position: from the
        beginning, or as far as anything was written.
        """
        return self._steady(
            lambda: {w: self._stretches(name, w, files) for w, files in self._by_writer(name)}
        )

    def _by_writer(self, name: str) -> list[tuple[str, dict[Span, Part | None]]]:
        """The files of each writer in order; no part for a write-ahead file."""
        with self._lock:
            live: list[tuple[Span, Part | None]] = [
                (span, None) for span, reader in self._wals.items() if reader.tables[name]
            ]
        files: dict[str, dict[Span, Part | None]] = {}
        for span, part in [*self._each(name), *live]:
            if part is None or part.name not in self._lost:
                files.setdefault(span.writer, {})[span] = part
        return list(files.items())

    def _stretches(
        self, name: str, writer: str, files: dict[Span, Part | None]
    ) -> list[tuple[Position | None, Position | None]]:
        ordered = sorted(files)
        ends = [i for i in range(1, len(ordered)) if ordered[i].first > ordered[i - 1].last + 1]
        found = []
        for begin, end in zip([0, *ends], [*ends, len(ordered)], strict=True):
            some = ordered[begin:end]
            first = None if some[0].first <= 1 else self._position(name, [files[s] for s in some], 0)
            last = None if end == len(ordered) else self._position(name, [files[s] for s in some[::-1]], 1)
            found.append((first, last))
        return found

    def _position(self, name: str, parts: Sequence[Part | None], end: int) -> Position | None:
        """The first (0) or last (1) capture of the first of these parts that holds any."""
        for part in parts:
            captures = part and self._guarded(name, part, lambda p, _: captures_of(p.footer))
            if captures and captures[0]:
                session = (min, max)[end](captures[0])
                return session, captures[0][session][end]
        return None

    def _cut(self, name: str) -> Cut | None:
        """Which rows count; None: all do."""
        with self._lock:
            if ("cut", name) not in self._kept:
                latest = max(self.starts, default=0) if self.session is None else self.session
                cut = Cut.of(self.starts, latest, superseded=name != "events")
                self._kept["cut", name] = None if cut.everything else cut
            return self._kept["cut", name]

    def _steady(self, answer: Callable[[], Answer]) -> Answer:
        for _ in range(10):
            try:
                return answer()
            except FileNotFoundError:  # parts were merged meanwhile: look again
                with self._lock:
                    self._opened.clear()
                    self.refresh()
        raise RunError(f"the files of {self.store.url} keep changing: is something deleting them?")

    def _pieces(
        self, name: str, columns: Sequence[str], where: Where, cut: Cut | None
    ) -> list[tuple[str, pa.Table]]:
        found = [
            (span.writer, rows)
            for span, part in self._each(name)
            for rows in self._guarded(name, part, lambda p, groups: p.read(columns, where, groups, cut))
        ]
        for writer, rows in self._live(name):
            kept = keep(rows, where)
            found.append((writer, (kept if cut is None else cut.keep(kept)).select(list(columns))))
        return found or [("", encoded(SCHEMAS[name], columns).empty_table())]

    def _values(self, name: str, column: str, where: Where, cut: Cut | None, *, extremes: bool) -> list[Any]:
        """Values of a column, with repetitions. `extremes`: the lowest and highest are among them, others
        may not be; else all are."""
        found: list[Any] = []
        for _, part in self._each(name):
            read = lambda p, groups: p.values(column, where, groups, cut, extremes=extremes)  # noqa: E731
            for values in self._guarded(name, part, read):
                found += values
        for _, rows in self._live(name):
            kept = keep(rows, where)
            found += pc.unique((kept if cut is None else cut.keep(kept))[column]).to_pylist()  # type: ignore[attr-defined]
        return found

    def _each(self, name: str) -> list[tuple[Span, Part]]:
        with self._lock:
            for file in self._parts[name].values():
                if (name, file) not in self._opened:
                    self._opened[name, file] = Part(self.store, name, file)
            return [(span, self._opened[name, file]) for span, file in self._parts[name].items()]

    def _guarded(
        self, name: str, part: Part, read: Callable[[Part, Sequence[int] | None], Answer]
    ) -> list[Answer]:
        """What is read of a part; damage is noted, and the other row groups are read one by one."""
        try:
            return [read(part, None)]
        except Exception as error:  # whatever damaged bytes make of Parquet's decoder
            self._note(name, part, error)
        found = []
        try:
            groups = part.groups
        except Exception:  # not even its footer
            self._lost.add(part.name)
        else:
            for group in range(groups):
                with contextlib.suppress(Exception):
                    found.append(read(part, [group]))
        return found

    def _note(self, name: str, part: Part, error: Exception) -> None:
        explained = self.store.explained(part.name, error)
        if isinstance(explained, (FileNotFoundError, StoreError)):
            raise explained
        with self._lock:
            self._damaged[part.name] = f"skipped: {_line(error)}"

    def _live(self, name: str) -> list[tuple[str, pa.Table]]:
        """The rows of write-ahead files that no part holds, by writer."""
        if name in ROLLUPS:
            return []
        with self._lock:
            if ("live", name) not in self._kept:
                parts, schema = self._parts[name], SCHEMAS[name]
                self._kept["live", name] = [
                    (span.writer, coded(pa.Table.from_batches(reader.tables[name], schema)))
                    for span, reader in sorted(self._wals.items())
                    if reader.tables[name] and not any(p.covers(span) for p in parts)
                ]
            return self._kept["live", name]


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
