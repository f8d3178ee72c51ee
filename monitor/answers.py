"""Answers that are kept for the next time they are asked for, in bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import is_dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd

Result = TypeVar("Result")
#: What an answer weighs of which nothing better is known.
SMALL = 1000


class Answers:
    """The answers used last, up to so many bytes; the newest one whatever it weighs. Safe among threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], Result]) -> Result:
        """What is kept under this key, else what `make` gives. Two threads may make it at the same time."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        value = make()
        size = weight(value)
        with self._lock:
            self.used += size - self._kept.pop(key, (None, 0))[1]
            self._kept[key] = value, size
            while self.used > self.limit and len(self._kept) > 1:
                self.used -= self._kept.popitem(last=False)[1][1]
        return value

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self.used = 0


def weight(value: object) -> int:
    """The bytes of an answer, about: those of its arrays and frames."""
    if isinstance(value, np.ndarray):
        return SMALL + value.nbytes
    if isinstance(value, pd.DataFrame):
        return SMALL + int(value.memory_usage(deep=False).sum())
    if isinstance(value, (tuple, list)):
        return SMALL + sum(weight(part) for part in value[:SMALL])
    if isinstance(value, dict):
        return SMALL + sum(weight(part) for part in list(value.values())[:SMALL])
    if is_dataclass(value):
        return SMALL + sum(weight(part) for part in vars(value).values())
    return SMALL
