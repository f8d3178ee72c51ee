"""The tensors of a capture that lie plainly in the host's memory: all of them in one compiled sweep.

What does not (other devices, layouts and element types) takes the routes of `device` and `statistics`.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..monitor import sweep
from .rows import Block

_TYPES = {
    torch.float32: sweep.FLOAT32,
    torch.bfloat16: sweep.BFLOAT16,
    torch.float16: sweep.FLOAT16,
}


_OWNERS = {nn.Parameter, Tensor}  # subclasses may keep their elements anywhere


def plain(tensor: Tensor) -> bool:
    """Its elements can be read by address: on the host, of a known type, in some order without gaps."""
    if tensor.dtype not in _TYPES or type(tensor) not in _OWNERS or not tensor.is_cpu:
        return False
    return tensor.layout is torch.strided and (tensor.is_contiguous() or _channels_last(tensor))


def _channels_last(tensor: Tensor) -> bool:
    if tensor.ndim == 4:
        return tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.ndim == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d)


def like(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient with its elements in the weight's order."""
    if gradient.stride() == weight.stride() or gradient.numel() < 2:
        return gradient
    return torch.empty_strided(weight.shape, weight.stride(), dtype=gradient.dtype).copy_(gradient)


@dataclass(slots=True)
class Job:
    """What is asked about one tensor. All tensors are `plain` and in the weight's order of elements."""

    name: str
    count: int
    gradient: Tensor | None = None
    weight: Tensor | None = None
    before: int = 0  # address of the copy, 0 without
    reference: Tensor | None = None
    residual: float | None = None
    units: int = 0  # rows of the gradient whose activity is recorded
    gradient_row: bool = False  # else the gradient tells only which updates were lost


class Sweeper:
    """Runs `monitor.sweep` over jobs."""

    def __init__(self) -> None:
        self._buffers = sweep.Buffers()
        self._room = 1 << 16

    def run(self, jobs: Sequence[Job]) -> Block:
        """The rows of all jobs, none of them decided yet."""
        table = np.zeros((len(jobs), sweep.JOB), np.int64)
        asked = np.array(
            [(j.gradient_row, j.weight is not None, j.before != 0, j.reference is not None) for j in jobs],
            bool,
        ).reshape(len(jobs), 4)
        rows = np.where(asked, np.cumsum(asked).reshape(asked.shape) - 1, -1)
        table[:, sweep.GRADIENT_ROW : sweep.DRIFT_ROW + 1] = rows
        bits = [j.units + 7 >> 3 for j in jobs]
        places = np.cumsum([0, *bits])
        columns = {
            sweep.COUNT: [j.count for j in jobs],
            sweep.WEIGHT: [_address(j.weight) for j in jobs],
            sweep.WEIGHT_TYPE: [_type(j.weight) for j in jobs],
            sweep.BEFORE: [j.before for j in jobs],
            sweep.GRADIENT: [_address(j.gradient) for j in jobs],
            sweep.GRADIENT_TYPE: [_type(j.gradient) for j in jobs],
            sweep.REFERENCE: [_address(j.reference) for j in jobs],
            sweep.REFERENCE_TYPE: [_type(j.reference) for j in jobs],
            sweep.UNITS: [j.units for j in jobs],
            sweep.ACTIVE_AT: places[:-1],
        }
        for place, values in columns.items():
            table[:, place] = values
        size = int(asked.sum())
        numbers, counters = np.zeros((size, sweep.NUMBERS)), np.zeros((size, sweep.COUNTERS), np.int64)
        active = np.zeros(int(places[-1]), np.uint8)
        buckets, counts = self._sweep(table, numbers, counters, active)
        return Block(
            names=[j.name for j in jobs],
            counts=table[:, sweep.COUNT],
            rows=rows,
            numbers=numbers,
            counters=counters,
            buckets=buckets,
            bucket_counts=counts,
            residuals=np.array([np.nan if j.residual is None else j.residual for j in jobs], np.float64),
            lost_known=table[:, sweep.GRADIENT] != 0,
            units=[j.units for j in jobs],
            active=[
                active[a : a + n].tobytes() if n else None
                for a, n in zip(places.tolist(), bits, strict=False)
            ],
        )

    def _sweep(
        self, table: np.ndarray, numbers: np.ndarray, counters: np.ndarray, active: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        done = end = 0
        own = self._buffers
        buckets, counts = np.empty(self._room, np.int16), np.empty(self._room, np.int64)
        while done < len(table):
            done, end = sweep.sweep(
                table, done, numbers, counters, buckets, counts, end, active,
                own.scratch, own.index, own.histograms, own.pairs, own.edges, own.memory,
            )  # fmt: skip
            if done < len(table):
                self._room *= 2
                buckets = np.concatenate([buckets, np.empty_like(buckets)])
                counts = np.concatenate([counts, np.empty_like(counts)])
        return buckets[:end], counts[:end]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _type(tensor: Tensor | None) -> int:
    return 0 if tensor is None else _TYPES[tensor.dtype]


class Copies:
    """Copies of weights for the time of a step, in one piece of memory.

    The memory is kept between steps that are close to each other and given back otherwise: `release`.
    """

    def __init__(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._free = np.empty(0, np.uint8)
        self._addresses: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._addresses

    def take(self, names: Sequence[str], weights: Sequence[Tensor], expected: int) -> None:
        """Copy these. `expected`: bytes of all tensors: the first piece has room for those that follow."""
        sizes = np.array([w.nbytes for w in weights], np.int64)
        places = np.concatenate([[0], np.cumsum((sizes + 63) // 64 * 64)])
        need = int(places[-1])
        if need > self._free.size:
            self._free = _memory(max(need, expected))
            self._pieces.append(self._free)
        start = self._free.ctypes.data
        targets = start + places[:-1]
        sweep.copy_all(np.array([w.data_ptr() for w in weights], np.int64), targets, sizes)
        self._addresses.update(zip(names, targets.tolist(), strict=True))
        self._free = self._free[need:]

    def address(self, name: str) -> int:
        """Where the copy lies; 0 when there is none."""
        return self._addresses.get(name, 0)

    def clear(self) -> None:
        """The step is over: what was copied is not needed any more."""
        self._addresses.clear()
        self._pieces = self._pieces[-1:]
        self._free = self._pieces[0] if self._pieces else self._free

    def release(self) -> None:
        """Give the memory back."""
        self.clear()
        self._pieces, self._free = [], np.empty(0, np.uint8)


def _memory(size: int) -> np.ndarray:
    """Fresh memory, in large pages where there are any: faults of small ones cost more than the copy."""
    memory = mmap.mmap(-1, max(size, 1))
    with contextlib.suppress(AttributeError, OSError, ValueError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
