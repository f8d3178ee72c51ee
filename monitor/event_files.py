"""TensorBoard's event files: records with checksums that hold protocol buffers of the `tensorboard` package.

A record is its length (uint64), a masked CRC-32C of these 8 bytes, the content, and its masked CRC-32C, all
little endian. The package reads records, too, but computes their checksums in Python, at 3 MB/s: here it only
decodes what they hold.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import RunError
from .kernels import crc32c

_HEAD = struct.Struct("<QI")
_CHECK = struct.Struct("<I")


def masked(data: bytes) -> int:
    """The checksum of the record format: CRC-32C (Castagnoli), rotated, plus a constant."""
    crc = int(crc32c(np.frombuffer(data, np.uint8)))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@dataclass
class EventFile:
    """One file; iterate over it for its `Event` messages, one in memory at a time."""

    path: Path
    problems: list[str] = field(default_factory=list)  # filled while it is read

    def __iter__(self) -> Iterator[Any]:
        decode, refused = _decoder()
        for position, data in self._records():
            try:
                yield decode(data)
            except refused:
                self.problems.append(f"{self.path.name}: no event at byte {position}, skipped")

    def _records(self) -> Iterator[tuple[int, bytes]]:
        """Position and content of each whole record; one that fails its checksum is skipped."""
        size, position = self.path.stat().st_size, 0
        with self.path.open("rb", buffering=1 << 20) as file:
            while head := file.read(_HEAD.size):
                if len(head) < _HEAD.size:
                    break
                length, check = _HEAD.unpack(head)
                if masked(head[:8]) != check:  # where the next record begins is not known any more
                    self.problems.append(
                        f"{self.path.name}: damaged at byte {position}, the rest is not read"
                    )
                    return
                following = position + _HEAD.size + length + _CHECK.size
                if following > size:
                    break
                data, (check,) = file.read(length), _CHECK.unpack(file.read(_CHECK.size))
                if masked(data) == check:
                    yield position, data
                else:
                    self.problems.append(f"{self.path.name}: damaged at byte {position}, skipped")
                position = following
        if position < size:
            self.problems.append(f"{self.path.name}: ends within a record, at byte {position}")


def _decoder() -> tuple[Any, type[Exception]]:
    """What makes an `Event` of bytes, and the error it raises for bytes that are none."""
    try:
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto import event_pb2
    except ModuleNotFoundError:
        raise RunError(
            "expected the tensorboard package to read its event files, but it is not installed: "
            "pip install 'layerwatch[tensorboard]'"
        ) from None
    return event_pb2.Event.FromString, DecodeError  # type: ignore[attr-defined]


def event_folders(logdir: Path) -> dict[Path, list[EventFile]]:
    """The folders at or below `logdir` that hold event files, and these by name, which is by age."""
    found: dict[Path, list[EventFile]] = {}
    for folder, below, names in os.walk(logdir):
        below.sort()
        files = [EventFile(Path(folder) / n) for n in sorted(names) if "tfevents" in n and n[0] != "."]
        if files := [f for f in files if f.path.stat().st_size]:
            found[Path(folder)] = files
    return found
