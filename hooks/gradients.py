"""Gradients at the right moment: before clipping, whoever clips."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch.nn.utils.clip_grad as clip_grad
from torch import Tensor

#: Looked up by every torch clipping function when it is called, so that `from torch.nn.utils import
#: clip_grad_norm_` is seen too.
_LOOKED_UP = "_group_tensors_by_device_and_dtype"
#: Callers that go on to change the gradients; get_total_norm only measures.
_CLIPPERS = {"clip_grad_norm_", "clip_grad_value_", "_clip_grads_with_norm_"}

_listeners: list[Callable[[list[Tensor]], None]] = []
_original: Callable[..., Any] | None = None


def _grouping(tensorlists: Any, *args: Any, **kwargs: Any) -> Any:
    if sys._getframe(1).f_code.co_name in _CLIPPERS:
        for listener in list(_listeners):
            listener(tensorlists[0])
    return _original(tensorlists, *args, **kwargs)  # type: ignore[misc]


def listen(listener: Callable[[list[Tensor]], None]) -> bool:
    """Call `listener(gradients)` when a torch clipping function begins, before anything is changed.

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


def unlisten(listener: Callable[[list[Tensor]], None]) -> None:
    """Undo `listen`; the last one leaves torch as it was."""
    if listener not in _listeners:
        return
    _listeners.remove(listener)
    if not _listeners and getattr(clip_grad, _LOOKED_UP) is _grouping:
        setattr(clip_grad, _LOOKED_UP, _original)
