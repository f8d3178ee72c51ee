"""Between our code and the training: errors stay with us, time is accounted for, compilers look away."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from .cadence import Cadence


def untraced(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which torch.compile runs as it is instead of compiling it.

    A hook that is called between two compiled parts of a training step would be compiled otherwise. Without
    torch._dynamo in memory nothing compiles, and we do not load it (seconds); every torch optimizer does.
    """
    dynamo = sys.modules.get("torch._dynamo")
    return work if dynamo is None else dynamo.disable(work)


class Guard:
    """Wraps whatever the training calls.

    The work is timed, and any error in it ends the watching through `fail`, not the training. Nothing runs
    after that, nor in a forked child, which inherits the hooks and must leave the log alone.
    """

    def __init__(self, cadence: Cadence, fail: Callable[[Exception], None]) -> None:
        self.failed = False
        self._cadence, self._fail = cadence, fail
        self._process = os.getpid()

    def __call__(self, work: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(work)
        def guarded(*args: Any, **kwargs: Any) -> None:
            if self.failed or self.forked:
                return
            self._cadence.enter()
            try:
                work(*args, **kwargs)
            except Exception as error:  # whatever it is, it must not reach the training
                self._fail(error)
            finally:
                self._cadence.leave()

        return untraced(guarded)

    @property
    def forked(self) -> bool:
        """This is a child of the process that watches."""
        return os.getpid() != self._process
