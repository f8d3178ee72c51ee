"""Scalars on their way into the log; those on an accelerator arrive when they are ready."""

from __future__ import annotations

import math
import numbers
import time
from typing import Any

import torch
from torch import Tensor

from ..monitor import LogWriter


def number(name: str, value: Any) -> float | Tensor:
    """A number as float; a tensor on an accelerator stays a tensor, detached.

    Raises:
        TypeError: it is no number, or a tensor with several elements.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise TypeError(
                f"expected a number for {name!r}, got a tensor of shape {tuple(value.shape)}: log its mean"
            )
        value = value.detach()
        return float(value) if value.device.type == "cpu" else value.reshape(())
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:  # numpy
        value = value.item()
    if isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            pass
    shown = " ".join(repr(value).split())
    raise TypeError(
        f"expected a number for {name!r}, got {type(value).__name__} ({shown:.40}): log numbers only"
    )


class PendingScalars:
    """Writes scalars; copies from an accelerator are asynchronous and written once they have arrived."""

    def __init__(self, log: LogWriter) -> None:
        self._log = log
        self._pending: list[tuple[int, float, str, Tensor, Any]] = []

    def add(self, step: int, values: dict[str, float | Tensor]) -> None:
        """Write what is on the host now, start to copy the rest."""
        now = time.time()
        ready = {name: float(v) for name, v in values.items() if not isinstance(v, Tensor)}
        if ready:
            self._log.scalars(step, now, ready)
        for name, value in values.items():
            if isinstance(value, Tensor):
                host = torch.empty((), dtype=value.dtype, pin_memory=True)
                host.copy_(value, non_blocking=True)
                event = torch.Event(value.device)
                event.record()
                self._pending.append((step, now, name, host, event))
        self.flush()

    def flush(self, *, wait: bool = False) -> None:
        """Write the copies that have arrived, in order; `wait` for all of them."""
        while self._pending:
            step, when, name, host, event = self._pending[0]
            if wait:
                event.synchronize()
            elif not event.query():
                return
            del self._pending[0]
            self._log.scalars(step, when, {name: float(host) if host.numel() else math.nan})
