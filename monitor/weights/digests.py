"""SHA-256 of weight files, of single tensors, and of a set of tensors whatever file holds it."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from io import RawIOBase
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import WeightsError
from .names import canonical
from .opening import NAMES, SUFFIXES
from .source import BLOCK, Entry, Weights

_BUFFER = 1 << 20
#: A folder of other formats with more files than this is taken for something else than a checkpoint.
MOST_FILES = 256


class FileDigest(NamedTuple):
    """One file: name, size in bytes, SHA-256 of its content (64 hexadecimal digits)."""

    name: str
    size: int
    sha256: str


class TensorDigest(NamedTuple):
    """One tensor: what it is, and `sha256_of_tensor`."""

    entry: Entry
    sha256: str

    def __str__(self) -> str:
        """`float32 384,384 e3b0...`: type, shape, digest."""
        return f"{self.entry.dtype} {','.join(map(str, self.entry.shape))} {self.sha256}"


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights at a path: it; with the index of a sharded checkpoint its shards; of a
    folder the weights in it by the names that Hugging Face and diffusers give, else every weight file, else
    (other formats) every file below it. What is missing is left out.

    Raises:
        OSError: there are more than `MOST_FILES` of these.
    """
    if path.is_dir():
        named = next((path / name for name in NAMES if (path / name).is_file()), None)
        if named is not None:
            return weight_files(named)
        own = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
        return own or _all_below(path)
    if not path.name.endswith(".index.json"):
        return [path] if path.is_file() else []
    try:
        shards = {str(file) for file in json.loads(path.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        shards = set()
    return [p for p in (path, *(path.parent / name for name in sorted(shards))) if p.is_file()]


def name_in(path: Path, file: Path) -> str:
    """What a file of the checkpoint at `path` is called in it."""
    return file.relative_to(path if path.is_dir() else file.parent).as_posix()


def _all_below(path: Path) -> list[Path]:
    found = sorted(islice((p for p in path.rglob("*") if p.is_file()), MOST_FILES + 1))
    if len(found) > MOST_FILES:
        raise OSError(
            errno.E2BIG,
            f"expected a checkpoint of at most {MOST_FILES} files, but {path} holds more, none named like "
            "a weight file: give the file itself",
        )
    return found


def sha256_of_file(file: RawIOBase, stop: Callable[[], bool] = lambda: False) -> tuple[str, int]:
    """SHA-256 of the rest of an open file, and how many bytes that are.

    Args:
        stop: asked after every megabyte.

    Raises:
        InterruptedError: `stop` said so.
    """
    found, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_BUFFER))
    while count := file.readinto(buffer):
        found.update(buffer[:count])
        size += count
        if stop():
            raise InterruptedError
    return found.hexdigest(), size


def sha256_of_files(files: Sequence[FileDigest]) -> str:
    """One digest for all files of a checkpoint: of one file its own; of several the SHA-256 of the lines that
    `sha256sum` prints of them (digest, two spaces, name, newline), in the order of their names."""
    if len(files) == 1:
        return files[0].sha256
    lines = (f"{file.sha256}  {file.name}\n" for file in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sha256_of_tensor(weights: Weights, name: str, stop: Callable[[], bool] = lambda: False) -> str:
    """SHA-256 of a tensor's type and shape (`float32 384,384` and a newline) and of its elements as bytes,
    row-major and little endian: the same whatever file holds it.

    Raises:
        WeightsError: it cannot be read any more. InterruptedError: `stop` said so.
    """
    entry = weights.entries[name]
    found = hashlib.sha256(f"{entry.dtype} {','.join(map(str, entry.shape))}\n".encode())
    for start in range(0, entry.numbers, BLOCK):
        block = weights.stored(name, start, min(start + BLOCK, entry.numbers))
        found.update(memoryview(np.ascontiguousarray(block)).cast("B"))
        if stop():
            raise InterruptedError
    return found.hexdigest()


def digests_of(
    weights: Weights, stop: Callable[[], bool] = lambda: False
) -> tuple[dict[str, TensorDigest], dict[str, str]]:
    """Stored name -> digest of every tensor, and those (or files) that cannot be read: why.

    Raises:
        InterruptedError: `stop` said so.
    """
    digests, problems = {}, dict(weights.problems)
    for name, entry in weights.entries.items():
        try:
            digests[name] = TensorDigest(entry, sha256_of_tensor(weights, name, stop))
        except WeightsError as error:
            problems[name] = str(error)
    return digests, problems


def sha256_of_set(tensors: Mapping[str, TensorDigest]) -> str:
    """One digest for all tensors: the SHA-256 of the lines `digest  name` in the order of the names, without
    what wrappers add to them. It is the same in every container, sharded or not."""
    lines = sorted((canonical(name), digest.sha256) for name, digest in tensors.items())
    return hashlib.sha256("".join(f"{sha256}  {name}\n" for name, sha256 in lines).encode()).hexdigest()
