"""Files of the safetensors format, read without mapping them and without the package.

The format (https://huggingface.co/docs/safetensors): 8 bytes, little endian: the size of the header; the
header, JSON: name -> dtype, shape, data_offsets (begin, end) into the rest of the file; `__metadata__`.
The package's own numpy reader knows no bfloat16 and no float8, and refuses a truncated file as a whole.
"""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import WeightsError
from .source import STORAGE, Entry, Weights

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "C64": "complex64", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
#: A header beyond this size is refused, as the package does.
_LARGEST_HEADER = 100_000_000


class SafetensorsFile(Weights):
    """One .safetensors file.

    Raises:
        WeightsError: it is no file of this format, or its header is damaged. A file that is cut short behind
            the header is opened: `problems` lists the tensors that it no longer holds.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(str(path))
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self._file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise WeightsError(
                f"expected a .safetensors file, but {path} cannot be opened: {error.strerror or error}"
            ) from None
        try:
            self._place: dict[str, int] = {}
            self._take(self._header())
        except BaseException:
            self._file.close()
            raise

    def _header(self) -> dict[str, Any]:
        self._size = self.path.stat().st_size
        head = self._file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= _LARGEST_HEADER:
            self._refuse("it does not begin with the size of a header")
        if length + 8 > self._size:
            self._refuse(f"it ends within its header, after {self._size} of at least {length + 8} bytes")
        self._data = 8 + length
        try:
            header = json.loads(self._file.read(length))
        except ValueError:
            header = None
        if not isinstance(header, dict):
            self._refuse("its header is no JSON object")
        return header

    def _take(self, header: dict[str, Any]) -> None:
        self.metadata = header.pop("__metadata__", None) or {}
        for name, found in header.items():
            try:
                shape = tuple(int(n) for n in found["shape"])
                begin, end = (int(n) for n in found["data_offsets"])
                kind = str(found["dtype"])
            except (TypeError, KeyError, ValueError):
                self.problems[name] = "its entry in the header is damaged"
                continue
            entry = Entry(name, shape, DTYPES.get(kind, kind))
            if entry.dtype not in STORAGE:
                self.problems[name] = f"packed elements of type {kind} cannot be read one by one"
            elif end - begin != entry.nbytes or begin < 0 or any(n < 0 for n in shape):
                self.problems[name] = (
                    f"its entry in the header is damaged: {end - begin} bytes for {math.prod(shape)} {kind}"
                )
            elif self._data + end > self._size:
                self.problems[name] = (
                    f"the file is cut short: it has {self._size} bytes, the tensor ends at {self._data + end}"
                )
            else:
                self.entries[name] = entry
                self._place[name] = self._data + begin

    def _refuse(self, why: str) -> None:
        raise WeightsError(
            f"expected a .safetensors file, but {self.path} is damaged or of another format: {why}. "
            "Download or save it again"
        )

    def stored(self, name: str, start: int, stop: int) -> NDArray[Any]:
        kind = STORAGE[self.entries[name].dtype]
        found = np.empty(stop - start, kind)
        view = memoryview(found).cast("B") if len(found) else memoryview(b"")
        with self._lock:
            try:
                self._file.seek(self._place[name] + start * kind.itemsize)
                done = 0
                while done < len(view):
                    count = self._file.readinto(view[done:])
                    if not count:
                        break
                    done += count
            except (OSError, ValueError) as error:
                raise WeightsError(f"{self.path} cannot be read any more: {error}") from None
        if done < len(view):
            raise WeightsError(f"{self.path} has become shorter while it was read: {name} is not whole")
        return found

    def close(self) -> None:
        self._file.close()
