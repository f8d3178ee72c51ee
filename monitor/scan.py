"""Reading one Parquet part: which row groups can hold what is asked for, and the rows of those."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .chunks import read_chunks
from .parts import chunk_table, open_part
from .schema import SCHEMAS
from .store import Store

#: Columns that are decoded as dictionary and indices: a tenth of the work of as many strings.
ENCODED = ("tensor", "kind", "name", "stage", "state")

#: So many bytes at the beginning tell a part from another one of its name.
HEAD_BYTES = 16


class Between(NamedTuple):
    """A condition on a column of whole numbers: low <= value <= high; None is no bound."""

    low: int | None
    high: int | None

    def holds(self, value: int) -> bool:
        return (self.low is None or self.low <= value) and (self.high is None or value <= self.high)


#: Column -> allowed values, or a range.
Where = Mapping[str, "Sequence[Any] | Between"]
Bounds = tuple[list[Any], list[Any]]


class Rows(Protocol):
    """Which rows count: see `sessions.Cut`."""

    def keep(self, rows: pa.Table) -> pa.Table: ...
    def groups(
        self, sessions: Bounds, steps: Bounds, among: Iterable[int]
    ) -> tuple[list[int], list[int]]: ...


class Part:
    """One part. Its footer is parsed once; the file is open only while it is read.

    Args:
        store: where it is. table: its name in `schema.SCHEMAS`. file: its name in the table's folder.
    """

    def __init__(self, store: Store, table: str, file: str) -> None:
        self.name = f"{table}/{file}"
        self._store, self._table, self._schema = store, table, SCHEMAS[table]
        self._bounds: dict[str, Bounds] = {}
        self._footer: pq.FileMetaData | None = None
        self._head = b""

    def _open(self) -> pa.NativeFile:
        """The file; its footer is parsed.

        Raises:
            FileNotFoundError: it is gone, or another one of this name has taken its place.
        """
        source = self._store.open(self.name)
        head = source.read_at(HEAD_BYTES, 0)
        if self._footer is None:
            footer = open_part(source, table=self._table).metadata
            chunks = chunk_table(source)
            self._chunks = (
                None if chunks is None else chunks.reshape(footer.num_row_groups, footer.num_columns)
            )
            self._places = {footer.schema.column(i).path: i for i in range(footer.num_columns)}
            # Format version 1 has no such columns: what `schema.upgrade` fills in.
            self._absent = set(self._schema.names).difference(footer.schema.to_arrow_schema().names)
            self._footer, self._head = footer, head
        elif head != self._head:
            raise FileNotFoundError(f"{self.name} was replaced")
        return source

    @property
    def footer(self) -> pq.FileMetaData:
        """Raises DamagedError, OSError."""
        if self._footer is None:
            self._open().close()
        return self._footer  # type: ignore[return-value]  # _open has set it

    @property
    def groups(self) -> int:
        return self.footer.num_row_groups

    def bounds(self, column: str) -> Bounds:
        """Smallest and largest value in every row group; None where the footer does not tell."""
        if column not in self._bounds:
            self._bounds[column] = self._told(column)
        return self._bounds[column]

    def _told(self, column: str) -> Bounds:
        footer = self.footer
        low: list[Any] = [None] * self.groups
        high: list[Any] = [None] * self.groups
        if column in self._absent:
            filled = 0 if not self._schema.field(column).nullable else None
            return [filled] * self.groups, [filled] * self.groups
        place = self._places.get(column)
        for group in range(self.groups if place is not None else 0):
            told = footer.row_group(group).column(place).statistics
            if told is not None and told.has_min_max:
                low[group], high[group] = told.min, told.max
        return low, high

    def kept(self, where: Where) -> tuple[list[int], list[int]]:
        """The row groups that may hold such rows, and those of them that hold nothing else."""
        some, whole = [], []
        for group in range(self.groups):
            verdicts = [self._verdict(group, column, allowed) for column, allowed in where.items()]
            if all(v is not False for v in verdicts):
                some.append(group)
                if all(v is True for v in verdicts):
                    whole.append(group)
        return some, whole

    def _verdict(self, group: int, column: str, allowed: Sequence[Any] | Between) -> bool | None:
        """True: every row of the group meets the condition; False: none does; None: perhaps."""
        lows, highs = self.bounds(column)
        low, high = lows[group], highs[group]
        if low is None:
            return None
        if isinstance(allowed, Between):
            outside = (allowed.high is not None and low > allowed.high) or (
                allowed.low is not None and high < allowed.low
            )
            # Nulls are not in the bounds: such a column never proves that all rows match.
            known = allowed.holds(low) and allowed.holds(high) and not self._schema.field(column).nullable
            return False if outside else (True if known else None)
        place = bisect_left(allowed, low)
        if place >= len(allowed) or allowed[place] > high:
            return False
        return True if low == high else None

    def read(
        self,
        columns: Sequence[str],
        where: Where,
        groups: Sequence[int] | None = None,
        cut: Rows | None = None,
    ) -> pa.Table:
        """The rows that meet every condition, strings of `ENCODED` as dictionaries.

        Args:
            columns: of today's schema. where: lists of values must be sorted. groups: of these row groups
                only. cut: which rows count.

        Raises:
            DamagedError, OSError, ValueError, pyarrow.ArrowException: a row group is damaged.
        """
        some, _ = self.kept(where)
        if groups is not None:
            some = [g for g in some if g in set(groups)]
        target = encoded(self._schema, columns)
        if cut is None:
            return self._read(some, columns, where).cast(target) if some else target.empty_table()
        clean, mixed = cut.groups(self.bounds("session"), self.bounds("step"), some)
        pieces = [target.empty_table()]
        if clean:
            pieces.append(self._read(clean, columns, where).cast(target))
        if mixed:
            rows = self._read(mixed, list(dict.fromkeys([*columns, "session", "step"])), where)
            pieces.append(cut.keep(rows).select(list(columns)).cast(target))
        return pa.concat_tables(pieces)

    def _read(self, groups: list[int], columns: Sequence[str], where: Where) -> pa.Table:
        names = list(dict.fromkeys([*columns, *self._undecided(groups, where)]))
        table = self._decode(groups, [n for n in names if n not in self._absent])
        for name in self._absent.intersection(names):
            field = self._schema.field(name)
            nulls = pa.nulls(table.num_rows, field.type)
            table = table.append_column(field, nulls if field.nullable else nulls.fill_null(0))
        return keep(table, {c: a for c, a in where.items() if c in names}).select(list(columns))

    def _decode(self, groups: list[int], columns: list[str]) -> pa.Table:
        strings = [name for name in ENCODED if name in columns]
        with self._open() as file:
            if self._chunks is not None:
                return read_chunks(file, self.footer, self._chunks, groups, columns, strings)
            part = open_part(file, table=self._table, encoded=strings)
            return part.read_row_groups(groups, columns=columns, use_threads=len(groups) > 8)

    def values(
        self,
        column: str,
        where: Where,
        groups: Sequence[int] | None = None,
        cut: Rows | None = None,
        *,
        extremes: bool,
    ) -> list[Any]:
        """Values of a column in the rows that `read` gives, with repetitions.

        Args:
            extremes: the lowest and the highest are among them, others may not be; else all are.
        """
        some, whole = self.kept(where)
        if groups is not None:
            some = [g for g in some if g in set(groups)]
        clean = some if cut is None else cut.groups(self.bounds("session"), self.bounds("step"), some)[0]
        low, high = self.bounds(column)
        told = {
            g
            for g in set(clean).intersection(whole)
            if low[g] is not None and (extremes or low[g] == high[g])
        }
        found = [v for g in told for v in (low[g], high[g])]
        rest = [g for g in some if g not in told]
        if rest:
            found += pc.unique(self.read([column], where, rest, cut)[column]).to_pylist()  # type: ignore[attr-defined]
        return found

    def _undecided(self, groups: list[int], where: Where) -> list[str]:
        """The columns that must be looked at row by row."""
        return [
            column
            for column, allowed in where.items()
            if not all(self._verdict(group, column, allowed) for group in groups)
        ]


def encoded(schema: pa.Schema, columns: Sequence[str]) -> pa.Schema:
    """The schema of these columns with the strings of `ENCODED` as dictionaries."""
    fields = [schema.field(c) for c in columns]
    code = pa.dictionary(pa.int32(), pa.string())
    return pa.schema([f.with_type(code) if f.name in ENCODED else f for f in fields])


def coded(rows: pa.Table) -> pa.Table:
    """Rows with the strings of `ENCODED` as dictionaries, in one piece."""
    rows = rows.combine_chunks()
    for place, field in enumerate(rows.schema):
        if field.name in ENCODED:
            column = rows.column(place).dictionary_encode()
            rows = rows.set_column(place, field.with_type(column.type), column)
    return rows


def keep(table: pa.Table, where: Where) -> pa.Table:
    """The rows that meet every condition; a null meets none."""
    mask: pa.ChunkedArray | None = None
    for column, allowed in where.items():
        hits = _hits(table[column], allowed)
        mask = hits if mask is None else pc.and_(mask, hits)  # type: ignore[attr-defined]
    return table if mask is None else select(table, mask.to_numpy(zero_copy_only=False))


def select(table: pa.Table, mask: np.ndarray) -> pa.Table:
    """The rows where `mask` (bool, one a row) is true; a contiguous stretch is not copied."""
    count = int(np.count_nonzero(mask))
    if count == len(mask):
        return table
    first = int(mask.argmax()) if count else 0
    if mask[first : first + count].all():
        return table.slice(first, count)
    return table.filter(pa.array(mask))


def _hits(column: pa.ChunkedArray, allowed: Sequence[Any] | Between) -> pa.ChunkedArray:
    if isinstance(allowed, Between):
        numbers = [pa.array(_inside(chunk, allowed)) for chunk in column.chunks]
        return pa.chunked_array(numbers, pa.bool_())
    if not pa.types.is_dictionary(column.type):
        return pc.is_in(column, value_set=pa.array(allowed, column.type))  # type: ignore[attr-defined]
    values = pa.array(allowed, column.type.value_type)
    found = []
    for chunk in column.chunks:
        hit = pc.is_in(chunk.dictionary, value_set=values)  # type: ignore[attr-defined]
        found.append(hit.take(chunk.indices).fill_null(False))
    return pa.chunked_array(found, pa.bool_())


def _inside(chunk: pa.Array, allowed: Between) -> np.ndarray:
    inside = ~chunk.is_null().to_numpy(False) if chunk.null_count else np.ones(len(chunk), bool)
    numbers = (chunk.fill_null(0) if chunk.null_count else chunk).to_numpy(zero_copy_only=False)
    if allowed.low is not None:
        inside &= numbers >= allowed.low
    if allowed.high is not None:
        inside &= numbers <= allowed.high
    return inside
