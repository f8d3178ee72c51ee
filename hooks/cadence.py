"""When to capture: every N-th optimizer step, or as often as a budget of the training's time allows."""

from __future__ import annotations

import math
import time

Every = int | str


class Cadence:
    """Decides, when a step ends, which step is captured next.

    Args:
        every: N for every N-th step (0, N, 2 N, ...) or "auto".
        budget: for "auto", the share of the training's time that captures may take, in (0, 1).

    Raises:
        ValueError: `every` or `budget` is out of range.

    With "auto" the next capture waits until the captures' cost, averaged over the steps up to it, is within
    the budget: interval = cost of a capture / (budget x time of a step), both as running means that forget
    (factor 0.3 per capture).
    """

    def __init__(self, every: Every, budget: float) -> None:
        if every != "auto" and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ValueError(f'expected every="auto" or a whole number of steps from 1, got every={every!r}')
        if not isinstance(budget, int | float) or not 0.0 < budget < 1.0:
            raise ValueError(
                f"expected a budget between 0 and 1 (a share of the training's time), got budget={budget!r}"
            )
        self.every, self.budget = every, budget
        self.interval = every if isinstance(every, int) else 1
        self._next = 0
        self._started: float | None = None
        self._spent = 0.0
        self._entered: float | None = None
        self._mean_cost = self._mean_step = math.nan
        self._last: tuple[int, float, float] | None = None  # step, clock, seconds spent until then

    def wants(self, step: int) -> bool:
        """Is this step captured?"""
        if isinstance(self.every, int):
            return step % self.every == 0
        return step >= self._next

    def enter(self) -> None:
        """Monitoring begins to take time."""
        self._entered = time.perf_counter()
        self._started = self._started or self._entered

    def leave(self) -> None:
        """Monitoring gives the time back to the training."""
        self._spent, self._entered = self._used(time.perf_counter()), None

    def _used(self, now: float) -> float:
        return self._spent + (now - self._entered if self._entered is not None else 0.0)

    def captured(self, step: int, cost: float) -> None:
        """A capture was written: plan the next one."""
        now = time.perf_counter()
        used = self._used(now)
        if self._last is not None and step > self._last[0]:
            # The first one is not learned from: caches are cold, and it writes the initial weights as well.
            self._mean_cost = _running(self._mean_cost, cost)
            before, clock, used_before = self._last
            self._mean_step = _running(
                self._mean_step, (now - clock - (used - used_before)) / (step - before)
            )
        self._last = (step, now, used)
        if self.every == "auto":
            if not math.isnan(self._mean_step):
                allowance = self.budget * max(self._mean_step, 1e-9)
                self.interval = max(1, math.ceil(self._mean_cost / allowance))
            in_debt = self.overhead > self.budget  # the first, dense captures are paid back at half speed
            self._next = step + self.interval * (2 if in_debt else 1)

    @property
    def overhead(self) -> float:
        """Share of the wall time since the first capture that monitoring took, in [0, 1]."""
        if self._started is None:
            return 0.0
        now = time.perf_counter()
        return self._used(now) / max(now - self._started, 1e-9)


def _running(mean: float, value: float) -> float:
    return value if math.isnan(mean) else mean + 0.3 * (value - mean)
