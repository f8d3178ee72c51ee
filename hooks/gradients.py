"""Gradients at the right moment: before clipping, whoever clips."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.utils.clip_grad as clip_grad
from torch import Tensor

from .tensors import WatchedTensor

#: Looked up by every torch clipping function when it is called, so that `from torch.nn.utils import
#: clip_grad_norm_` is seen too.
_LOOKED_UP = "_group_tensors_by_device_and_dtype"
#: Callers that go on to change the gradients; get_total_norm only measures.
_CLIPPERS = {"clip_grad_norm_", "clip_grad_value_", "_clip_grads_with_norm_"}

Listener = Callable[[list[Tensor], Tensor | None], None]

_listeners: list[Listener] = []
_original: Callable[..., Any] | None = None


def _grouping(tensorlists: Any, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():  # what is clipped inside a compiled step cannot be seen
        return _original(tensorlists, *args, **kwargs)  # type: ignore[misc]
    caller = sys._getframe(1)
    if caller.f_code.co_name in _CLIPPERS:
        norm = _norm_of(caller)
        for listener in list(_listeners):
            listener(tensorlists[0], norm)
    return _original(tensorlists, *args, **kwargs)  # type: ignore[misc]


def _norm_of(caller: Any) -> Tensor | None:
    """The L2 norm that `clip_grad_norm_` has computed already (torch 2.6 or newer; else it is not known)."""
    norm = caller.f_locals.get("total_norm")
    if not isinstance(norm, Tensor):
        return None
    outer = caller.f_back.f_back if caller.f_back is not None else None  # across the no_grad wrapper
    if outer is not None and outer.f_code.co_name == "clip_grad_norm_":
        return norm if outer.f_locals.get("norm_type", 2.0) == 2.0 else None
    return norm


def listen(listener: Listener) -> bool:
    """Call `listener(gradients, norm)` when a torch clipping function begins, before anything is changed.

    `norm` is their total L2 norm where torch has just computed it.

    Returns False when this torch has no such place to listen at: gradients are then taken after clipping.
    """
    global _original
    if not hasattr(clip_grad, _LOOKED_UP):
        return False
    if not _listeners:
        _original = getattr(clip_grad, _LOOKED_UP)
        setattr(clip_grad, _LOOKED_UP, _grouping)
    _listeners.append(listener)
    return True


def unlisten(listener: Listener) -> None:
    """Undo `listen`; the last one leaves torch as it was."""
    if listener not in _listeners:
        return
    _listeners.remove(listener)
    if not _listeners and getattr(clip_grad, _LOOKED_UP) is _grouping:
        setattr(clip_grad, _LOOKED_UP, _original)


class Clipping:
    """The clipping calls of one training."""

    def __init__(self, tensors: Sequence[WatchedTensor]) -> None:
        self._tensors = tensors
        self._owners: list[WatchedTensor] = []  # of what was clipped first in earlier calls
        self._parts: list[tuple[weakref.ref[Tensor], int, Tensor]] = []
        self._latest = -1
        self.backwards = 0  # passes so far

    def owner(self, clipped: Sequence[Tensor]) -> WatchedTensor | None:
        """Whose gradient the first of them is; None: not one of ours."""
        if not clipped:
            return None
        first = clipped[0]
        for tensor in self._owners:
            if tensor.parameter.grad is first:
                return tensor
        for tensor in self._tensors:
            if tensor.parameter.grad is first:
                self._owners.append(tensor)
                return tensor
        return None

    def is_new(self) -> bool:
        """Backward ran since the last call."""
        new, self._latest = self.backwards > self._latest, self.backwards
        return new

    def total(self, clipped: Sequence[Tensor], norm: Tensor) -> Tensor:
        """The norm over all calls since the last step (parts of a model, or models), this one included.

        Gradients that are clipped twice count as they were before. After another backward pass, or when they
        were cleared, the step was not made and its norm is forgotten.
        """
        kept = []
        for first, when, value in self._parts:
            tensor = first()
            if tensor is clipped[0] and when == self.backwards:
                norm = value
            elif tensor is not None and tensor is not clipped[0]:
                kept.append((first, when, value))
        norm = norm.detach()
        self._parts = [*kept, (weakref.ref(clipped[0]), self.backwards, norm)]
        if not kept:
            return norm
        return torch.linalg.vector_norm(torch.stack([v.to(norm) for _, _, v in self._parts]))

    def stepped(self) -> None:
        """The step was made."""
        self._parts.clear()
