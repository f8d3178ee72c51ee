"""The detectors without one of their guards, to see what it is worth. Patched from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from unittest.mock import patch

import layerwatch.monitor.detectors as detectors
from layerwatch.monitor.detectors import history, outcome
from layerwatch.monitor.detectors.history import History
from layerwatch.monitor.detectors.registry import Detector

#: Detectors whose problem is an outcome itself.
OF_OUTCOME = ("not_learning", "overfitting", "regression", "nonfinite", "loss_spike")


@contextmanager
def without_roles() -> Iterator[None]:
    """Every tensor with two axes is a matrix like any other: embeddings, LoRA, what is frozen."""

    def names(self: History, *roles: str) -> tuple[str, ...]:
        table = self.tensors
        if not roles:
            return tuple(table.index)
        wide = table["shape"].map(len) >= 2
        return tuple(table.index[wide if "matrix" in roles else table["role"].isin(roles)])

    with patch.object(History, "names", names):
        yield


@contextmanager
def without_gate() -> Iterator[None]:
    """Every training counts as failing when a mechanism is judged."""
    registered = detectors.registered

    def always_bad(detector: Detector) -> Detector:
        def ask(seen: History) -> object:
            real = outcome.outcome(seen)
            seen.__dict__["outcome"] = replace(real, stalled=True)
            try:
                return detector(seen)
            finally:
                seen.__dict__["outcome"] = real

        return ask  # type: ignore[return-value]

    def patched() -> tuple[list[tuple[str, Detector]], list[str]]:
        table, notes = registered()
        return [(p, d if p in OF_OUTCOME else always_bad(d)) for p, d in table], notes

    with patch.object(detectors, "registered", patched):
        yield


@contextmanager
def without_persistence() -> Iterator[None]:
    """One capture is enough."""
    kept = history.persistent.__defaults__, history.lasting.__defaults__
    history.persistent.__defaults__ = history.lasting.__defaults__ = (1,)
    try:
        yield
    finally:
        history.persistent.__defaults__, history.lasting.__defaults__ = kept


ABLATIONS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "roles": without_roles,
    "gate": without_gate,
    "persistence": without_persistence,
}
