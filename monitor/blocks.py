"""Parts on an object store are read in large blocks that stay in memory: round trips are what costs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import pyarrow as pa

#: Bytes of a block, and of all blocks that are kept in this process.
BLOCK, KEPT = 1 << 20, 192 << 20


class Blocks:
    """The blocks that were read last, of all files. Thread-safe."""

    def __init__(self, limit: int = KEPT) -> None:
        self._limit, self._bytes = limit, 0
        self._lock = threading.Lock()
        self._blocks: OrderedDict[tuple[Hashable, int], bytes] = OrderedDict()

    def get(self, file: Hashable, index: int) -> bytes | None:
        with self._lock:
            found = self._blocks.get((file, index))
            if found is not None:
                self._blocks.move_to_end((file, index))
            return found

    def put(self, file: Hashable, index: int, content: bytes) -> None:
        with self._lock:
            self._bytes += len(content) - len(self._blocks.pop((file, index), b""))
            self._blocks[file, index] = content
            while self._bytes > self._limit:
                self._bytes -= len(self._blocks.popitem(last=False)[1])


class BlockFile:
    """A file that never changes, for `pyarrow.PythonFile`.

    Args:
        file: identifies its content. size: its bytes. connect: opens it; asked for when a block is missing.
        blocks: where they are kept.
    """

    def __init__(
        self, file: Hashable, size: int, connect: Callable[[], pa.NativeFile], blocks: Blocks
    ) -> None:
        self._file, self._size, self._connect, self._blocks = file, size, connect, blocks
        self._position = 0
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        start = self._position
        end = self._size if size < 0 else min(start + size, self._size)
        if end <= start:
            return b""
        self._position = end
        first = start // BLOCK
        content = b"".join(self._taken(first, (end - 1) // BLOCK + 1))
        return content[start - first * BLOCK : end - first * BLOCK]

    def _taken(self, first: int, stop: int) -> list[bytes]:
        """Blocks `first` to `stop`; from the first missing one to the last in one request."""
        found = [self._blocks.get(self._file, index) for index in range(first, stop)]
        missing = [place for place, block in enumerate(found) if block is None]
        if missing:
            low, high = missing[0], missing[-1] + 1
            begin, end = (first + low) * BLOCK, min((first + high) * BLOCK, self._size)
            content = self._connect().read_at(end - begin, begin)
            if len(content) < end - begin:
                raise OSError(f"expected {end - begin} bytes from {begin} on, got {len(content)}")
            for place in range(low, high):
                block = content[(place - low) * BLOCK : (place - low + 1) * BLOCK]
                found[place] = block
                self._blocks.put(self._file, first + place, block)
        return [block for block in found if block is not None]

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self.closed = True

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
