"""Files that torch.save wrote, read a block at a time and without mapping them.

A training writes its checkpoints again and again, often to the same name. Whoever maps such a file is killed
when it becomes shorter (SIGBUS); whoever reads it gets an error. So inside of a training files are read.
"""

from __future__ import annotations

import os
import weakref
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..monitor.errors import WeightsError
from ..monitor.weights import STORAGE, Entry, Weights
from .checkpoint import load_state, unreadable
from .shards import is_sharded


class TorchFile(Weights):
    """A .pt, .pth, .bin or .ckpt file of torch's zip format, the usual one since torch 1.6.

    torch.load, with weights_only=True, tells where each tensor's elements lie in the file, and reads none.

    Raises:
        WeightsError: the file is damaged, of an older format, asks to run code, or holds no tensors.
    """

    def __init__(self, path: str | Path, label: str | None = None) -> None:
        super().__init__(label or str(path))
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise WeightsError(f"{self.label} cannot be opened: {error.strerror or error}") from None
        self._closing = weakref.finalize(self, os.close, self._file)
        try:
            tensors = self._tensors()
        except BaseException:
            self.close()
            raise
        self._places: dict[str, _Place] = {}
        self._gathered: tuple[str, NDArray[Any]] | None = None
        for name, tensor in tensors.items():
            kind = str(tensor.dtype).removeprefix("torch.")
            if why := _unreadable(tensor, kind):
                self.problems[name] = why
            else:
                self.entries[name] = Entry(name, tuple(tensor.shape), kind)
                self._places[name] = _Place(tensor)

    def _tensors(self) -> dict[str, Tensor]:
        """Without data, on device meta."""
        try:
            with open(self._file, "rb", closefd=False) as file:
                if not zipfile.is_zipfile(file):
                    raise ValueError("it is not of torch's zip format")
                file.seek(0)
                state = torch.load(file, map_location="meta", weights_only=True)
            return dict(load_state(state, names=str).tensors)
        except Exception as error:  # every kind of damage has its own type of error
            raise WeightsError(unreadable(self.label, error)) from None

    def stored(self, name: str, start: int, stop: int) -> NDArray[Any]:
        place, kind = self._places[name], STORAGE[self.entries[name].dtype]
        if place.contiguous:
            data = self._read(place.first + start * kind.itemsize, (stop - start) * kind.itemsize)
            return np.frombuffer(data, kind)
        if self._gathered is None or self._gathered[0] != name:
            elements = np.frombuffer(self._read(place.first, place.span), f"V{place.itemsize}")
            whole = np.lib.stride_tricks.as_strided(elements, self.entries[name].shape, place.strides)
            self._gathered = name, np.ascontiguousarray(whole).reshape(-1).view(kind)
        return self._gathered[1][start:stop]

    def _read(self, place: int, size: int) -> bytes:
        parts = []
        while size:
            try:
                parts.append(os.pread(self._file, size, place))
            except OSError as error:
                raise WeightsError(f"{self.label} cannot be read any more: {error.strerror}") from None
            if not parts[-1]:
                raise WeightsError(f"{self.label} has become shorter while it was read")
            place, size = place + len(parts[-1]), size - len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        self._closing()


class _Place:
    """Where a tensor's elements lie: bytes from the begin of the file."""

    def __init__(self, tensor: Tensor) -> None:
        self.itemsize = tensor.element_size()
        begin: int = tensor.untyped_storage()._checkpoint_offset  # type: ignore[attr-defined]
        self.first = begin + tensor.storage_offset() * self.itemsize
        self.strides = tuple(n * self.itemsize for n in tensor.stride())
        reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, self.strides, strict=True))
        self.span = reach + self.itemsize if tensor.numel() else 0
        self.contiguous = tensor.is_contiguous()


def packed(tensor: Tensor, kind: str) -> str:
    """Why its elements cannot be read one by one; "" if they can."""
    if is_sharded(tensor):
        return "it is one rank's part of a sharded tensor: gather the full state_dict first"
    if tensor.layout is not torch.strided or tensor.is_quantized or kind not in STORAGE:
        return f"packed elements of type {kind} ({tensor.layout}) cannot be read one by one"
    return ""


def _unreadable(tensor: Tensor, kind: str) -> str:
    if why := packed(tensor, kind):
        return why
    if tensor.is_conj() or tensor.is_neg():
        return "it is stored as the conjugate or the negative of what it means"
    if not hasattr(tensor.untyped_storage(), "_checkpoint_offset"):
        return "where its elements lie is unknown: it has none, or torch is too old to tell (before 2.6)"
    return ""
