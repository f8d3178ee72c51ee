"""Lengths of time and moments as people write them: 90s, 10min, 12h, 7d; 2026-11-20."""

from __future__ import annotations

import re
import time
from datetime import datetime

_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_LENGTH = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)", re.IGNORECASE)


def seconds_of(text: str) -> float:
    """The seconds in a length of time.

    Raises:
        ValueError: it is none.

    >>> seconds_of("10min"), seconds_of("1.5 h"), seconds_of("7d")
    (600.0, 5400.0, 604800.0)
    """
    found = _LENGTH.fullmatch(text.strip())
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise ValueError(f"expected a length of time such as 90s, 10min, 12h or 7d, got {text!r}")
    return float(found[1]) * unit


def moment_of(text: str, now: float | None = None) -> float:
    """Unix seconds of a moment: so long ago, or a date, with a time or not, of this machine's time zone.

    Raises:
        ValueError: it is neither.

    >>> moment_of("1h", now=10_000.0)
    6400.0
    """
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except ValueError:
        pass
    try:
        return (time.time() if now is None else now) - seconds_of(text)
    except ValueError:
        raise ValueError(
            f"expected how long ago, such as 12h or 7d, or a date such as 2026-11-20, got {text!r}"
        ) from None
