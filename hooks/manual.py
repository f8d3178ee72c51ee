"""A training without a torch optimizer: which backward pass begins a new step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .shards import local
from .tensors import WatchedTensor, ready

#: Tensors that are looked at, and elements of each.
_TENSORS, _ELEMENTS = 4, 64


class BackwardSteps:
    """Tells a new step from one more micro-batch, by a few small tensors.

    At the end of each backward pass the first elements of the smallest tensors with a gradient are copied. A
    step is over when, since then, a weight has changed or a gradient was cleared (set to None or to zero).
    Passes without either are micro-batches.
    On an accelerator that comparison waits for the device, once per backward pass.
    """

    def __init__(self) -> None:
        self.certain = False  # a step was seen to end without any optimizer
        self._probes: list[tuple[Tensor, Tensor]] = []

    def remember(self, tensors: Sequence[WatchedTensor]) -> None:
        """A backward pass has ended."""
        probed = [parameter for parameter, _ in self._probes]
        if not probed or any(p.grad is None for p in probed):
            probed = _choose(tensors)
        self._probes = [(p, _head(p).clone()) for p in probed]

    def is_over(self) -> bool:
        """The step of the last backward pass has ended; told once.

        The first one is not believed before a weight has changed: an ordinary training may compute gradients
        and clear them before its optimizer steps for the first time.
        """
        changed = any(not torch.equal(_head(p), before) for p, before in self._probes)
        if not changed and not (self.certain and any(_cleared(p) for p, _ in self._probes)):
            return False
        self.certain = True
        self._probes = []
        return True


def _cleared(parameter: Tensor) -> bool:
    return parameter.grad is None or not bool(local(parameter.grad).any())


def _head(parameter: Tensor) -> Tensor:
    return local(parameter).detach().reshape(-1)[:_ELEMENTS]


def _choose(tensors: Sequence[WatchedTensor]) -> list[Tensor]:
    """The smallest ones whose gradient is dense and not zero: those that training changes."""
    found = []
    for tensor in sorted(ready(tensors), key=lambda t: t.weight.numel()):
        gradient = tensor.gradient
        if gradient is not None and gradient.layout == torch.strided and bool(gradient.any()):
            found.append(tensor.parameter)
            if len(found) == _TENSORS:
                break
    return found
