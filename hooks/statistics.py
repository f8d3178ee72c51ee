"""From a torch tensor to a summary: the hot path.

Everything is computed inline on the live tensor, one pass over memory: float32 in a compiled sweep of one
tensor, double precision in numpy (`monitor.plain`). Half precision is widened to float32 first; complex
tensors count by modulus; integers and float8 by value.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..monitor import kernels, plain, sweep
from ..monitor.summary import Summary

Array = NDArray[np.floating]

_NO_BITS = np.empty(0, np.uint8)
_PLAIN = (torch.float32, torch.float64)


class _Scratch(threading.local):
    """Buffers that the kernels fill, one set per thread: compiled loops release the interpreter's lock."""

    def __init__(self) -> None:
        self.buckets = np.empty(sweep.ROOM, np.int16)
        self.counts = np.empty(sweep.ROOM, np.int64)
        self.sweep = sweep.Buffers()
        self.job = np.zeros((1, sweep.JOB), np.int64)
        self.job[:, sweep.WEIGHT_ROW : sweep.DRIFT_ROW + 1] = -1
        self.numbers = np.empty((1, sweep.NUMBERS))
        self.counters = np.empty((1, sweep.COUNTERS), np.int64)


_scratch = _Scratch()


def array_of(tensor: Tensor) -> Array:
    """The tensor's values as a flat, contiguous numpy array on the host: float64 stays, everything else is
    float32.

    Shares memory with the tensor where it can. Sparse tensors give their coalesced values: the zeros between
    are the caller's to count.
    """
    data = tensor.detach()
    if data.dtype in _PLAIN and data.layout is torch.strided and data.device.type == "cpu":
        return data.reshape(-1).contiguous().numpy()
    if data.is_sparse:
        data = data.coalesce().values()
    elif data.layout is not torch.strided:
        data = data.to_dense()
    if data.is_complex():
        data = data.abs()
    if data.dtype not in _PLAIN:
        data = data.to(torch.float64 if data.dtype in (torch.int32, torch.int64) else torch.float32)
    return data.cpu().reshape(-1).contiguous().numpy()


def parts_of(tensor: Tensor) -> Array:
    """`array_of` for differences: of a complex tensor the real and imaginary parts, in turn."""
    return array_of(torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor)


def summarise_array(x: Array, **more: Any) -> Summary:
    """Summary of a flat float32 or float64 array; see `monitor.summary.summarise` for the plain definition.

    `more`: further fields of the summary.
    """
    fast = x.dtype == np.float32 and kernels.available()
    summary = _single(x) if fast else plain.summarise(x)
    return replace(summary, **more) if more else summary


def _single(x: Array) -> Summary:
    own = _scratch
    own.job[0, sweep.COUNT], own.job[0, sweep.GRADIENT] = x.size, x.ctypes.data
    own.numbers[:], own.counters[:] = 0.0, 0
    buffers = own.sweep
    sweep.sweep(
        own.job, 0, own.numbers, own.counters, own.buckets, own.counts, 0, _NO_BITS,
        buffers.scratch, buffers.index, buffers.histograms, buffers.pairs, buffers.edges, buffers.memory,
    )  # fmt: skip
    total, squares, low, high = own.numbers[0, : sweep.MAX + 1].tolist()
    zeros, subnormals, nans, pos_infs, neg_infs, _, _, end = own.counters[0].tolist()
    return Summary(
        count=x.size,
        sum=total,
        sum_sq=squares,
        min=low,
        max=high,
        zeros=zeros,
        subnormals=subnormals,
        nans=nans,
        pos_infs=pos_infs,
        neg_infs=neg_infs,
        buckets=own.buckets[:end].copy(),
        counts=own.counts[:end].copy(),
    )


def summarise_tensor(tensor: Tensor) -> Summary:
    """Summary of a tensor of any dtype and layout; implied zeros of a sparse tensor are counted."""
    summary = summarise_array(array_of(tensor))
    implied = tensor.numel() - summary.count
    if implied > 0:
        low, high = min(summary.min, 0.0), max(summary.max, 0.0)
        summary = replace(summary, count=tensor.numel(), zeros=summary.zeros + implied, min=low, max=high)
    return summary


def summarise_gradient(gradient: Tensor, *, rows: bool) -> Summary:
    """Summary of a gradient; with `rows` also which output units (rows of a matrix) got any gradient."""
    if not rows or gradient.ndim < 2 or gradient.is_sparse or gradient.numel() == 0:
        return summarise_tensor(gradient)
    values = array_of(gradient)
    active = (values.reshape(gradient.shape[0], -1) != 0).any(1)
    return summarise_array(values, units=active.size, active=np.packbits(active).tobytes())


def summarise_update(before: Array, weight: Tensor, gradient: Tensor | None) -> Summary:
    """Summary of weight - before with |before|^2, <before, update> and the number of updates lost to
    rounding.

    Args:
        before: the flat copy that `parts_of` made before the step. weight: the parameter now.
        gradient: as the optimizer used it; without one nothing is counted as lost.
    """
    after = parts_of(weight)
    dense = gradient is not None and not gradient.is_sparse and not gradient.is_complex()
    used = array_of(gradient) if dense and gradient is not None else None
    if used is not None and used.size != after.size:
        used = None
    difference, dot, squares, lost = plain.change(before, after, used)
    if weight.is_complex():
        difference = np.hypot(difference[::2], difference[1::2])
    summary = summarise_array(difference)
    return replace(summary, dot=dot, ref_sum_sq=squares, lost=lost)


def warm_up() -> None:
    """Compile, or load from the cache, before the first step is timed; or find that it cannot be."""
    nothing = np.empty(0, np.int64)
    with contextlib.suppress(RuntimeError):  # it is logged, and numpy takes over
        sweep.copy_all(nothing, nothing, nothing)
        _single(np.ones(2, np.float32))
