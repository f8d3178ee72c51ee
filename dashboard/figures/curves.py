"""Plain curves: the scalars of one run side by side, one scalar of two runs on top of each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ..text import words
from .base import Panel, level, line, log_axis, smooth, stack, step_axis, wide
from .theme import Figure, Style, message, translucent

MAX_PANELS = 12


def small_multiples(scalars: dict[str, pd.DataFrame], style: Style, smoothing: float = 0.0) -> Figure:
    """One small panel a scalar, in a grid; each has its own value axis."""
    shown = list(scalars.items())[:MAX_PANELS]
    if not shown:
        return message("No other scalar was logged.", style)
    columns = 1 if style.narrow else min(3, len(shown))
    rows = -(-len(shown) // columns)
    data, layout = [], {"showlegend": False, "hovermode": "x", "annotations": []}
    width, tall = 1 / columns, 1 / rows
    caption, below = (
        24 / multiples_height(len(shown), style.narrow),
        30 / multiples_height(len(shown), style.narrow),
    )
    for i, (name, frame) in enumerate(shown):
        row, column = divmod(i, columns)
        key = "" if i == 0 else str(i + 1)
        left = column * width + (0.05 if column else 0)
        right = (column + 1) * width - (0.005 if column < columns - 1 else 0)
        top, bottom = 1 - row * tall - caption, 1 - (row + 1) * tall + below
        values = smooth(frame["value"].to_numpy(dtype=float), smoothing)
        trace = line(frame["step"].to_numpy(), values, name, style.palette.accent)
        data.append(trace | {"xaxis": "x" + key, "yaxis": "y" + key})
        layout["xaxis" + key] = step_axis(None, [trace]) | {
            "domain": [left, right],
            "anchor": "y" + key,
            "nticks": 5,
        }
        layout["xaxis" + key]["title"] = {"text": "optimizer step" if row == rows - 1 else ""}
        layout["yaxis" + key] = {
            "domain": [bottom, top],
            "anchor": "x" + key,
            "nticks": 4,
            "ticklabelstandoff": 4,
        }
        layout["yaxis" + key] |= log_axis(values) if wide(values) else level(values)
        layout["annotations"].append(_caption(name, left, top, style))
    return {"data": data, "layout": layout}


def multiples_height(count: int, narrow: bool = False) -> int:
    """Pixels for so many small panels."""
    count = min(max(count, 1), MAX_PANELS)
    return 20 + 175 * (count if narrow else -(-count // 3))


def _caption(name: str, left: float, top: float, style: Style) -> dict[str, Any]:
    return {
        "text": name.replace("<", "&lt;"),
        "x": left,
        "y": top,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 12, "color": style.palette.dim},
    }


def overlay(
    curves: dict[str, pd.DataFrame],
    title: str,
    style: Style,
    smoothing: float = 0.0,
    log: bool = False,
    steps: tuple[float, float] | None = None,
) -> Figure:
    """One scalar of several runs (name -> step, value) on one axis."""
    p = style.palette
    colors, traces = [p.accent, p.second, p.third, p.fourth], []
    for i, (name, frame) in enumerate(curves.items()):
        if frame.empty:
            continue
        at, values, color = frame["step"].to_numpy(), frame["value"].to_numpy(dtype=float), colors[i % 4]
        values = np.where(values > 0, values, np.nan) if log else values
        if smoothing > 0:
            raw = line(at, values, name, translucent(color, 0.28), width=1)
            traces.append(raw | {"showlegend": False, "hoverinfo": "skip", "hovertemplate": None})
        traces.append(line(at, smooth(values, smoothing), name, color))
        if len(at) <= 60:
            traces[-1] |= {"mode": "lines+markers", "marker": {"size": 4}}
    if not traces:
        return message("Neither run has logged a scalar that can be compared here.", style)
    return stack([Panel(traces, words(title).lower(), log=log)], style, steps)
