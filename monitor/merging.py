"""Merging sorted tables while holding little of each in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

Key = tuple[Any, ...]


class _Source:
    """What is at hand of one sorted stream."""

    def __init__(self, tables: Iterable[pa.Table], keys: Sequence[str]) -> None:
        self._tables, self._keys = iter(tables), keys
        self.rows: pa.Table | None = None
        self.refill()

    def refill(self) -> None:
        while self.rows is None or not self.rows.num_rows:
            self.rows = next(self._tables, None)
            if self.rows is None:
                return
        self.last = self._key(self.rows.num_rows - 1)

    def _key(self, row: int) -> Key:
        return tuple(self.rows[name][row].as_py() for name in self._keys)  # type: ignore[index]

    def take(self, upto: Key) -> pa.Table:
        """The rows whose keys are at most `upto`; they are gone from here."""
        rows: pa.Table = self.rows  # type: ignore[assignment]
        low, high = 0, rows.num_rows
        while low < high:
            middle = (low + high) // 2
            if self._key(middle) <= upto:
                low = middle + 1
            else:
                high = middle
        self.rows = rows.slice(low)
        return rows.slice(0, low)


def merged(sources: Sequence[Iterable[pa.Table]], keys: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of all sources, sorted; equal ones in the order of the sources.

    Holds one table of each source, and a copy.

    Args:
        sources: of one schema, each sorted by `keys`. keys: columns without nulls or NaN.
    """
    live = [source for tables in sources if (source := _Source(tables, keys)).rows is not None]
    while live:
        upto = min(source.last for source in live)
        rows = pa.concat_tables([source.take(upto) for source in live])
        yield rows if len(live) == 1 else rows.take(pa.array(order(rows, keys)))
        for source in live:
            source.refill()
        live = [source for source in live if source.rows is not None]


def order(rows: pa.Table, keys: Sequence[str]) -> np.ndarray:
    """Places (n,) of the rows in the order of these columns; equal ones stay in order."""
    return np.lexsort([ranks(rows[name]) for name in reversed(keys)])


def ranks(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers (n,) that are equal or in order as the column's values are."""
    whole = column.combine_chunks()
    if not pa.types.is_string(whole.type):
        return whole.to_numpy(zero_copy_only=False)
    encoded = whole.dictionary_encode()
    names = np.array(encoded.dictionary.to_pylist(), object)
    rank = np.empty(len(names), np.int64)
    rank[np.argsort(names)] = np.arange(len(names))
    return rank[encoded.indices.to_numpy()]
