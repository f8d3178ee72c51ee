"""The loops over elements, and which run: compiled ones, or plain numpy where those are not to be had.

One switch for all: once a compiled loop cannot be had (numba is missing or broken, NUMBA_DISABLE_JIT is set,
it does not compile), `available` is False, the reason is logged, and numpy does everything, slower, with the
same answers. Double precision is always left to numpy (`plain`): it is rare, and all would be compiled twice.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from . import plain

logger = logging.getLogger("layerwatch")

_reason: str | None = None


def available() -> bool:
    """Compiled loops can be had, as far as is known by now."""
    return _reason is None


def describe() -> tuple[str, list[str]]:
    """Which loops run, "compiled" or "numpy", and what there is to say about it: for run.json."""
    if _reason is None:
        return "compiled", []
    return "numpy", [f"compiled kernels cannot be had, plain numpy runs instead, slower: {_reason}"]


class Kernel:
    """A compiled loop, loaded when first called, and the numpy function that takes its place.

    Args:
        module, name: where the loop is. Imported late: importing numba takes a third of a second.
        plain: takes the same arguments; None: whoever calls asks `available` beforehand.
    """

    def __init__(self, module: str, name: str, plain: Callable[..., Any] | None = None) -> None:
        self._module, self._name, self._plain = module, name, plain
        self._loop: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """The loop's result.

        Raises:
            RuntimeError: the loop cannot be had, and there is no numpy in its place.
        """
        if _reason is None and (arguments[0].dtype != np.float64 or self._plain is None):
            try:
                return self._compiled(arguments)
            except Exception as error:  # numba's are of many kinds; loops raise none of their own
                _give_up(error)
        if self._plain is None:
            raise RuntimeError(f"the compiled loop {self._name} cannot be had: {_reason}")
        return self._plain(*arguments)

    def _compiled(self, arguments: tuple[Any, ...]) -> Any:
        if self._loop is None:
            self._loop = getattr(importlib.import_module(f".{self._module}", __package__), self._name)
        try:
            return self._loop(*arguments)  # type: ignore[misc]
        except OSError:  # compiled, and only the cache could not be written
            return self._loop(*arguments)  # type: ignore[misc]


def _give_up(error: Exception) -> None:
    global _reason
    _reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    logger.warning("layerwatch's compiled kernels cannot be had, plain numpy runs instead: %s", _reason)


#: Exact zeros, and values outside of an interval, per unit; which units put out anything else than zero.
unit_counts = Kernel("loops", "unit_counts", plain.unit_counts)
active_units = Kernel("loops", "active_units", plain.active_units)
#: Adds a linear sketch, see `sketch`.
add_sketch = Kernel("loops", "add_sketch", plain.add_sketch)
#: `summary.quantiles` of many rows.
histogram_quantiles = Kernel("loops", "histogram_quantiles", plain.histogram_quantiles)
#: Checksums of TensorBoard's event files.
crc32c = Kernel("loops", "crc32c", plain.crc32c)
