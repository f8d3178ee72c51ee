"""How loops are compiled: numba, kept on disk, told of before it takes its time. Imports numba."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from numba import config, njit
from numba.core import event

logger = logging.getLogger("layerwatch")

Loop = TypeVar("Loop", bound=Callable[..., Any])

#: Sums may be reordered; NaN and infinities must stay what they are.
REORDERED = {"reassoc", "contract", "nsz", "arcp"}
#: What it takes to compile for a training, measured on one core.
SECONDS = 12

if config.DISABLE_JIT:  # type: ignore[attr-defined]  # the loops would run, thousands of times slower than numpy
    raise RuntimeError("NUMBA_DISABLE_JIT is set")

_kept = True


def kernel(fastmath: set[str] | bool = False) -> Callable[[Loop], Loop]:
    """A loop that is called from Python: compiled when first called, and kept on disk if a folder can be
    written."""

    def compile_(loop: Loop) -> Loop:
        global _kept
        try:
            return njit(cache=True, nogil=True, fastmath=fastmath)(loop)  # type: ignore[return-value]
        except RuntimeError:  # a read-only installation without a home: compile in every process
            _kept = False
            return njit(nogil=True, fastmath=fastmath)(loop)  # type: ignore[return-value]

    return compile_


def part(fastmath: set[str] | bool = False) -> Callable[[Loop], Loop]:
    """A function that kernels of the same file call; Python cannot, which spares compiling the way there."""
    return njit(nogil=True, fastmath=fastmath, no_cpython_wrapper=True, no_cfunc_wrapper=True)  # type: ignore[return-value]


class _Announce(event.Listener):
    """Says that compiling begins, once and only if it does: what the cache holds is not compiled."""

    def on_start(self, event: Any) -> None:
        loop = getattr(event.data["dispatcher"], "py_func", None)
        if getattr(loop, "__module__", None) == f"{__package__}.sweep_loops":  # the others take a second
            _unregister()
            often = (
                "once on this machine" if _kept else "in every process, as no folder for a cache is writable"
            )
            logger.warning("compiling layerwatch's kernels, %s: about %d s", often, SECONDS)

    def on_end(self, event: Any) -> None:
        pass


_listener = _Announce()
event.register("numba:compile", _listener)


def _unregister() -> None:
    event.unregister("numba:compile", _listener)
