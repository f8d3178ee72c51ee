"""The gradient scaler of mixed precision: which steps it skips, and by how much gradients are scaled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer


class ScalerListener(Protocol):
    """Told about every use of a GradScaler; its methods must not raise."""

    def scaling(self, scaler: GradScaler, outputs: Any) -> None:
        """A loss is about to be scaled."""
        ...

    def scaler_steps(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        """`scaler.step(optimizer)` begins."""
        ...

    def scaler_stepped(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        """`scaler.step(optimizer)` has ended, whether or not the optimizer stepped."""
        ...


class Scaling:
    """What one watcher remembers of the scaler: it calls `stepped(optimizer, skipped)` after each step."""

    def __init__(self, stepped: Callable[[GradScaler, Optimizer, bool], None]) -> None:
        self.scaler: GradScaler | None = None
        self.let_step = True  # the optimizer's own hooks have fired
        self._stepped = stepped
        self._loss: Tensor | None = None

    @property
    def active(self) -> bool:
        """Gradients that are not finite are the scaler's business: it skips the step and lowers the scale."""
        return self.scaler is not None and self.scaler.is_enabled()

    @property
    def scale(self) -> Tensor | None:
        """The loss scale of this step, where it is."""
        return self.scaler._scale if self.scaler is not None and self.scaler.is_enabled() else None

    def take_loss(self) -> Tensor | None:
        """The loss that was scaled since the last call, before it was scaled."""
        loss, self._loss = self._loss, None
        return loss

    def scaling(self, scaler: GradScaler, outputs: Any) -> None:
        self.scaler = scaler
        self._loss = outputs if isinstance(outputs, Tensor) and scaler.is_enabled() else None

    def scaler_steps(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        self.let_step = False

    def scaler_stepped(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        if scaler.is_enabled():
            self._stepped(scaler, optimizer, not self.let_step)
        self.let_step = True


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
        if torch.compiler.is_compiling():
            return original(scaler, optimizer, *args, **kwargs)
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
        if torch.compiler.is_compiling():
            return original(scaler, outputs)
        for listener in list(_listeners):
            listener.scaling(scaler, outputs)
        return original(scaler, outputs)

    return scale


def _unscaled(scaler: GradScaler, optimizer: Optimizer) -> bool:
    state = scaler._per_optimizer_states.get(id(optimizer))
    return state is not None and state["stage"] is not OptState.READY


def still_scaled(scaler: GradScaler | None, optimizers: Sequence[Optimizer]) -> dict[int, float]:
    """id of each parameter whose gradient is not unscaled yet -> the loss scale in it."""
    if scaler is None or not scaler.is_enabled():
        return {}
    waiting = [o for o in optimizers if not _unscaled(scaler, o)]
    scale = scaler.get_scale() if waiting else 1.0
    return {id(p): scale for o in waiting for g in o.param_groups for p in g["params"]}


def scale_in(scaler: GradScaler | None, optimizers: Sequence[Optimizer], parameter: Tensor) -> Tensor | None:
    """The scale that this parameter's gradient still carries, where it is; None: it carries none."""
    if scaler is None or not scaler.is_enabled():
        return None
    waiting = [o for o in optimizers if not _unscaled(scaler, o)]
    if len(waiting) == len(optimizers) or any(owns(o, parameter) for o in waiting):
        return scaler._scale
    return None


def owns(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Is it in one of the optimizer's groups?"""
    return any(p is parameter for group in optimizer.param_groups for p in group["params"])
