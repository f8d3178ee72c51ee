"""From a torch tensor to a summary: the hot path.

Everything is computed inline on the live tensor, one pass over memory, in the compiled kernels of
`monitor.kernels`. Half precision is widened to float32 first; complex tensors count by modulus; integers and
float8 by value.
"""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..monitor import kernels
from ..monitor.summary import Summary

Array = NDArray[np.floating]

_EMPTY = np.empty(0, np.float32)
_PLAIN = (torch.float32, torch.float64)


class _Scratch(threading.local):
    """Buffers that the kernels fill, one set per thread: compiled loops release the interpreter's lock."""

    def __init__(self) -> None:
        self.out = np.empty(8)
        self.narrow = np.zeros(2 * 1024, np.int64)  # always left cleared
        self.wide = np.zeros(2 * kernels.WIDE, np.int64)
        self.buckets = np.empty(2 * kernels.WIDE, np.int16)
        self.counts = np.empty(2 * kernels.WIDE, np.int64)


_scratch = _Scratch()


def array_of(tensor: Tensor) -> Array:
    """The tensor's values as a flat, contiguous numpy array on the host: float64 stays, everything else is
    float32.

    Shares memory with the tensor where it can. Sparse tensors give their coalesced values: the zeros between
    are the caller's to count.
    """
    data = tensor.detach()
    if data.dtype in _PLAIN and data.layout is torch.strided and data.device.type == "cpu":
        return data.reshape(-1).numpy()
    if data.is_sparse:
        data = data.coalesce().values()
    elif data.layout is not torch.strided:
        data = data.to_dense()
    if data.is_complex():
        data = data.abs()
    if data.dtype not in _PLAIN:
        data = data.to(torch.float64 if data.dtype in (torch.int32, torch.int64) else torch.float32)
    return data.cpu().reshape(-1).numpy()


def parts_of(tensor: Tensor) -> Array:
    """`array_of` for differences: of a complex tensor the real and imaginary parts, in turn."""
    return array_of(torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor)


def summarise_array(x: Array, **more: Any) -> Summary:
    """Summary of a flat float32 or float64 array; see `monitor.summary.summarise` for the plain definition.

    `more`: further fields of the summary.
    """
    if x.dtype == np.float64:
        kernels.summarise64(x, x.view(np.int64), _scratch.wide, _cleared())
    else:
        kernels.summarise32(x, x.view(np.int32), _scratch.narrow, _cleared())
    return _collect(x.size, x.dtype == np.float64, more)


def _cleared() -> Array:
    out = _scratch.out
    out[:] = 0.0
    out[2], out[3] = math.inf, -math.inf
    return out


def _collect(size: int, wide: bool, more: dict[str, Any]) -> Summary:
    """What a kernel has left in the buffers."""
    scratch = _scratch
    buckets, counts = scratch.buckets, scratch.counts
    if wide:
        used = kernels.take_buckets(scratch.wide, kernels.WIDE, 4, kernels.WIDE - 4, buckets, counts)
    else:
        used = kernels.take_buckets(scratch.narrow, 1024, 4, 1020, buckets, counts)
    total, total_sq, low, high, zeros, nans, pos_infs, neg_infs = scratch.out.tolist()
    kept = counts[:used].copy()
    others = int(zeros + nans + pos_infs + neg_infs)
    return Summary(
        count=size,
        sum=total,
        sum_sq=total_sq,
        min=low,
        max=high,
        zeros=int(zeros),
        subnormals=size - others - int(kept.sum()),
        nans=int(nans),
        pos_infs=int(pos_infs),
        neg_infs=int(neg_infs),
        buckets=buckets[:used].copy(),
        counts=kept,
        **more,
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
    active = np.zeros(gradient.shape[0], bool)
    kernels.active_rows(values.reshape(active.size, -1), active)
    return summarise_array(values, units=active.size, active=np.packbits(active).tobytes())


def summarise_activation(output: Tensor, unit_dim: int) -> Summary:
    """Summary of a module's output, and which units along `unit_dim` were nonzero for some sample."""
    if output.ndim < 2 or output.numel() == 0 or output.is_sparse:
        return replace(summarise_tensor(output), samples=output.shape[0] if output.ndim else 1)
    values = array_of(output)
    units = output.shape[unit_dim]
    active = np.zeros(units, bool)
    if unit_dim in (-1, output.ndim - 1):
        kernels.active_columns(values.reshape(-1, units), active)
    else:
        for sample in values.reshape(output.shape[0], units, -1):
            kernels.active_rows(sample, active)
    samples = output.numel() // units
    return summarise_array(values, samples=samples, units=units, active=np.packbits(active).tobytes())


def summarise_update(before: Array, weight: Tensor, gradient: Tensor | None) -> Summary:
    """Summary of weight - before with |before|^2, <before, update> and the number of updates lost to
    rounding.

    Args:
        before: the flat copy that `parts_of` made before the step. weight: the parameter now.
        gradient: as the optimizer used it; without one nothing is counted as lost.
    """
    after = parts_of(weight)
    dense = gradient is not None and not gradient.is_sparse and not gradient.is_complex()
    used = array_of(gradient) if dense and gradient is not None else _EMPTY
    if used.size != after.size:
        used = _EMPTY
    used, pair = used.astype(after.dtype, copy=False), np.empty(3)
    if after.dtype == np.float32 and not weight.is_complex():
        kernels.update32(before, after, used, _scratch.narrow, _cleared(), pair)
        summary = _collect(after.size, False, {})
    else:
        difference = np.empty_like(after)
        kernels.update_pair(before, after, used, difference, pair)
        if weight.is_complex():
            difference = np.hypot(difference[::2], difference[1::2])
        summary = summarise_array(difference)
    lost = int(pair[2]) if used.size else None
    return replace(summary, dot=float(pair[0]), ref_sum_sq=float(pair[1]), lost=lost)


def warm_up() -> None:
    """Compile, or load from the cache, before the first step is timed."""
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(2, 2, dtype=dtype)
        summarise_gradient(x, rows=True)
        summarise_activation(x, -1)
        summarise_update(array_of(x), x, x)
        kernels.drift32(array_of(x), array_of(x), np.empty(4))
    kernels.drift_bf16(np.ones(2, np.float32), np.ones(2, np.int16), np.empty(4))
