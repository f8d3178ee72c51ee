"""The rows of several ranks as those of one run.

- Of a *sharded* tensor each rank has a row of its part; parts add, and a step counts when they are all there.
- Of anything that several ranks have as a whole (a replica, a scalar) the row of the lowest rank counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .derive import codes_of, unpack_active
from .ranks import FIRST, rank_of
from .rollup import added, histograms, numbers, only
from .scan import select

#: Whose squares add over ranks: each one logs it of what it writes.
ADDED_SCALARS = ("grad_norm", "recorder/grad_norm")
#: Events of which those of the first rank tell all.
_OF_EACH = ("start", "restart", "close", "note")

_COUNTS = ("count", "zeros", "subnormals", "nans", "pos_infs", "neg_infs", "sum", "sum_sq")
_OPTIONAL = ("ref_sum_sq", "dot", "residual_sq", "sign_flips", "lost", "samples")
#: What has to be read besides, to know which rows belong together.
_KEYS = {
    "stats": ("kind", "tensor", "session", "step", "count"),
    "values": ("kind", "tensor", "session", "step"),
    "scalars": ("name", "session", "step"),
    "events": ("event", "step", "message"),
}
Pieces = Sequence[tuple[str, pa.Table]]


class Region(NamedTuple):
    """The part of a tensor that a rank holds: where it begins, and its shape."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass
class Joint:
    """How the rows of several ranks become those of one run.

    Attributes:
        shards: rank and session -> tensor -> what the rank holds of it.
        elements, shapes: of every tensor, as a whole.
        adding: session -> ranks whose scalars of `ADDED_SCALARS` count.
    """

    shards: Mapping[tuple[int, int], Mapping[str, Region]]
    elements: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    adding: Mapping[int, frozenset[int]]

    @classmethod
    def of(cls, told: Mapping[str, Mapping[str, Any]]) -> Joint:
        """From `descriptions`."""
        shards: dict[tuple[int, int], dict[str, Region]] = {}
        elements: dict[str, int] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        adding: dict[int, set[int]] = {}
        for writer, info in told.items():
            rank, before = rank_of(writer), set(elements)
            for entry in info.get("tensors", []):
                elements.setdefault(entry["tensor"], entry["elements"])
                shapes.setdefault(entry["tensor"], tuple(entry["shape"]))
            for session, regions in info.get("shards", {}).items():
                held = {name: Region(tuple(offset), tuple(size)) for name, (offset, size) in regions.items()}
                shards[rank, int(session)] = held
                if held or not before or set(elements) - before:
                    adding.setdefault(int(session), set()).add(rank)
        return cls(shards, elements, shapes, {s: frozenset(ranks) for s, ranks in adding.items()})

    @cached_property
    def sharded(self) -> set[str]:
        """The tensors of which ranks hold parts."""
        return {name for regions in self.shards.values() for name in regions}

    def _region(self, rank: int, session: int, tensor: str) -> Region | None:
        return self.shards.get((rank, session), {}).get(tensor)

    def columns(self, table: str, wanted: Sequence[str]) -> list[str]:
        """What has to be read so that `join` can give these columns."""
        return list(dict.fromkeys([*wanted, *_KEYS.get(table, ())]))

    def join(self, table: str, pieces: Pieces, wanted: Sequence[str]) -> list[tuple[str, pa.Table]]:
        """The rows of one table, as one process would have written them."""
        if table not in _KEYS:
            return list(pieces)
        if table == "events":
            return [(w, _told_by(rows, w).select(list(wanted))) for w, rows in pieces]
        names = "name" if table == "scalars" else "tensor"
        alone, shared = self._apart(pieces, names)
        if shared:
            rows = pa.concat_tables([r for _, r in shared]).combine_chunks()
            owners = np.repeat([rank_of(w) for w, _ in shared], [r.num_rows for _, r in shared])
            join = {"stats": self._stats, "values": self._values, "scalars": self._scalars}[table]
            alone.append((FIRST, join(rows, owners)))
        found = [(writer, rows.select(list(wanted))) for writer, rows in alone if rows.num_rows]
        return found or [(FIRST, pieces[0][1].slice(0, 0).select(list(wanted)))]

    def _apart(self, pieces: Pieces, column: str) -> tuple[list[tuple[str, pa.Table]], Pieces]:
        """Rows of what one writer has alone and as a whole, and all others."""
        owners: dict[str, set[str]] = {}
        coded = [codes_of(rows[column]) for _, rows in pieces]
        for (writer, _), (codes, words) in zip(pieces, coded, strict=True):
            for code in np.unique(codes):
                owners.setdefault(words[code], set()).add(writer)
        parts = self.sharded if column == "tensor" else set(ADDED_SCALARS)
        together = {name for name, who in owners.items() if len(who) > 1 or name in parts}
        alone, shared = [], []
        for (writer, rows), (codes, words) in zip(pieces, coded, strict=True):
            mask = np.array([word in together for word in words], bool)[codes]
            alone.append((writer, select(rows, ~mask)))
            shared.append((writer, select(rows, mask)))
        return alone, [(writer, rows) for writer, rows in shared if rows.num_rows]

    def _stats(self, rows: pa.Table, owners: NDArray) -> pa.Table:
        rows, owners, starts = _grouped(rows, owners, ("kind", "tensor", "session", "step"))
        codes, words = codes_of(rows["tensor"])
        sharded = np.array([word in self.sharded for word in words], bool)[codes[starts[:-1]]]
        count = np.add.reduceat(numbers(rows, "count"), starts[:-1])
        whole = np.array([self.elements.get(word, -1) for word in words])[codes[starts[:-1]]]
        kept = np.flatnonzero(sharded & (count == whole))
        parts = _within(starts, kept)
        ends = np.concatenate([[0], np.cumsum(np.diff(starts)[kept])])
        merged = self._merged(rows.take(pa.array(parts)), owners[parts], ends)
        return pa.concat_tables([rows.take(pa.array(starts[:-1][~sharded])), merged])

    def _merged(self, rows: pa.Table, owners: NDArray, starts: NDArray) -> pa.Table:
        """Each group of parts as one row."""
        if not rows.num_rows:
            return rows
        rows = rows.combine_chunks()
        columns: dict[str, pa.Array] = {}
        for name in rows.column_names:
            if name in _COUNTS:
                with np.errstate(all="ignore"):  # sums may be infinite
                    columns[name] = pa.array(np.add.reduceat(numbers(rows, name), starts[:-1]))
            elif name in _OPTIONAL:
                columns[name] = added(rows, name, starts)
            elif name == "captures":
                columns[name] = pa.array(np.maximum.reduceat(numbers(rows, name), starts[:-1]))
            elif name in ("min", "max"):
                columns[name] = _extreme(rows, name, starts)
            elif name == "skipped":
                columns[name] = pa.array(np.logical_or.reduceat(numbers(rows, name), starts[:-1]))
            elif name == "state":
                columns[name] = _state(rows, starts)
            elif name not in ("buckets", "counts", "units", "active"):  # those are the same in all parts
                columns[name] = rows[name].take(pa.array(starts[:-1]))
        if {"buckets", "counts"} & set(rows.column_names):
            columns |= histograms(_with_lists(rows), starts)
        if {"units", "active"} & set(rows.column_names):
            columns |= self._units(rows, owners, starts)
        return pa.table([_like(columns[n], rows.schema.field(n)) for n in rows.column_names], rows.schema)

    def _units(self, rows: pa.Table, owners: NDArray, starts: NDArray) -> dict[str, pa.Array]:
        """Sets of active units: each part's at the place of its rows in the whole."""
        tensors, sessions = rows["tensor"].to_pylist(), rows["session"].to_pylist()
        sets = rows["active"].to_pylist() if "active" in rows.column_names else [None] * len(tensors)
        found: list[bytes | None] = []
        units: list[int | None] = []
        for first, last in pairwise(starts.tolist()):
            shape = self.shapes.get(tensors[first], ())
            union = np.zeros(shape[0] if shape else 0, bool)
            for row in range(first, last):
                region = self._region(int(owners[row]), sessions[row], tensors[row])
                if sets[row] is not None and region is not None and len(region.shape) == len(shape):
                    at, many = region.offset[0], region.shape[0]
                    union[at : at + many] |= unpack_active(sets[row], many)
            known = union.size > 0 and any(sets[row] is not None for row in range(first, last))
            found.append(np.packbits(union).tobytes() if known else None)
            units.append(union.size if known else None)
        return {"active": pa.array(found, pa.binary()), "units": pa.array(units, pa.int64())}

    def _values(self, rows: pa.Table, owners: NDArray) -> pa.Table:
        rows, owners, starts = _grouped(rows, owners, ("kind", "tensor", "session", "step"))
        tensors, sharded = rows["tensor"].to_pylist(), self.sharded
        taken, wholes = [], {}
        for first, last in pairwise(starts.tolist()):
            if tensors[first] in sharded:
                whole = self._assembled(rows, owners, first, last, tensors[first])
                if whole is None:
                    continue
                wholes[len(taken)] = whole
            taken.append(first)
        found = rows.take(pa.array(taken, pa.int64()))
        if wholes and "values" in rows.column_names:
            lists = found["values"].to_pylist()
            for place, values in wholes.items():
                lists[place] = values
            found = _with(found, "values", lists)
        return found

    def _assembled(
        self, rows: pa.Table, owners: NDArray, first: int, last: int, tensor: str
    ) -> NDArray[np.float64] | None:
        """A tensor from the values of its parts; None when some are missing."""
        whole = np.zeros(self.shapes[tensor])
        filled = 0
        for row in range(first, last):
            region = self._region(int(owners[row]), rows["session"][row].as_py(), tensor)
            if region is None:
                return None
            filled += int(np.prod(region.shape))
            if "values" in rows.column_names:
                values = np.asarray(rows["values"][row].as_py(), np.float64)
                if values.size != int(np.prod(region.shape)):
                    return None
                place = tuple(slice(o, o + n) for o, n in zip(region.offset, region.shape, strict=True))
                target = whole if len(place) == whole.ndim else whole.reshape(-1)  # cut across rows
                target[place] = values.reshape(region.shape)
        return whole.reshape(-1) if filled == whole.size else None

    def _scalars(self, rows: pa.Table, owners: NDArray) -> pa.Table:
        """Numbers as the lowest rank logged them; norms of what each rank writes add as squares."""
        rows, owners, starts = _grouped(rows, owners, ("name", "session", "step"))
        group = np.repeat(np.arange(starts.size - 1), np.diff(starts))
        lowest = np.minimum.reduceat(owners, starts[:-1])[group] == owners
        codes, words = codes_of(rows["name"])
        adds = np.array([word in ADDED_SCALARS for word in words], bool)[codes]
        sessions = rows["session"].to_numpy()
        wanted = np.array([len(self.adding.get(s, ())) for s in sessions.tolist()])
        pairs = zip(owners.tolist(), sessions.tolist(), strict=True)
        contributes = np.array([rank in self.adding.get(s, ()) for rank, s in pairs], bool)
        heads = adds & lowest
        if "value" in rows.column_names and adds.any():
            values = numbers(rows, "value").copy()
            squares = np.where(adds & contributes, values, 0.0) ** 2
            seen = np.add.reduceat((adds & contributes).astype(int), starts[:-1])[group]
            heads &= seen == wanted
            values[heads] = np.sqrt(np.add.reduceat(squares, starts[:-1]))[group][heads]
            rows = _with(rows, "value", values)
        return select(rows, (lowest & ~adds) | heads)


def _grouped(rows: pa.Table, owners: NDArray, keys: Sequence[str]) -> tuple[pa.Table, NDArray, NDArray]:
    """Rows sorted by these keys, then rank; of whom each is; int64 (groups + 1,): where each key begins."""
    columns = [
        rows[k].to_numpy() if pa.types.is_integer(rows[k].type) else codes_of(rows[k])[0] for k in keys
    ]
    order = np.lexsort([owners, *columns[::-1]])
    changed = np.zeros(max(len(order) - 1, 0), bool)
    for column in columns:
        changed |= np.diff(column[order]) != 0
    starts = np.concatenate([[0], np.flatnonzero(changed) + 1, [len(order)]])
    return rows.take(pa.array(order)), owners[order], starts


def _within(starts: NDArray, groups: NDArray) -> NDArray[np.int64]:
    """The rows of these groups."""
    found = [np.arange(starts[i], starts[i + 1]) for i in groups]
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _like(column: Any, field: pa.Field) -> pa.ChunkedArray:
    found = column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
    return found if found.type == field.type else found.cast(field.type)


def _extreme(rows: pa.Table, name: str, starts: NDArray) -> pa.Array:
    """Null where no part has any."""
    none, reduce = (np.inf, np.minimum) if name == "min" else (-np.inf, np.maximum)
    found = reduce.reduceat(numbers(rows, name, none), starts[:-1])
    return pa.array(found, mask=found == none)


def _state(rows: pa.Table, starts: NDArray) -> pa.ChunkedArray:
    """Of the first part; but trainable when any is: a gradient may be zero on one rank and not on another."""
    codes, words = codes_of(rows["state"])
    first = codes[starts[:-1]]
    if "trainable" in words:
        trainable = words.index("trainable")
        first = np.where(np.logical_or.reduceat(codes == trainable, starts[:-1]), trainable, first)
    found = pa.array([None if code < 0 else words[code] for code in first], pa.string())
    return pa.chunked_array([found.dictionary_encode()])


def _with_lists(rows: pa.Table) -> pa.Table:
    """`histograms` wants both columns."""
    for name, other in (("buckets", "counts"), ("counts", "buckets")):
        if name not in rows.column_names:
            lists = only(rows, other)
            values = pa.array(np.zeros(len(lists.flatten()), np.int64 if name == "counts" else np.int16))
            rows = rows.append_column(name, pa.ListArray.from_arrays(lists.offsets, values))
    return rows


def _told_by(rows: pa.Table, writer: str) -> pa.Table:
    """Events of a rank: all of the first; of the others what it cannot know, with the rank in front."""
    if writer == FIRST:
        return rows
    kept = select(rows, np.array([event not in _OF_EACH for event in rows["event"].to_pylist()], bool))
    told = [f"rank {rank_of(writer)}: {message}" for message in kept["message"].to_pylist()]
    return _with(kept, "message", told)


def _with(rows: pa.Table, name: str, values: Any) -> pa.Table:
    """The rows with other values in a column."""
    place = rows.schema.get_field_index(name)
    field = rows.schema.field(name)
    return rows.set_column(place, field, pa.array(values, field.type))
