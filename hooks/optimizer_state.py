"""What optimizers remember of each tensor: second moments against gradient and epsilon, and momentum.

Recognised by the names of torch's optimizers, which others follow: `exp_avg_sq` (Adam, AdamW, NAdam, RAdam;
`max_exp_avg_sq` with amsgrad), `square_avg` (RMSprop, Adadelta), `sum` (Adagrad); `exp_avg`,
`momentum_buffer` (SGD, RMSprop, Muon). State of other names or shapes, such as Adamax's infinity norm, is
left alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..monitor.plain import moment_ratios
from ..monitor.summary import Summary, merge
from .shards import local
from .statistics import parts_of, summarise_array, summarise_tensor

#: In order of preference: what the step divides by.
SECOND = ("max_exp_avg_sq", "exp_avg_sq", "square_avg", "sum")
FIRST = ("exp_avg", "momentum_buffer")
#: Devices whose tensors the host summarises; mps has no double precision.
HOST = ("cpu", "mps")
#: Elements that are converted at once.
BLOCK = 1 << 18

Row = tuple[str, str, Summary]


@dataclass(frozen=True)
class _Second:
    """A second moment v: the step divides by sqrt(v / correction) + eps."""

    name: str
    moment: Tensor
    gradient: Tensor | None
    correction: float | Tensor
    eps: float


def summaries(optimizer: Optimizer, names: Mapping[int, str]) -> list[Row]:
    """Rows of an optimizer's state, as it is after its step.

    Args:
        names: id of a parameter -> its tensor's name; others are left out.

    Returns:
        tensor, kind, summary. Kind "second_moment": of v as it is stored, of complex tensors the parts; dot =
        sum of (g / max(sqrt(v_hat), eps))^2 over its elements, lost = elements with sqrt(v_hat) < eps, with
        v_hat = v / (1 - beta2^t) where the optimizer corrects for its start; ratios that are not finite are
        left out. Kind "momentum": of the buffer.

    What is on an accelerator is computed there, and waited for once in all.
    """
    seconds, rows, far = [], [], []
    for parameter, name, group in _owned(optimizer, names):
        state = optimizer.state.get(parameter) or {}
        second = _second(parameter, name, state, group)
        first = _find(state, FIRST, parameter)
        if parameter.device.type in HOST:
            if second is not None:
                rows.append((name, "second_moment", _summarise(second)))
            if first is not None:
                rows.append((name, "momentum", _merged([summarise_tensor(p) for p in _pieces(first)])))
        else:
            seconds += [second] if second is not None else []
            far += [(name, first)] if first is not None else []
    return rows + (on_device(seconds, far) if seconds or far else [])


def _owned(optimizer: Optimizer, names: Mapping[int, str]) -> Iterator[tuple[Tensor, str, dict[str, Any]]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in names and local(parameter).numel():
                yield parameter, names[id(parameter)], group


def _find(state: Mapping[str, Any], keys: tuple[str, ...], parameter: Tensor) -> Tensor | None:
    for key in keys:
        found = state.get(key)
        if isinstance(found, Tensor) and found.shape == parameter.shape and not found.is_sparse:
            return local(found)
    return None


def _second(
    parameter: Tensor, name: str, state: Mapping[str, Any], group: Mapping[str, Any]
) -> _Second | None:
    moment = _find(state, SECOND, parameter)
    if moment is None or "eps" not in group:
        return None
    correction: float | Tensor = 1.0
    if "exp_avg_sq" in state and "betas" in group and "step" in state:
        correction = 1.0 - _number(group["betas"][1]) ** _number(state["step"])
    if not isinstance(correction, Tensor) and not correction > 0:
        return None
    eps = float(group["eps"])
    gradient = local(parameter.grad)
    if gradient is not None and (gradient.is_sparse or gradient.shape != moment.shape):
        gradient = None
    # Adadelta adds eps below the root.
    return _Second(name, moment, gradient, correction, math.sqrt(eps) if "acc_delta" in state else eps)


def _number(value: float | Tensor) -> float | Tensor:
    """A number, in double precision; one that an accelerator holds is not asked for its value."""
    if isinstance(value, Tensor) and value.device.type not in HOST:
        return value.double()
    return float(value)


def _pieces(tensor: Tensor) -> list[Tensor]:
    """Parts of which none is converted or copied in more than a block."""
    data = tensor.detach()
    if data.ndim == 0 or (data.is_contiguous() and data.dtype in (torch.float32, torch.float64)):
        return [data]
    flat = data.reshape(-1) if data.is_contiguous() else data
    return list(flat.split(max(1, BLOCK * flat.shape[0] // flat.numel())))


def _summarise(second: _Second) -> Summary:
    moments = _pieces(second.moment)
    gradients: list[Tensor | None] = [None] * len(moments)
    if second.gradient is not None:
        gradient = second.gradient.detach()
        gradients = list(_like(moments, gradient))
    found, dot, lost = [], 0.0, 0
    for moment, gradient in zip(moments, gradients, strict=True):
        v = parts_of(moment)
        g = np.empty(0, v.dtype) if gradient is None else parts_of(gradient)
        ratios, below = moment_ratios(v, g, float(second.correction), second.eps)
        dot, lost = dot + ratios, lost + below
        found.append(summarise_array(v))
    whole = _merged(found)
    whole.dot = None if second.gradient is None else dot
    whole.lost = lost
    return whole


def _merged(parts: list[Summary]) -> Summary:
    return parts[0] if len(parts) == 1 else merge(parts)


def _like(pieces: list[Tensor], tensor: Tensor) -> Iterator[Tensor]:
    """`tensor` cut as `pieces` are."""
    if len(pieces) == 1:
        return iter([tensor])
    same = tensor if pieces[0].ndim == tensor.ndim else tensor.reshape(-1)
    return iter(same.split(pieces[0].shape[0]))


def on_device(seconds: list[_Second], firsts: list[tuple[str, Tensor]]) -> list[Row]:
    """The same by operations of the device. Not run on a GPU; on the CPU it agrees with the loops."""
    from .device import DeviceBatch

    batch, pairs = DeviceBatch(), []
    for second in seconds:
        dot = below = torch.zeros((), dtype=torch.float64, device=second.moment.device)
        moments = _pieces(second.moment)
        gradients = [None] * len(moments) if second.gradient is None else _like(moments, second.gradient)
        for moment, gradient in zip(moments, gradients, strict=True):
            root = (_real(moment).double() / second.correction).sqrt()
            below = below + (root < second.eps).sum()
            if gradient is not None:
                ratio = _real(gradient).double() / root.clamp(min=second.eps)
                dot = dot + torch.where(ratio.isfinite(), ratio, 0.0).square().sum()
        pairs.append(torch.stack([dot, below]))
    tickets = batch.summaries([_real(s.moment) for s in seconds] + [first for _, first in firsts])
    batch.send()
    sums = torch.stack(pairs).cpu().tolist() if pairs else []
    batch.wait()
    results = batch.results()
    rows: list[Row] = []
    for second, ticket, (dot, below) in zip(seconds, tickets, sums, strict=False):
        known = None if second.gradient is None else dot
        rows.append((second.name, "second_moment", replace(results[ticket], dot=known, lost=int(below))))
    for (name, _), ticket in zip(firsts, tickets[len(seconds) :], strict=True):
        rows.append((name, "momentum", results[ticket]))
    return rows


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
