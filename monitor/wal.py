"""The write-ahead file: frames appended by one writer, readable at any moment, torn tails recognised.

A file is a sequence of frames: 4 bytes magic, 1 byte table, 4 bytes payload length, 4 bytes CRC-32 of table
and payload (little endian), payload. `stats` and `values` payloads are Arrow record batches; `scalars` and
`events` are JSON rows; a `group` holds what belongs together, each as 1 byte table, 4 bytes length, payload;
the first frame is a JSON header. A frame is appended by one write and read whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from .schema import GIVEN, SCHEMA_VERSION, TABLES, upgrade

MAGIC = b"LWF1"
_HEAD = struct.Struct("<4sBII")
_INNER = struct.Struct("<BI")  # of a frame in a group: table, length
_CODES = {"header": 0, "stats": 1, "values": 2, "scalars": 3, "events": 4, "group": 5}
_NAMES = {code: name for name, code in _CODES.items()}


Payload = bytes | pa.Buffer
Frame = tuple[str, Payload]  # table, payload


def batch_frame(table: str, batch: pa.RecordBatch) -> Frame:
    """Rows of `stats` or `values`."""
    return table, batch.serialize()


def rows_frame(table: str, rows: list[list[Any]]) -> Frame:
    """Rows of `scalars` or `events`, in the order of their schema."""
    return table, json.dumps(rows, separators=(",", ":")).encode()


def encode(*frames: Frame) -> list[Payload]:
    """A frame as what is to be written, in pieces: a capture has megabytes, and copies of them cost more than
    writing them. Several frames become one group, which is read whole or not at all."""
    if len(frames) == 1:
        ((table, payload),) = frames
        pieces = [payload]
    else:  # no magic inside: who searches for the next frame after damage must not find half a group
        table, pieces = "group", []
        for inner, payload in frames:
            pieces += [_INNER.pack(_CODES[inner], len(payload)), payload]
    code = checksum = _CODES[table]
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    return [_HEAD.pack(MAGIC, code, sum(map(len, pieces)), checksum), *pieces]


class WalWriter:
    """Appends frames to one new file; a frame is in the page cache when `write` returns.

    Raises:
        OSError: the file exists, or cannot be made or written. What was written of a frame is taken back.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.size = 0
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        try:
            content = json.dumps({"schema_version": SCHEMA_VERSION, **header})
            self.write(("header", content.encode()))
        except OSError:
            self.close()
            path.unlink(missing_ok=True)
            raise

    def write(self, *frames: Frame) -> int:
        """Append frames that are read together; returns the bytes written."""
        pieces = encode(*frames)
        length, written = sum(map(len, pieces)), 0
        try:
            written = os.writev(self.descriptor, pieces)
            while written < length:  # a signal may cut a write, and the system takes 1,024 pieces at once
                written += os.write(self.descriptor, b"".join(pieces)[written:])
        except OSError:
            if written:
                os.ftruncate(self.descriptor, self.size)
            raise
        self.size += written
        return written

    @property
    def removed(self) -> bool:
        """The file has been deleted: what is written to it is lost."""
        return os.fstat(self.descriptor).st_nlink == 0

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def read_header(path: Path) -> dict[str, Any]:
    """What the first frame tells of the file; empty when it is damaged.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
        try:
            _, code, length, checksum = _HEAD.unpack(head)
            payload = file.read(length)
            return json.loads(payload) if zlib.crc32(payload, code) == checksum else {}
        except (struct.error, ValueError):
            return {}


@dataclass
class WalReader:
    """Follows one file: `read` takes in what was appended since the last call.

    Args:
        path: of the file. opened: opens it where it is not a local one.
    """

    path: Path
    opened: Callable[[], Any] | None = None
    offset: int = 0
    damaged: int = 0  # bytes that are no valid frame, the tail excluded
    tail: int = 0  # bytes at the end that are no whole frame: one that is being written, or torn
    version: int | None = None  # as the header says; None until it is read, or when it is damaged
    tables: dict[str, list[pa.RecordBatch]] = field(default_factory=lambda: {name: [] for name in TABLES})

    @property
    def newer(self) -> bool:
        """A newer layerwatch wrote the file: nothing of it is read, and it must be left as it is."""
        return self.version is not None and self.version > SCHEMA_VERSION

    def read(self) -> bool:
        """Returns True when complete frames arrived. A missing file (already compacted) counts as no news.

        Raises:
            OSError: the file cannot be read.
        """
        try:
            with self.opened() if self.opened else self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return False
        position, news = 0, False
        while not self.newer and (frame := self._next_valid(data, position)) is not None:
            start, end = frame
            self.damaged += start - position
            position, news = end, True
        self.offset += position
        self.tail = 0 if self.newer else len(data) - position
        return news and not self.newer

    def _next_valid(self, data: bytes, position: int) -> tuple[int, int] | None:
        """Start and end of the next whole frame, which is taken in; what lies before it is damaged.

        None when there is no further whole frame: the rest may be a tail that is still being written.
        """
        start = data.find(MAGIC, position)
        while 0 <= start <= len(data) - _HEAD.size:
            _, code, length, checksum = _HEAD.unpack_from(data, start)
            end = start + _HEAD.size + length
            payload = data[start + _HEAD.size : end]
            if len(payload) == length and zlib.crc32(payload, code) == checksum and self._take(code, payload):
                return start, end
            start = data.find(MAGIC, start + 1)
        return None

    def _take(self, code: int, payload: bytes) -> bool:
        name = _NAMES.get(code)
        try:
            if name == "header":
                self.version = int(json.loads(payload)["schema_version"])
                return True
            found = list(self._group(payload)) if name == "group" else [self._rows(name, payload)]
        except (ValueError, KeyError, TypeError, OSError, struct.error, pa.ArrowException):
            return False
        for table, rows in found:
            self.tables[table].append(rows)
        return True

    def _group(self, payload: bytes) -> Iterator[tuple[str, pa.RecordBatch]]:
        position = 0
        while position < len(payload):
            code, length = _INNER.unpack_from(payload, position)
            position += _INNER.size + length
            yield self._rows(_NAMES[code], payload[position - length : position])

    def _rows(self, name: str | None, payload: bytes) -> tuple[str, pa.RecordBatch]:
        if name not in TABLES:
            raise ValueError(f"expected rows of {', '.join(TABLES)}, got {name}")
        # Without its header a file's rows tell the version: those of version 1 have fewer columns.
        schemas = {None: [TABLES[name], GIVEN[name]], 1: [GIVEN[name]]}.get(self.version, [TABLES[name]])
        for schema in schemas[:-1]:
            with contextlib.suppress(ValueError, OSError, pa.ArrowException):
                return name, _decode(name, payload, schema)
        return name, upgrade(_decode(name, payload, schemas[-1]), name)


def _decode(name: str, payload: bytes, schema: pa.Schema) -> pa.RecordBatch:
    if name in ("stats", "values"):
        return pa.ipc.read_record_batch(pa.py_buffer(payload), schema)
    columns = [list(c) for c in zip(*json.loads(payload), strict=True)]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
