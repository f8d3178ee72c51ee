"""The gradient scaler of mixed precision: which steps it skips, and by how much gradients are scaled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer


class ScalerListener(Protocol):
    """Told about every use of a GradScaler; its methods must not raise."""

    def scaling(self, scaler: GradScaler) -> None:
        """A loss is about to be scaled."""
        ...

    def scaler_steps(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        """`scaler.step(optimizer)` begins."""
        ...

    def scaler_stepped(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        """`scaler.step(optimizer)` has ended, whether or not the optimizer stepped."""
        ...


_listeners: list[ScalerListener] = []
_originals: dict[str, Callable[..., Any]] = {}


def listen(listener: ScalerListener) -> None:
    """Tell this listener about every GradScaler of the process, until `unlisten`."""
    if not _listeners:
        _originals.update(step=GradScaler.step, scale=GradScaler.scale)
        GradScaler.step, GradScaler.scale = _wrapped_step(), _wrapped_scale()  # type: ignore[method-assign]
    _listeners.append(listener)


def unlisten(listener: ScalerListener) -> None:
    """Undo `listen`; the last one leaves torch as it was."""
    if listener in _listeners:
        _listeners.remove(listener)
        if not _listeners:
            GradScaler.step, GradScaler.scale = _originals["step"], _originals["scale"]  # type: ignore[method-assign]


def _wrapped_step() -> Callable[..., Any]:
    original = _originals["step"]

    @functools.wraps(original)
    def step(scaler: GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        for listener in list(_listeners):
            listener.scaler_steps(scaler, optimizer)
        result = original(scaler, optimizer, *args, **kwargs)
        for listener in list(_listeners):
            listener.scaler_stepped(scaler, optimizer)
        return result

    return step


def _wrapped_scale() -> Callable[..., Any]:
    original = _originals["scale"]

    @functools.wraps(original)
    def scale(scaler: GradScaler, outputs: Any) -> Any:
        for listener in list(_listeners):
            listener.scaling(scaler)
        return original(scaler, outputs)

    return scale


def still_scaled(scaler: GradScaler | None, optimizers: Sequence[Optimizer]) -> dict[int, float]:
    """id of each parameter whose gradient is not unscaled yet -> the loss scale in it."""
    if scaler is None or not scaler.is_enabled():
        return {}
    states = scaler._per_optimizer_states
    waiting = [o for o in optimizers if id(o) not in states or states[id(o)]["stage"] is OptState.READY]
    scale = scaler.get_scale() if waiting else 1.0
    return {id(p): scale for o in waiting for g in o.param_groups for p in g["params"]}
