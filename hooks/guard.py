"""Between our code and the training: errors stay with us, time is accounted for, compilers look away."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._C._dynamo.eval_frame import set_eval_frame

from . import termination
from .cadence import Cadence
from .live import StopTraining

_TORCH_FILE = str(Path(torch.__file__).parent / "_dynamo" / "eval_frame.py")
_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


def untraced(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which torch.compile runs as it is instead of compiling it.

    A hook that is called between two compiled parts of a training step would be compiled otherwise. It is
    what `torch.compiler.disable` does, at a tenth of its cost and without loading the compiler: frames of
    torch's own files are not compiled, and while compiling is switched off nothing below is.
    """

    @functools.wraps(work)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = set_eval_frame(None)
        try:
            return work(*args, **kwargs)
        finally:
            set_eval_frame(before)

    run.__code__ = run.__code__.replace(co_filename=_TORCH_FILE)  # type: ignore[attr-defined]
    return run


class Guard:
    """Wraps whatever the training calls.

    The work is timed, and any error in it ends the watching through `fail`, not the training. Nothing runs
    after that, nor in a forked child, which inherits the hooks and must leave the log alone.
    """

    def __init__(self, cadence: Cadence, fail: Callable[[Exception], None]) -> None:
        self.failed = False
        self._cadence, self._fail = cadence, fail
        self._forks = _forks

    def __call__(self, work: Callable[..., None], *, traced: bool = False) -> Callable[..., None]:
        """The guarded function. `traced`: who calls it is `untraced` already."""
        enter, leave = self._cadence.enter, self._cadence.leave

        @functools.wraps(work)
        def guarded(*args: Any, **kwargs: Any) -> None:
            if self.failed or self._forks != _forks:
                return
            enter()
            try:
                work(*args, **kwargs)
            except StopTraining:  # what the user wants
                raise
            except Exception as error:  # whatever it is, it must not reach the training
                self._fail(error)
            finally:
                leave()
                if termination.asked:
                    termination.go_on()

        return guarded if traced else untraced(guarded)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The same account of time for what the user calls."""
        self._cadence.enter()
        try:
            yield
        finally:
            self._cadence.leave()
            if termination.asked:
                termination.go_on()

    @property
    def forked(self) -> bool:
        """This is a child of the process that watches."""
        return self._forks != _forks
