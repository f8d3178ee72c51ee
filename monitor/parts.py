"""Parquet parts: sorted, checked, written whole.

A part is an ordinary Parquet file with two additions where no Parquet reader looks. Between the magic
`PAR1` and the first column chunk lie 12 bytes: `LWC1`, then CRC-32 and length of the file's tail (uint32,
little endian). The tail is the rest of the file behind the last column chunk: first a table of the column
chunks, in order of the row groups and of the columns in each (16 bytes a chunk: offset as uint64, length and
CRC-32 as uint32), then the Parquet footer. Parquet's own page checksums cover neither the footer nor the
pages' headers, in which one flipped bit turns numbers into other numbers. Parts of format version 1 have page
checksums only.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .merging import order, ranks
from .schema import SCHEMA_VERSION, SCHEMAS, SORT_KEYS, upgrade
from .spans import Span

#: Most rows of a Parquet row group, the least that a reader decodes. Small ones make a long footer, which
#: every query reads; large ones make one tensor dear. A row of `values` may hold 4,096 numbers.
ROW_GROUP, VALUES_ROW_GROUP = 8192, 512
#: Bytes of a page before it is compressed: what merging holds of each column of each part.
PAGE_BYTES = 256 << 10
#: Columns with statistics in the footer: those by which a reader leaves out row groups. Others would only
#: make the footer longer, at 15 ms a megabyte in every query.
PRUNING = ("kind", "tensor", "step", "session", "capture", "name", "time")

#: Columns that are not compressed: they are small by their encoding, or numbers that hardly get smaller, and
#: most questions about all tensors read them: a third less time for 1 % more bytes.
PLAIN = (
    "step", "session", "capture", "captures", "tensor", "kind", "stage", "state", "skipped",
    "count", "nans", "pos_infs", "neg_infs", "sum_sq",
)  # fmt: skip

_HEAD = struct.Struct("<4sII")
_MAGIC = b"LWC1"
_CAPTURES = "layerwatch_captures"
_CHUNK = np.dtype([("offset", "<u8"), ("length", "<u4"), ("checksum", "<u4")])


#: Session -> first and last capture.
Captures = dict[int, tuple[int, int]]


class DamagedError(ValueError):
    """A part that cannot be trusted: its bytes changed, or it is of a format that is not known."""


def sync_folder(folder: Path) -> None:
    """Make renames and removals in this folder survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class PartWriter:
    """Writes one part, sorted rows first to last; as a context manager.

    On a clean exit the file is checksummed, synchronised with the disk and renamed to `target`; on an error
    the temporary file is removed.

    Args:
        target: the part's path. table: its name in `schema.SCHEMAS`.
    """

    def __init__(self, target: Path, table: str) -> None:
        self.target, self._schema = target, SCHEMAS[table]
        self._temporary = target.with_name(f".{target.name}.tmp")
        self._group = VALUES_ROW_GROUP if table == "values" else ROW_GROUP
        self._waiting: list[pa.Table] = []
        self._rows = 0  # waiting for a row group
        self._captures: Captures = {}

    def __enter__(self) -> PartWriter:
        self.target.parent.mkdir(exist_ok=True)  # copies of runs lack folders that were empty
        self._sink = pa.OSFile(str(self._temporary), "wb")
        strings = [f.name for f in self._schema if pa.types.is_string(f.type)]
        leaves = [f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name for f in self._schema]
        self._writer = pq.ParquetWriter(
            self._sink,
            self._schema.with_metadata({"layerwatch_schema_version": str(SCHEMA_VERSION)}),
            compression={path: "none" if path in PLAIN else "zstd" for path in leaves},  # type: ignore[arg-type]
            # 3 to 7 % smaller than the default level of 1, and hardly slower
            compression_level={path: 3 for path in leaves if path not in PLAIN},
            use_dictionary=strings,  # type: ignore[arg-type]  # names are taken, too
            write_statistics=[n for n in self._schema.names if n in PRUNING],  # type: ignore[arg-type]
            column_encoding={
                f.name: "DELTA_BINARY_PACKED" for f in self._schema if pa.types.is_integer(f.type)
            },
            data_page_size=PAGE_BYTES,
            write_page_checksum=True,
        )
        self._sink.write(bytes(_HEAD.size))
        self._groups = 0
        return self

    def write(self, rows: pa.Table) -> None:
        """Append rows, sorted by the table's keys and not before those written already."""
        self._waiting.append(rows)
        self._rows += rows.num_rows
        if "capture" in rows.column_names:
            self._note_captures(rows)
        while self._rows > self._group:
            waiting = pa.concat_tables(self._waiting)
            self._waiting = [waiting]
            self._write_group(_cut(waiting.slice(0, self._group + 1)))

    def _write_group(self, rows: int) -> None:
        waiting = pa.concat_tables(self._waiting)
        self._writer.write_table(waiting.slice(0, rows).combine_chunks(), row_group_size=rows)
        self._waiting, self._rows = [waiting.slice(rows)], self._rows - rows
        self._groups += 1

    def _note_captures(self, rows: pa.Table) -> None:
        bounds = rows.group_by("session", use_threads=False).aggregate([("capture", "min_max")])
        for session, found in zip(*bounds.to_pydict().values(), strict=True):
            if found["min"] is not None:
                first, last = self._captures.get(session, (found["min"], found["max"]))
                self._captures[session] = min(first, found["min"]), max(last, found["max"])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._rows:
                    self._write_group(self._rows)
                self._finish()
        finally:
            if self._writer.is_open:
                with contextlib.suppress(OSError, ValueError):
                    self._writer.close()
                self._writer.is_open = False  # else it would try again when it is collected
            self._sink.close()
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        self._writer.add_key_value_metadata({_CAPTURES: json.dumps(self._captures)})
        chunks = np.zeros(self._groups * len(self._schema), _CHUNK)
        self._sink.write(chunks.tobytes())  # its place
        self._writer.close()
        self._sink.close()
        with self._temporary.open("r+b") as file:
            _find_chunks(chunks, self._writer.writer.metadata)
            for place, (offset, length) in enumerate(zip(chunks["offset"], chunks["length"], strict=True)):
                file.seek(offset)
                chunks["checksum"][place] = zlib.crc32(file.read(length))
            file.seek(-8, os.SEEK_END)
            footer = int.from_bytes(file.read(4), "little") + 8
            length = chunks.nbytes + footer
            file.seek(-length, os.SEEK_END)
            file.write(chunks.tobytes())
            file.seek(-length, os.SEEK_END)
            tail = file.read()
            file.seek(4)
            file.write(_HEAD.pack(_MAGIC, zlib.crc32(tail), length))
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._temporary, self.target)
        sync_folder(self.target.parent)


def _cut(rows: pa.Table) -> int:
    """Where a row group ends, at most one before the last of these rows: between tensors, where one begins in
    the second half."""
    most = rows.num_rows - 1
    if "tensor" not in rows.column_names:
        return most
    changes = np.zeros(most, np.bool_)
    for name in ("kind", "tensor"):
        changes |= np.diff(ranks(rows[name])) != 0
    starts = np.flatnonzero(changes) + 1
    return int(starts[-1]) if starts.size and starts[-1] > most // 2 else most


def captures_of(footer: pq.FileMetaData) -> Captures:
    """Which captures a part holds."""
    found = json.loads((footer.metadata or {}).get(_CAPTURES.encode(), b"{}"))
    return {int(session): (first, last) for session, (first, last) in found.items()}


def _find_chunks(chunks: np.ndarray, footer: pq.FileMetaData) -> None:
    """Offsets and lengths; our columns are flat or lists of numbers, so Parquet has one for each."""
    place = 0
    for group in range(footer.num_row_groups):
        row_group = footer.row_group(group)
        for number in range(footer.num_columns):
            column = row_group.column(number)
            start = column.dictionary_page_offset or column.data_page_offset
            chunks[place] = (start, column.total_compressed_size, 0)
            place += 1


def write_part(run: Path, table: str, span: Span, batches: Sequence[pa.RecordBatch]) -> Path:
    """One part of rows in any order; they are sorted in memory.

    Args:
        run: the run's folder. table: its name in `schema.SCHEMAS`. span: what it holds. batches: of today's
            schema or of an older version's.
    """
    target = run / table / f"{span.stem}.parquet"
    upgraded = [upgrade(batch, table) for batch in batches]
    content = pa.Table.from_batches(upgraded, SCHEMAS[table]).combine_chunks()
    places = pa.array(order(content, [name for name, _ in SORT_KEYS[table]]))
    with PartWriter(target, table) as writer:
        for start in range(0, len(places), ROW_GROUP):  # a sorted copy of all would be as large again
            writer.write(content.take(places[start : start + ROW_GROUP]))
    return target


def open_part(
    source: Path | pa.NativeFile,
    *,
    table: str,
    encoded: Sequence[str] = (),
    footer: pq.FileMetaData | None = None,
) -> pq.ParquetFile:
    """A part, ready to be read; every byte that is read is checked.

    Args:
        source: a path, or a file that can be read at any place. table: its name in `schema.SCHEMAS`.
        encoded: strings that are read as Arrow dictionaries, much faster where few differ.
        footer: as it was parsed before, of the same bytes.

    Raises:
        DamagedError: the part is damaged, of a newer version, or no part of this table. Reading row groups
            raises it, too; pyarrow's own errors are possible in parts of version 1.
        OSError: the file cannot be read.
    """
    file = pa.OSFile(str(source), "rb") if isinstance(source, Path) else source
    head = file.read_at(4 + _HEAD.size, 0)
    checked = _Checked(file, head) if head[4:8] == _MAGIC else None
    try:
        part = pq.ParquetFile(
            pa.PythonFile(checked, mode="r") if checked else file,
            page_checksum_verification=True,
            read_dictionary=[*encoded] or None,
            metadata=footer,
        )
        schema = part.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise DamagedError(f"no whole Parquet file: {error}".splitlines()[0]) from None
    found = (schema.metadata or {}).get(b"layerwatch_schema_version", b"").decode(errors="replace")
    if found.isdigit() and int(found) > SCHEMA_VERSION:
        raise DamagedError(f"of log format {found}, this layerwatch reads up to {SCHEMA_VERSION}: upgrade it")
    if found != "1" and not checked:
        raise DamagedError("its checksum is missing")
    plain = pa.schema([f.with_type(_decoded(f.type)) for f in schema])
    if not upgrade(plain.empty_table(), table).schema.equals(SCHEMAS[table]):
        raise DamagedError(f"expected the columns of {table}, found {', '.join(schema.names)}")
    if checked:
        checked.opened = True
    return part


def chunk_table(file: pa.NativeFile) -> np.ndarray | None:
    """Offset, length and checksum of every column chunk in order of row groups, then columns.

    None of a part of version 1, which has no such table.

    Raises:
        DamagedError: the table is damaged.
    """
    head = file.read_at(4 + _HEAD.size, 0)
    return _Checked(file, head).chunks if head[4:8] == _MAGIC else None


def _decoded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if isinstance(kind, pa.DictionaryType) else kind


class _Checked:
    """A file that checks each column chunk when it is read, and the tail when it is opened."""

    def __init__(self, file: pa.NativeFile, head: bytes) -> None:
        self._file, self._position, self.closed = file, 0, False
        self._size = file.size()
        #: Until then only the footer is of interest, but Parquet's reader takes more of the file's end.
        self.opened = False
        _, checksum, length = _HEAD.unpack_from(head.ljust(4 + _HEAD.size), 4)
        self._tail_at = self._size - length
        self._tail = file.read_at(length, self._tail_at) if 8 < length <= self._size else b""
        footer = int.from_bytes(self._tail[-8:-4], "little") + 8
        if (
            zlib.crc32(self._tail) != checksum
            or not 8 < footer <= length
            or (length - footer) % _CHUNK.itemsize
        ):
            raise DamagedError("the checksum of its footer is wrong")
        chunks = self.chunks = np.frombuffer(self._tail, _CHUNK, (length - footer) // _CHUNK.itemsize)
        self._starts, self._ends = chunks["offset"], chunks["offset"] + chunks["length"]
        self._checksums = chunks["checksum"]

    def read(self, size: int = -1) -> bytes:
        start = self._position
        if size < 0:
            size = self._size - start
        self._position = start + size
        if start >= self._tail_at:
            return self._tail[start - self._tail_at :][:size]
        data = self._file.read_at(size, start)
        if not self.opened:
            return data
        first = int(np.searchsorted(self._ends, start, side="right"))
        for place in range(first, int(np.searchsorted(self._starts, start + size))):
            self._check(place, data, start)
        return data

    def _check(self, place: int, data: bytes, start: int) -> None:
        begin, end = int(self._starts[place]), int(self._ends[place])
        inside = start <= begin and end <= start + len(data)
        chunk: Any = memoryview(data)[begin - start : end - start] if inside else None
        if chunk is None:  # a reader that takes a chunk in pieces: the whole is checked
            chunk = self._file.read_at(end - begin, begin)
        if zlib.crc32(chunk) != self._checksums[place]:
            raise DamagedError(f"the checksum of its bytes {begin} to {end} is wrong")

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + position
        return self._position

    def tell(self) -> int:
        return self._position

    def size(self) -> int:
        return self._size

    def close(self) -> None:
        self.closed = True
        self._file.close()
