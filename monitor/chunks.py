"""Reading column chunks of a part: all that is asked for, checked, then decoded where it lies.

Parquet's reader can ask a Python file for every chunk, but each question costs as much as the decoding.
Here the bytes of all of them are read into their places in an empty memory of the file's size, of which only
what is written takes room. What was checked is what is decoded, whatever happens to the file meanwhile.
"""

from __future__ import annotations

import mmap
import sys
import zlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .parts import DamagedError

#: What lies between two chunks is read with them if it is no more than this (bytes).
GAP = 1 << 14
#: Linux: memory that is not written to is not counted.
_NORESERVE = 0x4000


def read_chunks(
    file: pa.NativeFile,
    footer: pq.FileMetaData,
    chunks: np.ndarray,
    groups: Sequence[int],
    columns: Sequence[str],
    encoded: Sequence[str],
) -> pa.Table:
    """Columns of some row groups.

    Args:
        chunks: `parts.chunk_table`, (row groups, columns). groups: numbers of row groups, ascending.
        columns: names of top-level columns. encoded: of these, the strings to read as dictionaries.

    Raises:
        DamagedError: the bytes are not those that were written.
        OSError: the file cannot be read, or there is no room for its size in the address space.
    """
    wanted = set(columns)
    places = [i for i in range(chunks.shape[1]) if footer.schema.column(i).path.split(".")[0] in wanted]
    asked = chunks[np.ix_(groups, places)].ravel()
    memory = _reserve(file.size())
    view = memoryview(memory)
    begins, ends = asked["offset"].astype(np.int64), (asked["offset"] + asked["length"]).astype(np.int64)
    if asked.size and int(ends.max()) > len(view):
        raise DamagedError("the file is shorter than its footer says")
    apart = np.flatnonzero(begins[1:] - ends[:-1] > GAP) + 1
    starts, stops = np.concatenate([[0], apart]), np.concatenate([apart, [asked.size]])
    for first, last in zip(starts, stops, strict=True) if asked.size else ():
        file.seek(int(begins[first]))
        file.readinto(view[int(begins[first]) : int(ends[last - 1])])
    for begin, end, checksum in zip(begins.tolist(), ends.tolist(), asked["checksum"].tolist(), strict=True):
        if zlib.crc32(view[begin:end]) != checksum:
            raise DamagedError(f"the checksum of its bytes {begin} to {end} is wrong")
    source = pa.BufferReader(pa.py_buffer(memory))
    reader = pq.ParquetFile(source, metadata=footer, read_dictionary=[n for n in encoded if n in wanted])
    return reader.read_row_groups(list(groups), columns=list(columns), use_threads=len(groups) > 8)


def _reserve(size: int) -> mmap.mmap:
    if sys.platform == "linux":
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    return mmap.mmap(-1, size)
