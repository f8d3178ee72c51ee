"""Outputs of leaf modules on captured steps, summarised as they pass by."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..monitor.summary import Summary, merge
from .statistics import summarise_activation

#: Modules whose outputs have their units along dimension 1; everywhere else they are the last dimension.
_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
)


class ActivationTap:
    """Forward hooks on leaf modules that exist only while a captured step is under way.

    Calls within one step (micro-batches, shared modules) merge by addition. Forward passes without gradient
    (evaluation) are not training and are not recorded. Under torch.compile the hook is traced as empty: it
    neither breaks the graph nor sees anything.
    """

    def __init__(
        self,
        modules: list[tuple[str, nn.Module]],
        guard: Callable[[Callable[..., None]], Callable[..., None]],
    ) -> None:
        self._modules = modules
        self._record = guard(self.record)
        self._handles: list[RemovableHandle] = []
        self._found: dict[str, Summary] = {}
        self.seconds = 0.0

    def arm(self) -> None:
        """Start to record."""
        if not self._handles:
            self._handles = [m.register_forward_hook(_Hook(self._record, name)) for name, m in self._modules]

    def disarm(self) -> None:
        """Stop to record; what was found stays until `take`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self) -> dict[str, Summary]:
        """What was recorded since the last call, by module."""
        found, self._found = self._found, {}
        return found

    def record(self, name: str, module: nn.Module, output: Any) -> None:
        """Add one call's output."""
        # A checkpoint computes the same once more, inside backward.
        if name in self._found and torch._C._current_graph_task_id() != -1:
            return
        start = time.perf_counter()
        tensor = first_tensor(output)
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
            with torch.no_grad():
                summary = summarise_activation(tensor, unit_dimension(module, tensor))
            self._found[name] = merge([self._found[name], summary]) if name in self._found else summary
        self.seconds += time.perf_counter() - start


class _Hook:
    """The forward hook of one module. A copied or pickled model carries an empty hook instead."""

    def __init__(self, record: Callable[[str, nn.Module, Any], None], name: str) -> None:
        self._record, self._name = record, name

    def __call__(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        self._record(self._name, module, output)

    def __deepcopy__(self, _memo: dict) -> Callable[..., None]:
        return no_hook

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _hook_of_a_copy, ()


def no_hook(*_: Any) -> None:
    """What remains of a hook in a copy of the model."""


def _hook_of_a_copy() -> Callable[..., None]:
    return no_hook


def first_tensor(output: Any) -> Tensor | None:
    """The tensor of a module's output: itself, or the first one in a tuple, list or mapping."""
    if isinstance(output, Tensor):
        return output
    items = list(output.values()) if isinstance(output, dict) else output
    if isinstance(items, tuple | list):
        return next((t for t in items if isinstance(t, Tensor)), None)
    return None


def unit_dimension(module: nn.Module, output: Tensor) -> int:
    """Where the units are: dimension 1 for convolutions and images, else the last one.

    An activation function has no type of its own to tell: 4 and 5 dimensions are taken as (N, C, H, W) and
    (N, C, D, H, W), as every torch.nn layer for images and volumes lays them out.
    """
    if isinstance(module, _CHANNELS_FIRST) and output.ndim >= 3:
        return 1
    is_linear_like = isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding | nn.Softmax)
    return 1 if output.ndim in (4, 5) and not is_linear_like else -1
