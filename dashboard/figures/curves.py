"""Plain curves: the scalars of one run side by side, each on its own value axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .base import level, line, log_axis, smooth, step_axis, thin, wide, window
from .theme import Figure, Style, message, translucent

MAX_PANELS = 60
POINTS = 300  # a panel is narrow
TALL, CAPTION, BELOW = 168, 26, 30  # pixels of a panel, of its name above and of its ticks below
MAX_MARKS = 40
#: The share of the values at each end that "ignore outliers" leaves outside of the axis.
OUTLIERS = 2.0


@dataclass(frozen=True)
class Look:
    """What the reader chose for all panels."""

    smoothing: float = 0.0
    axes: str = "auto"  # linear, log; auto: logarithmic where positive values span three decades
    robust: bool = False  # outliers do not set the value axis
    steps: tuple[float, float] | None = None


def panel_at(place: int, columns: int, height: float) -> tuple[str, float, float, float, float]:
    """Where a small panel lies: number of its axes; left, right, top, bottom as shares of the figure."""
    row, column = divmod(place, columns)
    left = column / columns + (0.045 if column else 0)
    right = (column + 1) / columns - (0.005 if column < columns - 1 else 0)
    top, bottom = 1 - (row * TALL + CAPTION) / height, 1 - ((row + 1) * TALL - BELOW) / height
    return "" if place == 0 else str(place + 1), left, right, top, bottom


def small_multiples(
    scalars: dict[str, pd.DataFrame], style: Style, look: Look | None = None, slots: int = 0
) -> Figure:
    """One small panel a scalar, in a grid, in the order given. `slots`: panels that there is room for.

    `layout.meta.panels` names them, so that the browser can put a star beside each name.
    """
    look, shown = look or Look(), list(scalars.items())[:MAX_PANELS]
    if not shown:
        return message("No other scalar was logged." if not slots else "No scalar has such a name.", style)
    columns = columns_of(max(slots, len(shown)), style.narrow)
    height = multiples_height(max(slots, len(shown)), style.narrow)
    data: list[dict[str, Any]] = []
    meta = {"panels": [name for name, _ in shown]}
    layout: dict[str, Any] = {"showlegend": False, "hovermode": "x", "annotations": [], "meta": meta}
    for i, (name, frame) in enumerate(shown):
        key, left, right, top, bottom = panel_at(i, columns, height)
        traces, axis = panel(name, frame, style, look)
        data += [trace | {"xaxis": "x" + key, "yaxis": "y" + key} for trace in traces]
        across = step_axis(look.steps, traces) | {"domain": [left, right], "anchor": "y" + key, "nticks": 5}
        across["title"] = {"text": ""}
        layout["xaxis" + key] = across | ({"matches": "x"} if i else {})
        layout["yaxis" + key] = axis | {"domain": [max(bottom, 0.0), top], "anchor": "x" + key}
        layout["annotations"].append(_caption(name, left, top, style))
    layout["margin"] = {"l": 8, "r": 12, "t": 0, "b": 0}
    return {"data": data, "layout": layout}


def columns_of(count: int, narrow: bool) -> int:
    """Panels beside each other."""
    return 1 if narrow else min(3, max(count, 1))


def multiples_height(count: int, narrow: bool = False) -> int:
    """Pixels for so many small panels."""
    count = min(max(count, 1), MAX_PANELS)
    return TALL * -(-count // columns_of(count, narrow))


def panel(
    name: str, frame: pd.DataFrame, style: Style, look: Look
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The traces of one scalar and its value axis."""
    p = style.palette
    part = window(frame["step"].to_numpy(), look.steps)
    steps, raw = frame["step"].to_numpy()[part], frame["value"].to_numpy(dtype=float)
    smoothed, raw = smooth(raw, look.smoothing)[part], raw[part]
    log = look.axes == "log" or (look.axes == "auto" and wide(raw))
    axis: dict[str, Any] = {"nticks": 4, "ticklabelstandoff": 4}
    inside = limits(raw, log) if look.robust else None
    kept = raw if inside is None else np.clip(raw, *inside)
    axis |= log_axis(kept) if log else level(raw) or ({} if inside is None else {"range": aired(inside)})
    traces = []
    if look.smoothing > 0:
        faint = _curve(steps, raw, f"{name} (raw)", translucent(p.accent, 0.28), log, 1.0)
        traces.append(faint | {"hoverinfo": "skip", "hovertemplate": None})
    traces.append(_curve(steps, smoothed, name, p.accent, log, 1.5))
    return traces + not_finite(name, steps, raw, kept, p.critical), axis


def _curve(
    steps: np.ndarray, values: np.ndarray, name: str, color: str, log: bool, width: float
) -> dict[str, Any]:
    values = np.where(values > 0, values, np.nan) if log else values
    index = thin(steps, values, POINTS)
    return line(steps[index], values[index], name, color, width=width)


def limits(values: np.ndarray, log: bool = False) -> tuple[float, float] | None:
    """The range that all but the outermost values lie in; None when it is no smaller than the whole."""
    finite = values[np.isfinite(values) & ((values > 0) if log else True)]
    if len(finite) < 10:
        return None
    low, high = (float(q) for q in np.percentile(finite, [OUTLIERS, 100 - OUTLIERS]))
    if log:
        air = 10 ** (0.25 * (np.log10(high) - np.log10(low)))
        outside = finite.min() < low / air or finite.max() > high * air
    else:
        air = 0.25 * (high - low)
        outside = finite.min() < low - air or finite.max() > high + air
    return (low, high) if outside and low < high else None


def aired(ends: tuple[float, float]) -> list[float]:
    """The range with a little air around it."""
    air = 0.08 * (ends[1] - ends[0])
    return [ends[0] - air, ends[1] + air]


def not_finite(
    name: str, steps: np.ndarray, values: np.ndarray, shown: np.ndarray, color: str
) -> list[dict[str, Any]]:
    """Red crosses at the top, at the steps whose value was NaN or infinite."""
    bad = ~np.isfinite(values)
    if not bad.any():
        return []
    known = shown[np.isfinite(shown)]
    at = steps[bad][_some(int(bad.sum()))]
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": f"{name} not finite",
            "x": at.tolist(),
            "y": [float(known.max()) if len(known) else 1.0] * len(at),
            "marker": {"symbol": "x-thin", "size": 7, "line": {"width": 2, "color": color}, "color": color},
            "hovertemplate": "NaN or infinite",
            "showlegend": False,
            "meta": {"skip": True},
        }
    ]


def _some(count: int) -> np.ndarray:
    """At most MAX_MARKS places among `count`, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_MARKS)).round().astype(int))


def ordered(names: Sequence[str], pins: Sequence[str]) -> list[str]:
    """Pinned names first, in the order in which they were pinned."""
    first = [name for name in dict.fromkeys(pins) if name in names]
    return first + [name for name in names if name not in first]


def _caption(name: str, left: float, top: float, style: Style) -> dict[str, Any]:
    text = name if len(name) <= 40 else f"{name[:18]}…{name[-20:]}"
    return {
        "text": text.replace("<", "&lt;"),
        "x": left,
        "y": top,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "bottom",
        "xshift": 20,
        "showarrow": False,
        "font": {"size": 12, "color": style.palette.dim},
    }
