"""Backward passes as they happen: which tensor backward is called on, and when the pass has ended."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .guard import untraced


class BackwardListener(Protocol):
    """Told about every outermost backward pass of the process, untraced; its methods must not raise."""

    def backward_begins(self, root: Tensor | None) -> None:
        """Backward was called on this tensor; None: on none or on several."""
        ...

    @property
    def backward_ended(self) -> Callable[[], None] | None:
        """Called when all gradients of a pass that did not raise are there; None: not of interest."""
        ...


_listeners: list[BackwardListener] = []
_original: Callable[..., Any] | None = None


def listen(listener: BackwardListener) -> None:
    """Tell this listener about every backward pass, until `unlisten`.

    `Tensor.backward` looks `torch.autograd.backward` up when it is called: this one name covers both. A pass
    that another one starts (re-entrant checkpointing) is part of that one. `torch.autograd.grad` fills no
    `.grad` and is not reported.
    """
    global _original
    if not _listeners:
        _original = torch.autograd.backward
        torch.autograd.backward = _wrapped(_original)
    _listeners.append(listener)


def unlisten(listener: BackwardListener) -> None:
    """Undo `listen`; the last one leaves torch as it was."""
    if listener not in _listeners:
        return
    _listeners.remove(listener)
    if not _listeners and getattr(torch.autograd.backward, "_layerwatch", False):
        torch.autograd.backward = _original  # type: ignore[assignment]


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    begin, end = untraced(_begin), untraced(_end)

    @functools.wraps(original)
    def backward(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        awaited = begin(args[0] if args else kwargs.get("tensors"))
        result = original(*args, **kwargs)
        if awaited:
            end()
        return result

    backward._layerwatch = True  # type: ignore[attr-defined]
    return backward


def _begin(roots: Any) -> bool:
    """Tell the listeners; does one of them wait for the end?"""
    if torch._C._current_graph_task_id() != -1:
        return False
    if isinstance(roots, list | tuple) and len(roots) == 1:
        roots = roots[0]
    root = roots if isinstance(roots, Tensor) else None
    awaited = False
    for listener in tuple(_listeners):
        listener.backward_begins(root)
        awaited = awaited or listener.backward_ended is not None
    return awaited


def _end() -> None:
    for listener in _listeners[:]:
        if listener.backward_ended is not None:
            listener.backward_ended()
