"""Margins that hold the labels of the axes. Plotly can measure labels itself, then draws all twice."""

from __future__ import annotations

import html
import math
import re
from typing import Any

import numpy as np

from .theme import Figure

#: Widths of a digit and of another character, and the height of a line, as shares of the font's size.
DIGIT, LETTER, HEIGHT = 0.62, 0.54, 1.35
TITLE, LABEL = 12, 11  # sizes of the template's fonts
MOST = 280  # pixels for the labels of an axis, however long they are
STANDOFF, PAD = 8, 5  # between labels and title, labels and axis
LEAST = 5  # characters of a numeric label for which there is room at least: a zoom makes them longer
_TAG, _SUP = re.compile(r"<[^>]*>"), re.compile(r"<su[bp]>(.*?)</su[bp]>")


def framed(figure: Figure) -> Figure:
    """The figure with margins in which the labels and titles of its axes have room."""
    layout = figure["layout"]
    margin = {"l": 8, "r": 12, "t": 8, "b": 8} | layout.get("margin", {})
    for key, axis in layout.items():
        match = re.fullmatch(r"([xy])axis(\d*)", key)
        if not match or axis.get("visible") is False or axis.get("showticklabels") is False:
            continue
        letter, number = match.groups()
        side = str(axis.get("side", "left" if letter == "y" else "bottom"))[0]
        if _at_edge(layout, axis, side):
            across = _drawn(figure, letter, number) if letter == "y" else []
            margin[side] = max(margin[side], _need(axis, letter, across))
    return {**figure, "layout": {**layout, "margin": margin}}


def text_width(text: str, size: float = LABEL) -> float:
    """About the pixels that a label takes, rather more than less. Powers are written smaller."""
    small = sum(len(part) for part in _SUP.findall(text))
    plain = html.unescape(_TAG.sub("", text))
    digits = sum(map(str.isdigit, plain))
    return size * (DIGIT * digits + LETTER * (len(plain) - digits) - 0.3 * LETTER * small)


def _at_edge(layout: dict[str, Any], axis: dict[str, Any], side: str) -> bool:
    """Whether the axis lies at that side of the whole figure, not between two of its panels."""
    anchor = str(axis.get("anchor") or ("x" if side in "lr" else "y"))
    other = layout.get(f"{anchor[0]}axis{anchor[1:]}", {}) if anchor[0] in "xy" else {}
    low, high = other.get("domain", (0, 1))
    return low <= 0.01 if side in "lb" else high >= 0.99


def _need(axis: dict[str, Any], letter: str, values: list[float]) -> int:
    size = axis.get("tickfont", {}).get("size", LABEL)
    room = PAD + axis.get("ticklabelstandoff", 0)
    if letter == "x":
        lines = 2 if axis.get("type") == "date" else 1
        room += size * HEIGHT * lines
    else:
        room += min(max((text_width(label, size) for label in _labels(axis, values)), default=0), MOST)
    if axis.get("title", {}).get("text"):
        room += axis["title"].get("standoff", STANDOFF) + TITLE * HEIGHT
    return math.ceil(room)


def _labels(axis: dict[str, Any], values: list[float]) -> list[str]:
    """What Plotly will write at the axis, or something as long."""
    if "ticktext" in axis:
        return [str(text) for text in axis["ticktext"]]
    if axis.get("type") == "category":
        return [str(name) for name in axis.get("categoryarray", values)]
    least, finite = "0" * LEAST, np.array(axis.get("range", values), dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if axis.get("type") == "log" or not finite.size:
        return [least]
    low, high = float(finite.min()), float(finite.max())
    form = str(axis.get("tickformat", ""))
    if form.endswith("%"):
        return [least, f"{low:.0%}", f"{high:.0%}"]
    gap = (high - low or abs(high) or 1.0) / axis.get("nticks", 5)
    decimals = max(0, -math.floor(math.log10(gap)))
    if (max(abs(low), abs(high)) >= 1e5 and "," not in form) or decimals > 4:
        return ["1.5×10<sup>−99</sup>"]
    return [least, f"{low:,.{decimals}f}", f"{high:,.{decimals}f}"]


def _drawn(figure: Figure, letter: str, number: str) -> list[float]:
    """Lowest and highest value of the traces on an axis."""
    ends: list[float] = []
    for trace in figure["data"]:
        values = trace.get(letter)
        if trace.get(f"{letter}axis", letter) != f"{letter}{number}" or not isinstance(values, list):
            continue
        known = [v for v in values if isinstance(v, int | float) and math.isfinite(v)]
        ends += [min(known), max(known)] if known else []
    return ends
