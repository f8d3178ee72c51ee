"""How times and names are written; numbers as `monitor.wording` does."""

from __future__ import annotations

import math
import time

import numpy as np

from ..monitor.wording import MISSING, integer, number, share

__all__ = ["MISSING", "age", "duration", "integer", "number", "rounded", "share", "short", "words"]


def duration(seconds: float | None) -> str:
    """A time span in its two largest units: 45 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return MISSING
    if seconds < 10:
        return f"{number(seconds)} s"
    whole = round(seconds)
    for size, unit, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit} {rest} {small}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"


def age(moment: float | None, now: float | None = None) -> str:
    """How long ago a unix time was: "just now", "5 min ago"."""
    if moment is None or not math.isfinite(moment):
        return MISSING
    seconds = (time.time() if now is None else now) - moment
    if seconds < 5:
        return "just now"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{int(seconds)} s ago"


def words(code: str) -> str:
    """A problem code as words: vanishing_gradients -> Vanishing gradients."""
    text = code.replace("_", " ")
    return text[:1].upper() + text[1:]


def short(name: str, width: int = 32) -> str:
    """The end of a long tensor name, which is where names differ: …layer.0.attention.query.weight."""
    if len(name) <= width:
        return name
    tail = name[-(width - 1) :]
    _, dot, rest = tail.partition(".")
    return "…" + (rest if dot and len(rest) > width // 2 else tail)


def rounded(values: np.ndarray, digits: int = 7) -> list[float | None]:
    """Values as a plain list for the browser, rounded to significant digits; None where not finite."""
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    safe = np.where(finite & (values != 0), np.abs(values), 1.0)
    scale = 10.0 ** (digits - 1 - np.floor(np.log10(safe)).clip(-290, 290))
    out = np.where(finite, np.round(values * scale) / scale, np.nan)
    return [float(v) if ok else None for v, ok in zip(out, finite, strict=True)]
