"""From a torch tensor to a summary: the hot path.

Everything is computed inline on the live tensor, one pass over memory, in the compiled kernels of
`monitor.kernels`. Half precision is widened to float32 first; complex tensors count by modulus; integers and
float8 by value.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..monitor import kernels
from ..monitor.summary import Summary

Array = NDArray[np.floating]

_EMPTY = np.empty(0, np.float32)
_START = np.array([0.0, 0.0, math.inf, -math.inf, 0.0, 0.0, 0.0, 0.0])
#: Ascending order of the 2,048 histogram indices by bucket number; subnormal and non-finite ones left out.
_ORDER32 = np.concatenate([np.arange(1024 + 1019, 1024 + 3, -1), np.arange(4, 1020)])
_BUCKET32 = np.where(_ORDER32 >= 1024, -(_ORDER32 - 1024), _ORDER32).astype(np.int16)
_ORDER64 = np.concatenate(
    [np.arange(2 * kernels.WIDE - 5, kernels.WIDE + 3, -1), np.arange(4, kernels.WIDE - 4)]
)
_BUCKET64 = np.where(_ORDER64 >= kernels.WIDE, -(_ORDER64 - kernels.WIDE), _ORDER64).astype(np.int16)


def array_of(tensor: Tensor) -> Array:
    """The tensor's values as a flat, contiguous numpy array on the host: float64 stays, everything else is
    float32.

    Shares memory with the tensor where it can. Sparse tensors give their coalesced values: the zeros between
    are the caller's to count.
    """
    data = tensor.detach()
    if data.is_sparse:
        data = data.coalesce().values()
    elif data.layout is not torch.strided:
        data = data.to_dense()
    if data.is_complex():
        data = data.abs()
    if data.dtype not in (torch.float32, torch.float64):
        data = data.to(torch.float64 if data.dtype in (torch.int32, torch.int64) else torch.float32)
    return data.cpu().contiguous().view(-1).numpy()


def summarise_array(x: Array) -> Summary:
    """Summary of a flat float32 or float64 array; see `monitor.summary.summarise` for the plain
    definition."""
    out = _START.copy()
    if x.dtype == np.float64:
        histogram = np.zeros(2 * kernels.WIDE, np.int64)
        kernels.summarise64(x, x.view(np.int64), histogram, out)
        ordered, names = histogram[_ORDER64], _BUCKET64
    else:
        histogram = np.zeros(2048, np.int64)
        kernels.summarise32(x, x.view(np.int32), histogram, out)
        ordered, names = histogram[_ORDER32], _BUCKET32
    used = np.flatnonzero(ordered)
    counts = ordered[used]
    zeros, nans, pos_infs, neg_infs = (int(v) for v in out[4:])
    return Summary(
        count=x.size,
        sum=float(out[0]),
        sum_sq=float(out[1]),
        min=float(out[2]),
        max=float(out[3]),
        zeros=zeros,
        subnormals=x.size - zeros - nans - pos_infs - neg_infs - int(counts.sum()),
        nans=nans,
        pos_infs=pos_infs,
        neg_infs=neg_infs,
        buckets=names[used],
        counts=counts,
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
    """Summary of a gradient. `rows`: also which rows (output units of a matrix) received any nonzero
    gradient."""
    summary = summarise_tensor(gradient)
    if not rows or gradient.ndim < 2 or gradient.is_sparse or gradient.numel() == 0:
        return summary
    active = np.zeros(gradient.shape[0], bool)
    kernels.active_rows(array_of(gradient).reshape(gradient.shape[0], -1), active)
    return replace(summary, units=active.size, active=np.packbits(active).tobytes())


def summarise_activation(output: Tensor, unit_dim: int) -> Summary:
    """Summary of a module's output, and which units along `unit_dim` were nonzero for some sample."""
    summary = summarise_tensor(output)
    if output.ndim < 2 or output.numel() == 0 or output.is_sparse:
        return replace(summary, samples=output.shape[0] if output.ndim else 1)
    data = array_of(output).reshape(output.shape)
    units = output.shape[unit_dim]
    active = np.zeros(units, bool)
    if unit_dim in (-1, output.ndim - 1):
        kernels.active_columns(data.reshape(-1, units), active)
    else:
        for sample in data.reshape(output.shape[0], units, -1):
            kernels.active_rows(sample, active)
    samples = output.numel() // units
    return replace(summary, samples=samples, units=units, active=np.packbits(active).tobytes())


def summarise_update(before: Array, weight: Tensor, gradient: Tensor | None) -> Summary:
    """Summary of weight - before with |before|^2, <before, update> and the number of updates lost to
    rounding.

    Args:
        before: the flat copy that `array_of` made before the step. weight: the parameter now.
        gradient: as the optimizer used it; without one nothing is counted as lost.
    """
    after = array_of(weight)
    dense = gradient is not None and not gradient.is_sparse and not gradient.is_complex()
    used = array_of(gradient) if dense and gradient is not None else _EMPTY
    if used.size != after.size:
        used = _EMPTY
    difference, out = np.empty_like(after), np.empty(3)
    kernels.update32(before, after, used.astype(after.dtype, copy=False), difference, out)
    lost = int(out[2]) if used.size else None
    return replace(summarise_array(difference), dot=float(out[0]), ref_sum_sq=float(out[1]), lost=lost)


def warm_up() -> None:
    """Compile, or load from the cache, before the first step is timed."""
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(2, 2, dtype=dtype)
        summarise_gradient(x, rows=True)
        summarise_activation(x, -1)
        summarise_update(array_of(x), x, x)
        kernels.drift32(array_of(x), array_of(x), np.empty(4))
    kernels.drift_bf16(np.ones(2, np.float32), np.ones(2, np.int16), np.empty(4))
