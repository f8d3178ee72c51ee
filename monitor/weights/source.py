"""Weights as they lie in files and state_dicts: names, shapes, types, and elements read a block at a time.

Nothing here holds a whole tensor: a reader asks for elements start to stop. Files are read, not mapped: a
file that is cut short while it is read gives an error, where a mapping would end the process, and blocks
that were read take no more memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import WeightsError

#: Elements that are read at once: 4 MiB of float32, small enough for a processor's cache to help.
BLOCK = 1 << 20

#: How the elements of each type are held in numpy. What numpy has no type for is held as unsigned integers
#: of the same size.
STORAGE: dict[str, np.dtype] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float8_e4m3fn": np.dtype("u1"),
    "float8_e5m2": np.dtype("u1"),
    "complex64": np.dtype("<f4"),  # real and imaginary parts in turn
    "complex128": np.dtype("<f8"),
    **{f"int{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"uint{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    "bool": np.dtype("?"),
}  # fmt: skip
FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
COMPLEX = ("complex64", "complex128")


@dataclass(frozen=True)
class Entry:
    """One stored tensor.

    Attributes:
        name: as it is stored, wrappers' prefixes included.
        shape: (), or the sizes of its dimensions. dtype: a key of `STORAGE`, or what the file calls it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def numbers(self) -> int:
        """Numbers to read: two for each complex element."""
        return self.elements * (2 if self.dtype in COMPLEX else 1)

    @property
    def is_float(self) -> bool:
        """Its elements are real or complex numbers, not integers, packed codes or flags."""
        return self.dtype in FLOATS or self.dtype in COMPLEX

    @property
    def nbytes(self) -> int:
        """Bytes in the file; 0 of an unknown type."""
        return self.numbers * STORAGE[self.dtype].itemsize if self.dtype in STORAGE else 0


@dataclass
class Weights(ABC):
    """The tensors of one model at one moment, wherever they are stored.

    Attributes:
        label: how it is called in what is printed, such as its path.
        entries: stored name -> what it is, in stored order. All of them can be read.
        problems: tensor or file -> why it cannot be read. The others can.
        metadata: what the file says of itself.
    """

    label: str
    entries: dict[str, Entry] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    #: Values come from a computation: there is nothing `stored`.
    computed: ClassVar[bool] = False

    @abstractmethod
    def stored(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Elements start to stop of the flattened tensor (row-major), as they are stored: (stop - start,) of
        `STORAGE[dtype]`. Of complex tensors start and stop count numbers, not pairs. Thread-safe.

        Raises:
            WeightsError: the file has become shorter or unreadable.
        """

    def values(self, name: str, start: int, stop: int) -> NDArray[np.floating]:
        """The same as numbers: float64 of float64 and of integers from 32 bits on, else float32: exact."""
        return decoded(self.stored(name, start, stop), self.entries[name].dtype)

    def blocks(self, name: str, size: int = BLOCK) -> Iterator[NDArray[np.floating]]:
        """The whole tensor as `values` of `size` numbers each; one empty block of an empty tensor."""
        numbers = self.entries[name].numbers
        for start in range(0, max(numbers, 1), size):
            yield self.values(name, start, min(start + size, numbers))

    def rows(self, name: str, most: int = BLOCK) -> Iterator[tuple[int, NDArray[np.floating]]]:
        """The tensor as matrices of whole rows (n, shape[1] * shape[2] ...), each of at most `most` numbers
        or one row; with the place of its first row. Of a complex tensor twice as many columns."""
        entry = self.entries[name]
        count = entry.shape[0] if entry.shape else 1
        width = entry.numbers // max(count, 1)
        step = max(1, most // max(width, 1))
        for first in range(0, count, step):
            last = min(first + step, count)
            yield first, self.values(name, first * width, last * width).reshape(last - first, width)

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """Close what is open."""

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ArrayWeights(Weights):
    """A mapping of names to numpy arrays."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], label: str = "arrays") -> None:
        super().__init__(label)
        self._arrays: dict[str, NDArray[Any]] = {}
        for name, array in arrays.items():
            array = np.asarray(array)
            kind = array.dtype.newbyteorder("=").name
            if kind not in STORAGE:
                self.problems[name] = f"elements of type {kind} are no numbers that can be compared"
                continue
            self.entries[name] = Entry(name, array.shape, kind)
            flat = np.ascontiguousarray(array).reshape(-1)
            self._arrays[name] = flat.view(flat.real.dtype).astype(STORAGE[kind], copy=False)

    def stored(self, name: str, start: int, stop: int) -> NDArray[Any]:
        return self._arrays[name][start:stop]


def decoded(stored: NDArray[Any], dtype: str) -> NDArray[np.floating]:
    """What stored elements mean, exactly: float32, or float64 where float32 does not hold them.

    >>> decoded(np.array([0x3F80, 0xC000], np.uint16), "bfloat16").tolist()
    [1.0, -2.0]
    """
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype in ("float8_e4m3fn", "float8_e5m2"):
        return _FLOAT8[dtype][stored]
    if dtype in ("float32", "complex64", "float64", "complex128"):
        return stored
    wide = dtype in ("int32", "int64", "uint32", "uint64")
    if dtype not in STORAGE:
        raise WeightsError(f"expected elements of a type among {', '.join(STORAGE)}, got {dtype}")
    return stored.astype(np.float64 if wide else np.float32)


def _float8(exponent_bits: int, bias: int, infinities: bool) -> NDArray[np.float32]:
    """All 256 values of an 8-bit float (Micikevicius et al. 2022, FP8 formats for deep learning).

    e4m3fn has no infinities: only its all-ones codes are NaN; e5m2 follows IEEE 754.
    """
    codes = np.arange(128)
    mantissa_bits = 7 - exponent_bits
    exponent, mantissa = codes >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    share = mantissa / (1 << mantissa_bits)
    found = np.where(exponent > 0, np.ldexp(1 + share, exponent - bias), np.ldexp(share, 1 - bias))
    if infinities:
        top = exponent == (1 << exponent_bits) - 1
        found = np.where(top, np.where(mantissa == 0, np.inf, np.nan), found)
    else:
        found[-1] = np.nan
    return np.concatenate([found, -found]).astype(np.float32)


_FLOAT8 = {"float8_e4m3fn": _float8(4, 7, False), "float8_e5m2": _float8(5, 15, True)}
