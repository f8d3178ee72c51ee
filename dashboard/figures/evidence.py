"""The evidence of a finding: the quantity that its rule is about, the threshold, the steps it holds for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..text import number, short
from .base import line, log_axis, step_axis
from .theme import Figure, Style, message, translucent

#: More layers than this are not told apart by colour.
MAX_CURVES = 6


@dataclass(frozen=True)
class Evidence:
    """What a rule looks at, by step."""

    what: str  # the quantity, title of the value axis
    curves: dict[str, tuple[np.ndarray, np.ndarray]]  # name -> steps, values; worst first
    typical: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # to compare with
    limits: dict[str, float] = field(default_factory=dict)  # words -> value that must not be crossed
    log: bool = False


@dataclass(frozen=True)
class Region:
    """The steps of a finding."""

    first: int
    last: int
    severity: str


def evidence(
    found: Evidence, region: Region, style: Style, steps: tuple[float, float] | None = None, bold: str = ""
) -> Figure:
    """The curves with the region shaded and the limits as dashed lines. `bold`: the selected layer."""
    p = style.palette
    colors = [p.accent, p.second, p.third, p.fourth, p.info, p.good]
    traces = []
    for (name, (at, values)), color in zip(found.curves.items(), colors, strict=False):
        strong = name == bold or (not bold and not traces)
        shown = _drawn(values, found.log)
        traces.append(line(at, shown, short(name, 44), color, width=2.2 if strong else 1.2))
    for name, (at, values) in found.typical.items():
        traces.append(line(at, _drawn(values, found.log), name, p.dim, width=1.2, dash="dot"))
    known = np.array([y for trace in traces for y in trace["y"]], dtype=float)
    if not np.isfinite(known).any():
        return message(f"No {found.what} was captured in these steps.", style)
    values = np.concatenate([known, np.array(list(found.limits.values()), dtype=float)])
    axis: dict[str, Any] = {"title": {"text": found.what}, "nticks": 5}
    axis |= log_axis(values) if found.log else _room(values)
    layout: dict[str, Any] = {
        "showlegend": True,
        "xaxis": step_axis(steps, traces),
        "yaxis": axis,
        "shapes": [*shaded(region, style), *_lines(found, style)],
        "annotations": _words(found, style),
        "margin": {"l": 8, "r": 12, "t": 30, "b": 8},
    }
    return {"data": traces, "layout": layout}


def _drawn(values: np.ndarray, log: bool) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    return np.where(values > 0, values, np.nan) if log else values


def _room(values: np.ndarray) -> dict[str, Any]:
    """A linear range that holds the limits too, with a little air."""
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(finite.max())
    air = 0.08 * (high - low) or abs(high) or 1.0
    return {"range": [low - air, high + air]}


def shaded(region: Region, style: Style) -> list[dict[str, Any]]:
    """The steps of the finding: a tint over the plot with an edge where it begins."""
    color = style.palette.severity(region.severity)
    box = {"xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    last = max(region.last, region.first)
    return [
        box
        | {
            "type": "rect",
            "name": "region",
            "x0": region.first,
            "x1": last,
            "fillcolor": translucent(color, 0.08),
            "line": {"width": 0},
        },
        box
        | {"type": "line", "x0": region.first, "x1": region.first, "line": {"color": color, "width": 1.5}},
    ]


def _lines(found: Evidence, style: Style) -> list[dict[str, Any]]:
    across = {"type": "line", "xref": "paper", "yref": "y", "x0": 0, "x1": 1, "name": "limit"}
    stroke = {"color": style.palette.critical, "width": 1.2, "dash": "dash"}
    return [across | {"y0": value, "y1": value, "line": stroke} for value in found.limits.values()]


def _words(found: Evidence, style: Style) -> list[dict[str, Any]]:
    """What each limit is, at the right end of its line."""
    return [
        {
            "text": f"{words} {number(value)}".strip(),
            "x": 1,
            "xref": "paper",
            "xanchor": "right",
            "y": float(np.log10(value)) if found.log else value,
            "yref": "y",
            "yanchor": "bottom",
            "showarrow": False,
            "font": {"size": 11, "color": style.palette.critical},
        }
        for words, value in found.limits.items()
        if not found.log or value > 0
    ]
