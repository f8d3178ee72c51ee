"""Tells people: each alert to the channels of its routes, once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from .alert import Alert
from .config import Config
from .delivery import Delivery
from .records import Record
from .routing import Ledger, receivers


class Teller:
    """Knows who was told of what. Tell it of a problem as often as you see it.

    Args:
        config: channels and routes. note: told of what becomes of the messages, mostly by another thread.
        clock: the time, in unix seconds.
    """

    def __init__(
        self, config: Config, note: Callable[[Record], None], *, clock: Callable[[], float] = time.time
    ) -> None:
        self.config, self.ledger = config, Ledger(config.repeat)
        self.delivery = Delivery(config, note, clock=clock)
        self._clock = clock

    def tell(self, alerts: Iterable[Alert]) -> None:
        """Send what is news."""
        letters: dict[str, list[Alert]] = {}
        for alert in alerts:
            for name in self.receivers(alert):
                letters.setdefault(name, []).append(alert)
        self.delivery.put(letters)

    def receivers(
        self, alert: Alert, *, lasts: bool = True, leave: Callable[[str], bool] | None = None
    ) -> list[str]:
        """The channels to which it is news, and from now on is not.

        Args:
            lasts: the problem goes on, so that it may be told again. leave: not to this channel.
        """
        now, found = self._clock(), []
        for name in receivers(self.config.routes, alert):
            if self.ledger.is_news(alert, name, now, lasts=lasts) and not (leave and leave(name)):
                self.ledger.mark(alert, name, now)
                found.append(name)
        return found
