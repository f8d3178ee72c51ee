"""When to capture: every N-th optimizer step, or as often as a budget of the training's time allows."""

from __future__ import annotations

import math
import time
from typing import Any

from .sketch import AnchorSketches

Every = int | str

#: Captured one after another after an accident or a new finding, as far as the budget allows.
DENSE = 10
#: "auto" may borrow the budget of so many steps for captures that matter, and pays it back afterwards.
HORIZON = 300
#: However much is owed, captures are not further apart than this many steps plus the usual interval.
LONGEST_PAUSE = 1000


class Cadence:
    """Decides, when a step ends, which step is captured next.

    Args:
        every: N for every N-th step (0, N, 2 N, ...) or "auto".
        budget: for "auto", the share of the training's time that monitoring may take, in (0, 1).
        anchors: steps that are captured in any case.
        aligned: several processes decide alone and must hit the same steps: distances are powers of two and
            steps their multiples, so that the steps of one are among those of any that captures more often.

    Raises:
        ValueError: `every` or `budget` is out of range.

    "auto" keeps an account: each step earns budget x time of a step, all that monitoring does is debited, and
    the next capture waits until its expected cost is covered. Two kinds of captures may overdraw it:

    - early ones (at steps 0, 1, ..., 8, 10, 12, ..., each an eighth later than the one before), by what the
      steps up to `HORIZON` will earn: from there on the budget holds;
    - `DENSE` steps after an accident or a new finding, by what the next `HORIZON` steps earn.

    The very first capture is not learned from: caches are cold, kernels are loaded, and it writes the initial
    weights as well. What the first `HORIZON` steps do not pay of it is paid off with half of what is earned,
    so that it cannot end the monitoring.
    Costs and step times are running means that forget (factor 0.3 per capture).

    With N, no budget applies: the step of an accident and the `DENSE` steps after it are captured too.
    """

    def __init__(
        self, every: Every, budget: float, anchors: AnchorSketches | None = None, *, aligned: bool = False
    ) -> None:
        if every != "auto" and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ValueError(f'expected every="auto" or a whole number of steps from 1, got every={every!r}')
        if not isinstance(budget, int | float) or not 0.0 < budget < 1.0:
            raise ValueError(
                f"expected a budget between 0 and 1 (a share of the training's time), got budget={budget!r}"
            )
        self.every, self.budget, self._anchors, self._aligned = every, budget, anchors, aligned
        self._idle = False
        self.captures = 0
        self._next = 0  # "auto": the next step to capture
        self._dense_from = self._dense_until = -1
        self._first: int | None = None
        self._started: float | None = None
        self._spent = 0.0
        self._entered: float | None = None
        self._mean_cost = self._mean_step = math.nan
        self._owed = self._cold = 0.0
        self._last: tuple[int, float, float] | None = None  # step, clock, seconds spent until then
        self._judging = 0.0
        self._left_out = -1
        self._beside = 0.0

    def wants(self, step: int) -> bool:
        """Is this step captured?"""
        if step == self._left_out or self._idle:
            return False
        if self._anchors is not None and self._anchors.wants(step):
            return True
        if self.every == "auto":
            return step >= self._next
        return step % self.every == 0 or self._dense_from <= step <= self._dense_until  # type: ignore[operator]

    def suspend(self) -> None:
        """There is nothing to capture here: others do it."""
        self._idle = True

    @property
    def suspended(self) -> bool:
        """Nothing is captured."""
        return self._idle

    def look_closer(self, step: int, *, now: bool) -> None:
        """Capture the steps after this one densely; `now`: and this one, whatever it costs."""
        self._dense_from, self._dense_until = step + (not now), step + DENSE
        if self.every == "auto":
            self._next = step if now else min(self._next, self._planned(step))

    def enter(self) -> None:
        """Monitoring begins to take time."""
        self._entered = time.perf_counter()
        if self._started is None:
            self._started = self._entered

    def leave(self) -> None:
        """Monitoring gives the time back to the training."""
        if self._entered is not None:
            self._spent += time.perf_counter() - self._entered
            self._entered = None

    @property
    def busy(self) -> bool:
        """Monitoring is at work right now."""
        return self._entered is not None

    def leave_out(self, step: int) -> None:
        """Do not capture this step: there is no room for it in the log."""
        self._left_out = step

    def worked_beside(self, seconds: float) -> None:
        """What other threads of ours have taken so far counts as well."""
        self._spent += seconds - self._beside
        self._beside = seconds

    def judged(self, seconds: float) -> None:
        """So long of the time since `enter` the run was judged: that has a share of its own (see `live`), and
        takes no captures away."""
        self._judging += seconds
        if self._entered is not None:
            self._entered += seconds
        if self._last is not None:  # nor does it make steps look longer
            step, clock, used = self._last
            self._last = step, clock + seconds, used

    def _used(self, now: float) -> float:
        return self._spent + (now - self._entered if self._entered is not None else 0.0)

    def captured(self, step: int, cost: float) -> None:
        """A capture was written, in so many seconds: plan the next one."""
        now = time.perf_counter()
        used = self._used(now)
        self.captures += 1
        if self._last is None:
            self._first, self._cold = step, used
        elif step > self._last[0]:
            last, clock, before = self._last
            self._mean_cost = _running(self._mean_cost, cost)
            taken = (now - clock - (used - before)) / (step - last)
            # A pause (a validation, a notebook left alone) is not a step: what it earns is limited.
            self._mean_step = _running(self._mean_step, min(taken, 4 * self._mean_step) or taken)
            self._settle(step - last, used - before)
        self._last = (step, now, used)
        if self.every == "auto":
            self._next = self._planned(step)

    def _settle(self, steps: int, spent: float) -> None:
        """Debit what was spent since the last capture, credit what the steps since then have earned."""
        if self.captures == 2:  # what a step earns is known now: as much of the first one as can be paid soon
            soon = min(self._cold, self._earns * HORIZON)
            self._owed, self._cold = soon, self._cold - soon
        earned = self.budget * (steps * self._mean_step + spent)
        towards_first = min(self._cold, earned / 2)
        self._cold -= towards_first
        most = self._earns * LONGEST_PAUSE
        self._owed = min(max(self._owed + spent - (earned - towards_first), -self._mean_cost), most)

    @property
    def _earns(self) -> float:
        """Seconds of monitoring that a step pays for."""
        return self.budget * max(self._mean_step, 1e-9)

    def _planned(self, step: int) -> int:
        if math.isnan(self._mean_step):
            return step + 1
        rate = self._earns / 2 if self._cold > 0 else self._earns
        need = self._owed + self._mean_cost
        interval = math.ceil(need / rate)
        since = step - (self._first or 0)
        if need <= self._earns * (HORIZON - since):
            interval = min(interval, since // 8)
        if self._dense_from - 1 <= step < self._dense_until:
            interval = min(interval, math.ceil((need - self._earns * HORIZON) / rate))
        if self._aligned and interval > 1:
            grid = 1 << (interval - 1).bit_length()
            return (step // grid + 1) * grid
        return step + max(1, interval)

    @property
    def overhead(self) -> float:
        """Share of the time since the first capture that monitoring took, judging included, in [0, 1]."""
        if self._started is None:
            return 0.0
        now = time.perf_counter()
        return (self._used(now) + self._judging) / max(now - self._started, 1e-9)

    @property
    def interval(self) -> float | None:
        """Mean number of steps between two captures so far; None before the second one."""
        if self.captures < 2 or self._last is None or self._first is None:
            return None
        return (self._last[0] - self._first) / (self.captures - 1)

    def describe(self) -> dict[str, Any]:
        """What came of it, for run.json."""
        return {"captures": self.captures, "mean_interval": self.interval, "overhead": self.overhead}

    def words(self) -> str:
        """The same, for the log."""
        took = f"monitoring took {100 * self.overhead:.2g} % of the time"
        if self.interval is None:
            return took
        return f"{took}; {self.captures} captures, one in {self.interval:.3g} steps"


def _running(mean: float, value: float) -> float:
    return value if math.isnan(mean) else mean + 0.3 * (value - mean)
