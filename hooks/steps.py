"""Which step it is: counted by optimizer steps, over several optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

from torch.optim import Optimizer


class End(Enum):
    """What the end of an optimizer's step means for the step of the run."""

    WAIT = "others have yet to step"
    COMPLETE = "all that were expected have stepped"
    LATE = "it was complete already; this optimizer was not expected"


class Steps:
    """Counts from `first`; a step begins when an optimizer that was counted already steps again.

    So a GAN's optimizers, or one optimizer for each parameter, share a step. The step is complete when every
    optimizer that stepped in both of the two steps before has stepped again: one that steps now and then is
    not waited for, as the step would be known to be complete only when the next one begins. In the first step
    all are waited for.
    """

    def __init__(self, first: int) -> None:
        self.number = self.first = first
        self.complete = False
        self._ended: set[int] = set()  # ids of optimizers whose step of this number has ended
        self._before: list[set[int]] = []  # those of the last two steps

    @property
    def coming(self) -> int:
        """The step that a gradient which is changed now belongs to, if no optimizer's own step says more."""
        return self.number + self.complete

    def is_next(self, optimizer: Optimizer) -> bool:
        """When this optimizer steps, the next step begins. One whose step an error ended makes it again."""
        return id(optimizer) in self._ended

    def has_stepped(self, optimizer: Optimizer) -> bool:
        """Its step of this number has ended (inside a closure it has only begun)."""
        return id(optimizer) in self._ended

    def advance(self) -> None:
        """Go on to the next step."""
        self._before = [*self._before[-1:], self._ended]
        self._ended, self.complete = set(), False
        self.number += 1

    def end(self, optimizer: Optimizer, known: Sequence[Optimizer], all_known: Callable[[], bool]) -> End:
        """This optimizer has stepped.

        Args:
            optimizer: it.
            known: all that have been seen, or given.
            all_known: can there be no other? Asked in the first step only.
        """
        self._ended.add(id(optimizer))
        if self.complete:
            return End.LATE
        if not self._before:
            expected = {id(o) for o in known}
            if not all_known():
                return End.WAIT
        else:
            expected = set.intersection(*self._before)
        if expected <= self._ended:
            self.complete = True
            return End.COMPLETE
        return End.WAIT

    def waiting(self, known: Sequence[Optimizer]) -> list[Optimizer]:
        """Those that have not stepped in this step."""
        return [o for o in known if id(o) not in self._ended]

    @property
    def any_ended(self) -> bool:
        """An optimizer has stepped in this step."""
        return bool(self._ended)
