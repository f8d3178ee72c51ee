"""Optimizer steps as they happen, of every torch optimizer of the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .guard import untraced

Listener = Callable[[Optimizer], None]

_before: list[Listener] = []
_after: list[Listener] = []
_handles: list[Any] = []
_telling = False


class Listening:
    """Told about every optimizer's step, until `remove`.

    Who begins to listen while a step is told is told about that step, too: torch's own global hooks may not
    be added or removed in one of them, as they are being iterated over.

    Args:
        before: called with the optimizer that is about to step.
        after: called when it has stepped. Neither may raise.
    """

    def __init__(self, before: Listener, after: Listener) -> None:
        self._listeners = before, after
        _before.append(before)
        _after.append(after)
        if not _handles:
            _handles.append(register_optimizer_step_pre_hook(untraced(_tell_before)))
            _handles.append(register_optimizer_step_post_hook(untraced(_tell_after)))

    def remove(self) -> None:
        """Stop to listen; the last one leaves torch as it was. May be called twice."""
        for told, listener in zip((_before, _after), self._listeners, strict=True):
            if listener in told:
                told.remove(listener)
        _leave()


def _leave() -> None:
    if not _before and not _telling:
        while _handles:
            _handles.pop().remove()


def _tell_before(optimizer: Optimizer, *_: Any) -> None:
    _tell(_before, optimizer)


def _tell_after(optimizer: Optimizer, *_: Any) -> None:
    _tell(_after, optimizer)


def _tell(listeners: list[Listener], optimizer: Optimizer) -> None:
    global _telling
    outer, _telling = _telling, True
    try:
        told = 0
        while told < len(listeners):
            listener = listeners[told]
            listener(optimizer)
            told += told < len(listeners) and listeners[told] is listener  # else it has removed itself
    finally:
        _telling = outer
