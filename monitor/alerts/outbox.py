"""What waits for one channel, and when it is tried. Nothing here sends, sleeps or asks for the time."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .alert import Alert
from .channels import Undelivered
from .records import Record
from .routing import Quiet

#: After a failure the next attempt comes after so many seconds, then twice as many, up to the longest; an
#: error that lasts until somebody changes something begins with the longest. A random half of each pause is
#: left out, so that many trainings do not come back to a server at the same moment.
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 600.0
#: Alerts that wait; more are not taken.
ROOM = 10_000


@dataclass
class _Waiting:
    alert: Alert
    tried: float | None = None  # when it was sent for the first time, and did not arrive


class Outbox:
    """Every alert that is put in comes out in exactly one record `sent` or `not sent`, or waits.

    Args:
        channel: its name. quiet: when it rests. digest: seconds from one message to the next; what comes in
            between is one message. give_up: seconds for which a message is tried again.
        draw: a random number from 0 to 1.

    Times are unix seconds.
    """

    def __init__(
        self, channel: str, *, quiet: Quiet | None = None, digest: float = 0.0, give_up: float = 0.0,
        draw: Callable[[], float] = random.random,
    ) -> None:  # fmt: skip
        self.channel = channel
        self._quiet, self._digest, self._give_up, self._draw = quiet, digest, give_up, draw
        self._waiting: list[_Waiting] = []
        self._paused = self._next = 0.0  # nothing is sent from then to then
        self._failures = 0
        #: Why the latest attempt failed; "" after one that did not.
        self.trouble = ""

    @property
    def waiting(self) -> tuple[Alert, ...]:
        """What is not sent yet."""
        return tuple(w.alert for w in self._waiting)

    def put(self, alerts: Sequence[Alert], now: float) -> list[Record]:
        """Take these; what there is no room for, and what is held, is told."""
        room = max(0, ROOM - len(self._waiting))
        taken, left = alerts[:room], alerts[room:]
        self._waiting += [_Waiting(alert) for alert in taken]
        held = [alert for alert in taken if self._quiet and self._quiet.holds(alert, now)]
        records = []
        if held and self._quiet:
            records.append(self._record("held", held, now, f"quiet until {self._quiet.clock(now)}"))
        if left:
            records.append(self._record("not sent", left, now, f"{ROOM} others wait already"))
        return records

    def due(self, now: float, *, last: bool = False) -> tuple[Alert, ...]:
        """What is to be sent now, as one message. `last`: there will be no other moment."""
        if self._paused <= now < self._next and not last:  # or the clock was set back
            return ()
        return tuple(w.alert for w in self._waiting if not (self._quiet and self._quiet.holds(w.alert, now)))

    def wait(self, now: float) -> float | None:
        """Seconds until something may be due; None: nothing waits."""
        if not self._waiting:
            return None
        if self.due(max(now, self._next)):
            return max(0.0, self._next - now)
        return max(0.0, self._quiet.ends(now) - now) if self._quiet else 0.0

    def sent(self, batch: Sequence[Alert], now: float, remark: str = "") -> Record:
        """These have arrived."""
        if self._failures:
            remark = ", ".join(part for part in (f"attempt {self._failures + 1}", remark) if part)
        self._failures, self.trouble = 0, ""
        self._paused, self._next = now, now + self._digest
        self._remove(batch)
        return self._record("sent", batch, now, remark)

    def failed(self, batch: Sequence[Alert], error: Undelivered, now: float) -> list[Record]:
        """These have not: they are tried again, or given up."""
        self._failures += 1
        self.trouble = str(error)
        ours = {id(alert) for alert in batch}
        tried = [w for w in self._waiting if id(w.alert) in ours]
        for one in tried:
            one.tried = now if one.tried is None else one.tried
        pause = min(FIRST_PAUSE * 2.0 ** min(self._failures - 1, 20), LONGEST_PAUSE)
        pause = (LONGEST_PAUSE if error.lasting else pause) * (0.5 + 0.5 * self._draw())
        self._paused, self._next = now, now + max(pause, min(error.after, max(self._give_up, 0.0)))
        over = [w.alert for w in tried if w.tried is not None and now - w.tried >= self._give_up]
        self._remove(over)
        left = [w.alert for w in self._waiting if id(w.alert) in ours]
        records = []
        if over:
            times = f"{self._failures} attempts" if self._failures > 1 else "1 attempt"
            records.append(self._record("not sent", over, now, f"{error}; {times}"))
        if left and self._failures == 1:
            records.append(self._record("delayed", left, now, f"{error}; it is tried again"))
        return records

    def give_up(self, now: float, reason: str) -> list[Record]:
        """Nothing more will be sent."""
        left = self.waiting
        self._waiting = []
        why = "; ".join(part for part in (self.trouble, reason) if part)
        return [self._record("not sent", left, now, why)] if left else []

    def restore(self, waiting: Sequence[tuple[Alert, float | None]]) -> None:
        """What `state` told."""
        self._waiting = [_Waiting(alert, tried) for alert, tried in waiting]

    def state(self) -> list[tuple[Alert, float | None]]:
        """What waits, and since when it is tried."""
        return [(w.alert, w.tried) for w in self._waiting]

    def _remove(self, alerts: Sequence[Alert]) -> None:
        gone = {id(alert) for alert in alerts}
        self._waiting = [w for w in self._waiting if id(w.alert) not in gone]

    def _record(self, outcome: str, alerts: Sequence[Alert], now: float, reason: str) -> Record:
        return Record(outcome, self.channel, tuple(alerts), now, reason)  # pyright: ignore[reportArgumentType]
