"""Jumps of a noisy series, judged against its own recent past."""

from __future__ import annotations

import math
import sys
from collections import deque

#: Values whose median is the usual value, excursions from it that are remembered, and the fewest values that
#: a judgement takes.
LEVEL, MEMORY, LEAST = 50, 500, 20
#: A value must rise above the usual one by so many times what the largest remembered excursion did.
GAP = 2.0
#: Part of what was gained since the start that a jump must undo: the odd batch of a loss near zero does not.
UNDONE = 0.1
#: The limit is computed anew after so many values, as sorting costs more than comparing.
_REFRESH = 16
_LARGEST = sys.float_info.max


class Jumps:
    """Feeds on a series and tells its upward jumps.

    Args:
        least: the smallest factor of the usual value that counts as a jump.

    With m the median and s the median modulus of the last `LEVEL` finite values, a value x has the excursion
    e = asinh(x / s) - asinh(m / s). It jumps when e exceeds both `GAP` x the largest of the last `MEMORY`
    excursions and asinh(least) - asinh(1), and when x lies above m by a tenth of what the series has come
    down since its first values.

    Some 48 values are needed before the first judgement.

    It is a gap test in the sense of Dixon (1950, "Analysis of extreme values"): the distance of the suspect
    from the rest, as a part of its distance from the middle, is more than one half. Being a ratio it has no
    unit; the series' own largest excursion stands for its noise, which no multiple of a standard deviation
    does where tails are heavy. asinh (Johnson 1949) is a logarithm that takes negative values as well: losses
    of reinforcement learning, log-likelihoods.
    """

    def __init__(self, least: float) -> None:
        self._least = math.asinh(least) - math.asinh(1.0)
        self._start: float | None = None
        self._origin = 0.0
        self.reset()

    def reset(self) -> None:
        """Forget the recent past: the series is about to change for a known reason."""
        self._values: deque[float] = deque(maxlen=LEVEL)
        self._excursions: deque[float] = deque(maxlen=MEMORY)
        self._new: list[float] = []  # not looked at yet
        self._limit, self._scale = _LARGEST, 0.0
        self.usual = math.nan

    def passes(self, value: float) -> bool:
        """Take the value if it plainly does not jump; else leave it to `add`."""
        if value <= self._limit and len(self._new) < _REFRESH:  # false for NaN and infinity
            self._new.append(value)
            return True
        return False

    def add(self, value: float) -> bool:
        """The next value of the series; True when it jumps. Those that are not finite are left out."""
        if self.passes(value) or not math.isfinite(value):
            return False
        self._refresh()
        self._new.append(value)
        return value > self._limit

    def _refresh(self) -> None:
        if self._scale > 0:
            self._excursions.extend(math.asinh(v / self._scale) - self._origin for v in self._new)
        self._values.extend(self._new)
        self._new, self._limit = [], _LARGEST
        if len(self._values) < LEAST // 2:
            return
        ordered = sorted(self._values)
        self.usual = middle = ordered[len(ordered) // 2]
        self._scale = middle if ordered[0] >= 0 else sorted(map(abs, ordered))[len(ordered) // 2]
        if self._start is None:
            self._start = middle
        if self._scale <= 0:
            return  # mostly exact zeros: nothing to compare with
        self._origin = math.asinh(middle / self._scale)
        if len(self._excursions) < LEAST:
            return
        rise = max(GAP * max(self._excursions), self._least)
        limit = self._scale * math.sinh(min(self._origin + rise, 700.0))
        self._limit = max(limit, middle + UNDONE * (self._start - middle))
