"""Numbers of one layer over time, one panel each: norms, update ratio, drift, attention, optimizer state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .base import Panel, line, log_safe, stack
from .layer import band
from .theme import Figure, Style, message, translucent


@dataclass(frozen=True)
class Series:
    """One panel: a column of a frame with steps; `low` and `high` are columns of a band around it."""

    frame: pd.DataFrame
    column: str
    name: str
    color: str  # an attribute of the palette
    log: bool = False
    low: str = ""
    high: str = ""
    share: bool = False  # a number between 0 and 1


def history(
    series: Sequence[Series], style: Style, steps: tuple[float, float] | None = None, nothing: str = ""
) -> Figure:
    """The series that hold anything, one panel each on one step axis."""
    present = [one for one in series if _present(one)]
    if not present:
        return message(nothing or "Nothing was captured for this layer.", style)
    figure = stack([_panel(one, style) for one in present], style, steps)
    index = [i for i, one in enumerate(present, start=1) if one.name == "update ratio"]
    figure["layout"]["shapes"] = [_healthy(i, style) for i in index]
    figure["layout"]["showlegend"] = False
    figure["layout"].pop("margin", None)
    return figure


def _present(series: Series) -> bool:
    return series.column in series.frame and bool(series.frame[series.column].notna().any())


def _panel(series: Series, style: Style) -> Panel:
    frame, color = series.frame, getattr(style.palette, series.color)
    at, values = frame["step"].to_numpy(), frame[series.column].to_numpy(dtype=float)
    log = series.log and bool((values > 0).any())
    shown = log_safe if log else np.asarray
    traces: list[dict[str, Any]] = []
    if series.low in frame and series.high in frame:
        ends = [shown(frame[name].to_numpy(dtype=float)) for name in (series.low, series.high)]
        if not np.array_equal(ends[0], ends[1], equal_nan=True):
            traces += band(at, ends[0], ends[1], f"{series.name}, range", translucent(color, 0.2))
    traces.append(line(at, shown(values), series.name, color))
    if len(at) <= 40:
        traces[-1] |= {"mode": "lines+markers", "marker": {"size": 4}}
    axis: dict[str, Any] = {"range": [-0.03, 1.03], "tickvals": [0, 0.5, 1], "ticktext": ["0", "0.5", "1"]}
    title = series.name.replace(" ", "<br>", 1)
    return Panel(traces, title, log=log, axis=axis if series.share else None)


def _healthy(index: int, style: Style) -> dict[str, Any]:
    """The customary size of an update, about a thousandth of the weight."""
    key = "y" if index == 1 else f"y{index}"
    stroke = {"color": style.palette.good, "width": 1, "dash": "dot"}
    ends = {"x0": 0, "x1": 1, "y0": 1e-3, "y1": 1e-3}
    return {"type": "line", "xref": "paper", "yref": key, **ends, "line": stroke}
