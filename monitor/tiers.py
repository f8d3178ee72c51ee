"""Which parts of a table are merged, and merging them.

Parts are merged as they come: eight neighbours of about the same size become one, so that a row is written
a few times in the whole run, and a table has few small parts. Merging reads a few thousand rows of each part
at a time. What is damaged, or of format version 1, stays as it is, and nothing is merged across it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from .merging import merged
from .parts import Captures, DamagedError, PartWriter, captures_of, open_part, sync_folder
from .schema import ROLLUPS, SCHEMA_VERSION, SORT_KEYS
from .spans import Span, spans

#: A part is not merged beyond so many captures (of a roll-up: bins), rows or bytes.
FULL_CAPTURES, FULL_ROWS, FULL_BYTES = 2048, 8 << 20, 1 << 30
#: So many neighbours of about the same size are merged into one; the most that are open at once.
FAN_IN = 8
#: Rows that are held of each part.
BATCH_ROWS, VALUES_BATCH_ROWS = 1024, 64


class Stopped(Exception):
    """The work was asked to end early."""


class UnreadableError(Exception):
    """A part turned out to be damaged: the work begins anew without it."""


Stop = Callable[[], bool]


def check(stop: Stop) -> None:
    """Raises `Stopped` when it is time."""
    if stop():
        raise Stopped


class Part(NamedTuple):
    """A part as its footer describes it; of one that cannot be trusted, or is too old, nothing is known."""

    span: Span
    path: Path
    size: int
    rows: int = 0
    captures: Captures = {}  # noqa: RUF012  (never changed)
    usable: bool = False

    @property
    def width(self) -> int:
        """Captures, or bins of a roll-up, that it holds."""
        if self.path.parent.name in ROLLUPS:
            return self.span.last - self.span.first + 1
        return sum(last - first + 1 for first, last in self.captures.values())

    @property
    def filled(self) -> float:
        """1 when it is full."""
        return max(self.width / FULL_CAPTURES, self.rows / FULL_ROWS, self.size / FULL_BYTES)


_unreadable: set[tuple[Path, int, int]] = set()


@lru_cache(1 << 14)
def _describe(path: Path, table: str, span: Span, modified: int, size: int) -> Part:
    try:
        with open_part(path, table=table) as file:
            metadata = file.metadata
            version = (metadata.metadata or {}).get(b"layerwatch_schema_version")
            usable = version == str(SCHEMA_VERSION).encode()
            return Part(span, path, size, metadata.num_rows, captures_of(metadata), usable)
    except (DamagedError, pa.ArrowException):
        return Part(span, path, size)


def parts_of(run: Path, table: str, writer: str) -> list[Part]:
    """The parts that count, in order."""
    found = []
    for span, path in spans(run / table, ".parquet").items():
        if span.writer == writer:
            status = path.stat()
            part = _describe(path, table, span, status.st_mtime_ns, status.st_size)
            found.append(part._replace(usable=part.usable and _identity(path) not in _unreadable))
    return found


def _identity(path: Path) -> tuple[Path, int, int]:
    status = path.stat()
    return path, status.st_mtime_ns, status.st_size


def rows_of(part: Part, table: str) -> Iterator[pa.Table]:
    """The rows of a part, a few thousand at a time.

    Raises:
        UnreadableError: the part is damaged; from now on `parts_of` says so.
    """
    size = VALUES_BATCH_ROWS if table == "values" else BATCH_ROWS
    try:
        with open_part(part.path, table=table) as file:
            for group in range(file.num_row_groups):  # of several, pyarrow reads the bytes of all at once
                for batch in file.iter_batches(size, row_groups=[group], use_threads=False):
                    yield pa.Table.from_batches([batch]).replace_schema_metadata(None)
    except (DamagedError, pa.ArrowException):
        _unreadable.add(_identity(part.path))
        raise UnreadableError from None


def sorted_rows(parts: Sequence[Part], table: str) -> Iterator[pa.Table]:
    """The rows of several parts in the table's order."""
    return merged([rows_of(part, table) for part in parts], [name for name, _ in SORT_KEYS[table]])


def due(parts: Sequence[Part], *, whole: bool = False) -> list[Part]:
    """The neighbours that are merged next, two at least, or none.

    Args:
        parts: of one writer, in order. whole: merge what can be merged, not only when there are many.
    """
    for chain in _chains(parts):
        for tier in sorted({_tier(part) for part in chain}):
            larger = [i for i, part in enumerate(chain) if _tier(part) > tier]
            suffix = chain[larger[-1] + 1 if larger else 0 :]
            if len(suffix) >= FAN_IN:
                return _fitting(suffix[:FAN_IN])
        if whole and len(chain) > 1:
            return _fitting(chain[-FAN_IN:])
    return []


def _tier(part: Part) -> int:
    return int(math.log(max(part.rows, 1), FAN_IN))


def _chains(parts: Sequence[Part]) -> list[list[Part]]:
    """Neighbours that may be merged: none is more than half full, and no write-ahead file lies between. Rows
    whose captures are not known stay apart, as they cannot be rolled up."""
    chains: list[list[Part]] = [[]]
    for part in parts:
        chain = chains[-1]
        mergeable = part.usable and part.filled <= 0.5
        alike = len({bool(p.captures) for p in (*chain, part) if p.rows}) < 2
        if chain and not (mergeable and alike and part.span.first == chain[-1].span.last + 1):
            chains.append([])
        if mergeable:
            chains[-1].append(part)
    return chains


def _fitting(parts: Sequence[Part]) -> list[Part]:
    """As many, from the first, as one part may hold."""
    taken = list(parts[:2])
    for part in parts[2:]:
        if sum(p.filled for p in taken) + part.filled > 1:
            break
        taken.append(part)
    return taken


def merge_parts(
    run: Path, table: str, writer: str, *, limit: int | None = None, whole: bool = False, stop: Stop
) -> int:
    """Merge the parts that are due; returns how many were replaced.

    Args:
        limit: leave parts alone that together exceed so many bytes. whole: see `due`.

    Raises:
        Stopped, OSError: nothing is lost.
    """
    remove_covered(run / table, writer)
    replaced = 0
    while chosen := due(parts_of(run, table, writer), whole=whole):
        if limit is not None and sum(part.size for part in chosen) > limit:
            break
        try:
            _merge(chosen, run / table, stop)
        except UnreadableError:
            continue
        replaced += len(chosen)
    return replaced


def _merge(parts: Sequence[Part], folder: Path, stop: Stop) -> None:
    span = Span(parts[0].span.writer, parts[0].span.first, parts[-1].span.last)
    with PartWriter(folder / f"{span.stem}.parquet", folder.name) as writer:
        for rows in sorted_rows(parts, folder.name):
            check(stop)
            writer.write(rows)
    remove(part.path for part in parts)


def remove_covered(folder: Path, writer: str) -> None:
    """Remove a writer's parts that a wider one covers: what an interrupted merge left behind."""
    keep = set(spans(folder, ".parquet").values())
    found = [p for p in folder.glob("*.parquet") if (span := Span.of(p)) and span.writer == writer]
    remove(p for p in found if p not in keep)


def remove(paths: Iterator[Path]) -> None:
    """Remove parts, also when the power fails afterwards."""
    folder = None
    for path in paths:
        path.unlink(missing_ok=True)
        folder = path.parent
    if folder is not None:
        sync_folder(folder)
