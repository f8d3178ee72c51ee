"""Gradients as this rank computed them, before they are averaged over ranks: how noisy they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .shards import is_sharded
from .tensors import WatchedTensor


class LocalGradients:
    """The norm of this rank's own gradient, over the micro-batches of a step.

    Hooks on parameters run before a data-parallel wrapper, or the user, averages what has accumulated.
    Sharded parameters are left out: theirs is averaged before it arrives.

    Args:
        guard: keeps errors from the training.
    """

    def __init__(self, guard: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
        self._see = guard(self._seen)
        self._handles: list[Any] = []
        self._norms: dict[int, Tensor] = {}

    def arm(self, tensors: Sequence[WatchedTensor]) -> None:
        """Look at the coming step."""
        if self._handles:
            return
        for place, tensor in enumerate(tensors):
            parameter = tensor.parameter
            if parameter.requires_grad and tensor.piece is None and not is_sharded(parameter):
                self._handles.append(parameter.register_hook(partial(self._hook, place, parameter)))

    def disarm(self) -> None:
        """Until `arm`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, place: int, parameter: Tensor, gradient: Tensor) -> None:
        if not torch.compiler.is_compiling():
            self._see(place, parameter, gradient)

    def _seen(self, place: int, parameter: Tensor, gradient: Tensor) -> None:
        whole = gradient.detach()
        if parameter.grad is not None:  # of earlier micro-batches
            whole = whole + parameter.grad
        values = whole.coalesce().values() if whole.is_sparse else whole
        self._norms[place] = torch.linalg.vector_norm(values, dtype=_double(values))

    def take(self, scale: Tensor | None) -> dict[str, float | Tensor]:
        """What the step's gradients were, without waiting for a device.

        Args:
            scale: of the loss, divided out.
        """
        norms, self._norms = list(self._norms.values()), {}
        if not norms:
            return {}
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0]).real for n in norms]))
        norm = norm if scale is None else norm / scale.to(norm)
        return {"local_grad_norm": float(norm) if norm.is_cpu else norm}


def _double(tensor: Tensor) -> torch.dtype:
    if tensor.device.type == "mps":
        return torch.float32
    return torch.complex128 if tensor.is_complex() else torch.float64
