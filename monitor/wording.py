"""How numbers are written: three significant digits everywhere, SI above ten thousand."""

from __future__ import annotations

import math

MISSING = "–"
#: Of what Python calls unprintable: line breaks, and what joins letters and emoji.
_HARMLESS = "\n\u200c\u200d"
_SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: object) -> str:
    """A number in at most three significant digits: 0.0312, 4,210, 12.3k, 5.1M, 3.2e-7, NaN. – means none."""
    if value is None or isinstance(value, str):
        return value or MISSING
    x = float(value)  # pyright: ignore[reportArgumentType] - anything float() accepts
    if math.isnan(x):
        return "NaN"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    size = abs(x)
    if size >= 9999.5:
        return _large(x)
    if size >= 999.5:
        return f"{x:,.0f}"
    if size >= 1e-3 or x == 0:
        return f"{x:.3g}"
    mantissa, exponent = f"{x:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _large(x: float) -> str:
    for scale, suffix in _SI:
        if abs(x) >= scale * 0.9995:
            return f"{x / scale:.3g}{suffix}" if abs(x) < 1e18 else f"{x:.3g}"
    return f"{x:.3g}"


def integer(value: object) -> str:
    """A count with thousands separators; – when there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    return f"{int(value):,}"  # pyright: ignore[reportArgumentType]


def share(value: float | None) -> str:
    """A share of one as a percentage."""
    return MISSING if value is None or not math.isfinite(value) else f"{number(100 * value)} %"


def printable(text: str) -> str:
    r"""A text whose control characters cannot move a terminal's cursor or change its colours; lines stay.

    >>> printable("a\x1b[31m\nb")
    'a�[31m\nb'
    """
    return "".join(c if c.isprintable() or c in _HARMLESS else " " if c.isspace() else "\ufffd" for c in text)
