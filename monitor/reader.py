"""Reading a run's tables from Parquet parts and write-ahead files, while it may still be written."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from .errors import RunError, StoreError
from .files import LogFiles, first_line
from .joint import Joint
from .parts import captures_of
from .ranks import FIRST, descriptions
from .scan import Between, Part, Where, coded, encoded, keep
from .schema import FACTORS, ROLLUPS, SCHEMAS, TABLES
from .sessions import Cut, Start
from .spans import Span
from .store import Store

Answer = TypeVar("Answer")
Position = tuple[int, int]  # session, capture


class LogReader(LogFiles):
    """The tables of one run. `refresh` looks at the disk, everything else answers from what it saw.

    Rows that a later session has done again are left out. Thread-safe.

    Args:
        source: the run's store or folder.
        session: read the log as it was when this session was the latest; None: as it is.
    """

    def __init__(self, source: Store | Path, session: int | None = None) -> None:
        self.session = session
        super().__init__(source)

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
        joint = self.joint
        if joint is None:
            return self._steady(lambda: self._pieces(name, columns, conditions, self._cut(name)))
        needed = joint.columns(name, columns)
        found = self._steady(lambda: self._pieces(name, needed, conditions, self._cut(name)))
        return joint.join(name, found, columns)

    def by_rank(
        self, name: str, columns: Sequence[str], where: Where | None = None
    ) -> list[tuple[str, pa.Table]]:
        """The rows as each rank wrote them: nothing is put together."""
        return self._steady(lambda: self._pieces(name, columns, where or {}, self._cut(name)))

    def last_steps(self) -> dict[str, int]:
        """By writer, the highest step of any row. Mostly told by the footers."""
        return self._steady(self._find_last_steps)

    def _find_last_steps(self) -> dict[str, int]:
        last: dict[str, int] = {}
        for name in TABLES:
            read = lambda p, groups: p.values("step", {}, groups, None, extremes=True)  # noqa: E731
            ends = [(s.writer, v) for s, part in self._each(name) for v in self._guarded(name, part, read)]
            ends += [(writer, rows["step"].to_pylist()) for writer, rows in self._live(name)]
            for writer, steps in ends:
                last[writer] = max([last.get(writer, -1), *steps])
        return last

    @property
    def joint(self) -> Joint | None:
        """How the rows of several ranks become one; None when one process wrote them all."""
        with self._lock:
            if "joint" not in self._kept:
                files = [*self._wals, *(span for t in TABLES for span in self._parts[t])]
                alone = {span.writer for span in files} <= {FIRST}
                self._kept["joint"] = None if alone else Joint.of(descriptions(self.store))
            return self._kept["joint"]

    def distinct(self, name: str, column: str, where: Where | None = None) -> set[Any]:
        """The values of a column. Most are told by the footers."""
        wanted = where or {}
        return self._steady(lambda: set(self._values(name, column, wanted, self._cut(name), extremes=False)))

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
            if _may_hold(name, span, where.get("capture"))
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
            self._damaged[part.name] = f"skipped: {first_line(error)}"

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


def _may_hold(table: str, span: Span, captures: Any) -> bool:
    """Whether a file can hold such captures, as its name tells of a roll-up: it need not be opened then."""
    if table not in ROLLUPS or not isinstance(captures, Between):
        return True
    factor = FACTORS[ROLLUPS.index(table)]
    first, last = span.first * factor, (span.last + 1) * factor - 1
    before = captures.low is not None and last < captures.low
    return not (before or (captures.high is not None and first > captures.high))
