"""Scalars on their way into the log; those on an accelerator arrive when they are ready."""

from __future__ import annotations

import numbers
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..monitor import LogWriter
from .shards import value_of


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
        whole = value_of(value.detach()) if hasattr(value, "placements") else value.detach()
        if whole is None:
            raise TypeError(
                f"expected a number for {name!r}, got one of which every rank holds a part: "
                "log its .full_tensor()"
            )
        value = whole
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


def number_in(loss: Tensor | None) -> float | Tensor | None:
    """The number in a loss: as it is on the host, detached on an accelerator; None when it holds none."""
    if type(loss) is not Tensor or loss.numel() != 1:
        return None
    if loss.is_cpu:
        value = loss.item()
        return value if isinstance(value, float) else None
    return None if loss.is_meta or loss.is_complex() else loss.detach()


Key = TypeVar("Key")


class Arrivals(Generic[Key]):
    """Numbers on their way from an accelerator to the host, in order; nobody waits for them."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Key, Tensor, Any]] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def send(self, key: Key, value: Tensor) -> None:
        """Start to copy a tensor with one element."""
        self._pending.append((key, *start_copy(value)))

    def take(self, *, wait: bool = False) -> Iterator[tuple[Key, float]]:
        """The copies that have arrived; `wait` for all of them."""
        while self._pending:
            key, host, event = self._pending[0]
            if wait:
                event.synchronize()
            elif not event.query():
                return
            self._pending.popleft()
            yield key, float(host)


def start_copy(value: Tensor) -> tuple[Tensor, Any]:
    """An asynchronous copy in pinned memory, and the event that tells when it is there."""
    host = torch.empty((), dtype=value.dtype, pin_memory=True)
    host.copy_(value.detach().reshape(()), non_blocking=True)
    event = torch.Event(value.device)
    event.record()
    return host, event


class PendingScalars:
    """Writes scalars; those on an accelerator once their copies have arrived."""

    def __init__(self, log: LogWriter) -> None:
        self._log = log
        self._arrivals: Arrivals[tuple[int, float, str]] = Arrivals()

    def add(self, step: int, values: dict[str, float | Tensor]) -> None:
        """Write what is on the host now, start to copy the rest."""
        now = time.time()
        ready = {name: float(v) for name, v in values.items() if not isinstance(v, Tensor)}
        if ready:
            self._log.scalars(step, now, ready)
        for name, value in values.items():
            if isinstance(value, Tensor):
                self._arrivals.send((step, now, name), value)
        self.flush()

    @property
    def pending(self) -> Arrivals:
        """Those that have not arrived; false when there is none."""
        return self._arrivals

    def flush(self, *, wait: bool = False) -> None:
        """Write the copies that have arrived, in order; `wait` for all of them."""
        if not self._arrivals:
            return
        for (step, when, name), value in self._arrivals.take(wait=wait):
            self._log.scalars(step, when, {name: value})
