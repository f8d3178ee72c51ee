"""What the units of a module's output did: summary, which of them were active, dead and saturated shares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..monitor import kernels
from ..monitor.summary import Summary, merge
from .pending import Pending
from .statistics import array_of, summarise_array

#: Modules whose outputs have their units along dimension 1; everywhere else they are the last dimension.
_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
)
_UNITS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Softmax)
#: Put out exactly zero for a half-line of inputs: their units can die.
_ZERO_FLOOR = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardswish)
#: Put out zeros for another reason.
_ZERO_OTHERWISE = (nn.modules.dropout._DropoutNd, nn.Embedding, nn.EmbeddingBag)
_TANH_LIKE = (nn.Tanh, nn.Softsign, nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
#: |tanh| above 0.95 passes less than a tenth of the gradient, a sigmoid outside [0.05, 0.95] less than a
#: fifth of what it passes at its middle.
TANH, SIGMOID = 0.95, 0.05
#: The input at which a sigmoid is 0.95: where the gate of a GLU is flat.
GATE = math.log((1 - SIGMOID) / SIGMOID)
#: Above this number units are not told apart.
MAX_UNITS = 16_384


@dataclass
class _Call:
    """One output; `summary`, `zeros` and `ends` are numbers in `Pending`, None where they do not apply."""

    summary: int
    samples: int | None = None
    units: int | None = None
    active: NDArray[np.bool_] | None = None
    zeros: int | None = None
    ends: int | None = None


class Units:
    """The outputs of one module within a step, added up."""

    def __init__(self, module: nn.Module, pending: Pending) -> None:
        self._module, self._pending = module, pending
        self._calls: list[_Call] = []

    def add(self, output: Tensor, inputs: tuple[Any, ...]) -> None:
        """One call. `output` is detached, of any shape and layout; `inputs` as the module got them."""
        if output.ndim < 2 or not output.numel() or output.layout is not torch.strided:
            samples = output.shape[0] if output.ndim else 1
            self._calls.append(_Call(self._pending.add_summary(output), samples))
            return
        dense, unit = in_memory_order(output, unit_dimension(self._module, output))
        low, high = flat_ends(self._module, output.ndim)
        reduce = _on_host if output.device.type == "cpu" else _on_device
        call = reduce(self._pending, self._module, dense, unit, low, high)
        if isinstance(self._module, nn.GLU):
            call.ends = self._gate(inputs[0].detach())
        if call.units is not None and call.units > MAX_UNITS:
            call.zeros = call.ends = None
        self._calls.append(call)

    def _gate(self, x: Tensor) -> int:
        """A GLU is its input's first half times the sigmoid of the second."""
        gate = x.chunk(2, self._module.dim)[1]  # type: ignore[arg-type]
        dims = [d for d in range(x.ndim) if d != self._module.dim % x.ndim]  # type: ignore[operator]
        return self._pending.add_vector((gate.abs() > GATE).sum(dims))

    def observed(self) -> tuple[Summary, NDArray | None, NDArray | None]:
        """Summary, dead and saturated share per unit (float64 (units,)); `pending` has settled.

        Shares are None where they do not apply, or where the calls differ in units.
        """
        parts = [self._whole(c) for c in self._calls]
        summary = merge(parts) if len(parts) > 1 else parts[0]
        by_zeros = isinstance(self._module, _ZERO_FLOOR) or (
            summary.zeros > 0 and summary.min >= 0 and not isinstance(self._module, _ZERO_OTHERWISE)
        )
        dead = self._share([c.zeros for c in self._calls]) if by_zeros else None
        return summary, dead, self._share([c.ends for c in self._calls])

    def _whole(self, call: _Call) -> Summary:
        summary = self._pending.summary(call.summary)
        summary.samples, summary.units = call.samples, call.units
        active = call.active
        if active is None and call.zeros is not None:
            active = self._pending.vector(call.zeros) < (call.samples or 0)
        summary.active = None if active is None else np.packbits(active).tobytes()
        return summary

    def _share(self, numbers: list[int | None]) -> NDArray | None:
        if any(n is None for n in numbers) or len({c.units for c in self._calls}) > 1:
            return None
        counts = sum(self._pending.vector(n).astype(np.float64) for n in numbers if n is not None)
        return counts / sum(c.samples or 0 for c in self._calls)  # type: ignore[return-value]


def _on_host(pending: Pending, module: nn.Module, dense: Tensor, unit: int, low: float, high: float) -> _Call:
    """One pass for the summary, one for the units if there is something to count."""
    values = array_of(dense)
    outer, units = math.prod(dense.shape[:unit]), dense.shape[unit]
    lines = values.reshape(outer, units, -1)
    summary = summarise_array(values)
    ends_matter, zeros, ends = low > -math.inf or high < math.inf, None, None
    call = _Call(pending.add_known(summary), values.size // units, units)
    zeros_matter = isinstance(module, _ZERO_FLOOR) or (summary.zeros > 0 and summary.min >= 0)
    if zeros_matter or ends_matter:
        zeros, ends = np.zeros((2, units), np.int64)
        bounds = values.dtype.type(low), values.dtype.type(high)
        kernels.unit_counts(lines, *bounds, zeros, ends)
        call.active = zeros < values.size // units
        call.ends = pending.add_vector(ends) if ends_matter else None
    elif summary.min >= 0:
        zeros = np.zeros(units, np.int64)
    if call.active is None:
        call.active = np.zeros(units, bool)
        kernels.active_units(lines, call.active)
    call.zeros = None if zeros is None else pending.add_vector(zeros)
    return call


def _on_device(
    pending: Pending, module: nn.Module, dense: Tensor, unit: int, low: float, high: float
) -> _Call:
    """The same without asking the device for a number: zeros are always counted."""
    others = [d for d in range(dense.ndim) if d != unit]
    size = dense.abs() if dense.is_complex() else dense
    units = dense.shape[unit]
    call = _Call(pending.add_summary(dense), dense.numel() // units, units)
    call.zeros = pending.add_vector((size == 0).sum(others))
    if low > -math.inf or high < math.inf:
        call.ends = pending.add_vector(((size < low) | (size > high)).sum(others))
    return call


def in_memory_order(x: Tensor, dim: int) -> tuple[Tensor, int]:
    """`x` with its dimensions in the order in which they lie in memory, and where `dim` is then.

    Of a channels_last image (N, H, W, C), without a copy; what is not dense stays as it is.
    """
    dim %= x.ndim
    if x.is_contiguous():
        return x, dim
    order = sorted(range(x.ndim), key=lambda d: (-x.stride(d), d))
    dense = x.permute(order)
    return (dense, order.index(dim)) if dense.is_contiguous() else (x, dim)


def unit_dimension(module: nn.Module, output: Tensor) -> int:
    """Where the units are: dimension 1 for convolutions and images, else the last one.

    An activation function has no type of its own to tell: 4 and 5 dimensions are taken as (N, C, H, W) and
    (N, C, D, H, W), as every torch.nn layer for images and volumes lays them out.
    """
    if isinstance(module, nn.GLU):
        return module.dim
    if isinstance(module, _CHANNELS_FIRST) and output.ndim >= 3:
        return 1
    return 1 if output.ndim in (4, 5) and not isinstance(module, _UNITS_LAST) else -1


def flat_ends(module: nn.Module, ndim: int) -> tuple[float, float]:
    """The range outside of which the module's output is saturated; infinite where it cannot be.

    tanh, and the states of LSTM, GRU and RNN, which are products and means of tanh (their gates are not
    visible): beyond 0.95. Sigmoid: outside [0.05, 0.95]. Piecewise linear ones: at their ends, where the
    gradient is zero; the lower end of a ReLU6 is a dead unit's. A softmax over classes or experts (two
    dimensions): above 0.95, which one unit takes of all.
    """
    if isinstance(module, (nn.RNN, nn.RNNCell)) and module.nonlinearity != "tanh":
        return -math.inf, math.inf
    if isinstance(module, _TANH_LIKE):
        return -TANH, TANH
    if isinstance(module, nn.Sigmoid):
        return SIGMOID, 1 - SIGMOID
    if isinstance(module, nn.Softmax) and ndim == 2:
        return -math.inf, 1 - SIGMOID
    if isinstance(module, nn.Hardsigmoid):
        return _inside(0.0, 1.0)
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        low, high = _inside(float(module.min_val), float(module.max_val))
        return (-math.inf if isinstance(module, nn.ReLU6) else low), high
    return -math.inf, math.inf


def _inside(low: float, high: float) -> tuple[float, float]:
    """The next float32 within: what lies outside of it lies at the ends."""
    inner = np.nextafter(np.array([low, high], np.float32), np.array([math.inf, -math.inf], np.float32))
    return float(inner[0]), float(inner[1])


def warm_up() -> None:
    """Compile the kernels, or load them from the cache, before the first step is timed."""
    x, counts = np.ones((1, 1, 1), np.float32), np.zeros((2, 1), np.int64)
    kernels.unit_counts(x, np.float32(0), np.float32(1), *counts)
    kernels.active_units(x, np.zeros(1, bool))
