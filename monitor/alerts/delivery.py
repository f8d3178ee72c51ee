"""Messages on their way: a thread for each channel, so that a dead one delays nobody."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from .alert import Alert
from .channels import TIMEOUT, Channel, Undelivered
from .config import Config
from .message import Message
from .outbox import Outbox
from .records import Record

logger = logging.getLogger("layerwatch")

#: Clocks may be set: what is due is looked at again after so many seconds.
LOOK_SECONDS = 30.0
#: What the last attempt of a channel may take at least, whatever the others have taken.
LEAST_SECONDS = 0.1


class Delivery:
    """Takes alerts at once, and sends them behind whoever gave them.

    Args:
        config: the channels and their habits.
        note: told of every record, mostly by another thread.
        clock: the time, in unix seconds.
    """

    def __init__(
        self, config: Config, note: Callable[[Record], None], *, clock: Callable[[], float] = time.time
    ) -> None:
        self._couriers = {
            name: _Courier(channel, config, note, clock) for name, channel in config.channels.items()
        }
        self._process = os.getpid()

    def put(self, letters: Mapping[str, Sequence[Alert]]) -> None:
        """Send these, by the names of channels; each channel's in one message, if nothing else is said."""
        for name, alerts in letters.items():
            if alerts:
                self._couriers[name].put(alerts)

    def settle(self, timeout: float) -> None:
        """Wait until every channel has made its attempt on what is due, for so many seconds at most."""
        end = time.monotonic() + timeout
        for courier in self._couriers.values():
            courier.idle.wait(max(0.0, end - time.monotonic()))

    def close(self, timeout: float, reason: str, *, tell: bool = True) -> None:
        """Make one last attempt within so many seconds; what is left is recorded as not sent.

        Args:
            tell: off, what is left is nobody's loss: it is in `state`, and is sent later.
        """
        if os.getpid() != self._process:  # a forked child has no such threads
            return
        end = time.monotonic() + timeout
        for courier in self._couriers.values():
            courier.end()
        for courier in self._couriers.values():
            courier.join(max(LEAST_SECONDS, end - time.monotonic()))
        for courier in self._couriers.values():
            courier.abandon(reason if tell else None)

    def state(self) -> dict[str, list[tuple[Alert, float | None]]]:
        """What waits for which channel, and since when it is tried."""
        return {name: courier.state() for name, courier in self._couriers.items()}

    def restore(self, state: Mapping[str, Sequence[tuple[Alert, float | None]]]) -> None:
        """Go on with what `state` told, as far as the channels are still there."""
        for name, waiting in state.items():
            if name in self._couriers and waiting:
                self._couriers[name].restore(waiting)


class _Courier:
    """One channel's: its outbox, and a thread that lives from the first alert to the end."""

    def __init__(
        self, channel: Channel, config: Config, note: Callable[[Record], None], clock: Callable[[], float]
    ) -> None:
        self._channel, self._note, self._clock = channel, note, clock
        self._outbox = Outbox(channel.name, quiet=config.quiet, digest=config.digest, give_up=config.give_up)
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ending = self._abandoned = False
        #: Nothing is due at the moment.
        self.idle = threading.Event()
        self.idle.set()

    def put(self, alerts: Sequence[Alert]) -> None:
        with self._change:
            records = self._outbox.put(alerts, self._clock())
            self._start()
        self._tell(records)

    def restore(self, waiting: Sequence[tuple[Alert, float | None]]) -> None:
        with self._change:
            self._outbox.restore(waiting)
            self._start()

    def _start(self) -> None:
        self.idle.clear()
        if self._thread is None and not self._ending:
            name = f"layerwatch-alerts-{self._channel.name}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            with contextlib.suppress(RuntimeError):  # Python is about to end, or there is no room: see `join`
                thread.start()
                self._thread = thread
        self._change.notify()

    def state(self) -> list[tuple[Alert, float | None]]:
        with self._change:
            return self._outbox.state()

    def end(self) -> None:
        with self._change:
            self._ending = True
            self._change.notify()

    def join(self, timeout: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout)
        else:  # there was nothing to send, or no thread to be had
            self._work(timeout)

    def abandon(self, reason: str | None) -> None:
        with self._change:
            self._abandoned = True
            records = [] if reason is None else self._outbox.give_up(self._clock(), reason)
        self._tell(records)

    def _work(self, timeout: float = TIMEOUT) -> None:
        while batch := self._next():
            failure, remark = self._attempt(batch, timeout)
            with self._change:
                if self._abandoned:  # nobody waited for it: it is on record as not sent
                    return
                now = self._clock()
                if failure is None:
                    records = [self._outbox.sent(batch, now, remark)]
                else:
                    records = self._outbox.failed(batch, failure, now)
            self._tell(records)
            if failure is not None and self._ending:
                return

    def _attempt(self, batch: Sequence[Alert], timeout: float) -> tuple[Undelivered | None, str]:
        try:
            return None, self._channel.send(Message(batch), timeout)
        except Undelivered as error:
            return error, ""
        except Exception as error:  # ours: what it says may hold anything
            return Undelivered(f"an error of layerwatch: {type(error).__name__}"), ""

    def _next(self) -> tuple[Alert, ...]:
        """What is to be sent, when it is time; () at the end."""
        with self._change:
            while True:
                now = self._clock()
                if batch := self._outbox.due(now, last=self._ending):
                    return batch
                self.idle.set()
                if self._ending:
                    return ()
                wait = self._outbox.wait(now)
                self._change.wait(LOOK_SECONDS if wait is None else min(wait, LOOK_SECONDS))

    def _tell(self, records: Sequence[Record]) -> None:
        """Not while the lock is held: whoever is told may ask for the state."""
        for record in records:
            if record.outcome == "delayed" or record.outcome == "not sent":
                logger.warning("alert %s", record.line(runs=True))
            self._note(record)
