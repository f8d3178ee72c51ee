"""The figures of one tensor's elements and units: quantiles, values of a bias, which units work."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ..text import short
from .base import Panel, line, stack, step_axis
from .cells import cells, to_z
from .theme import Figure, Style, color_bar, message, translucent

MAX_LINES = 8
COLUMNS = 256  # of a map of elements or units
MAX_UNITS = 256
BANDS = (
    ("min", "max", 0.08, "all"),
    ("p01", "p99", 0.14, "98 %"),
    ("p05", "p95", 0.2, "90 %"),
    ("p25", "p75", 0.3, "50 %"),
)


def quantiles(
    frame: pd.DataFrame, title: str, style: Style, steps: tuple[float, float] | None = None
) -> Figure:
    """Nested bands that hold 50, 90, 98 and 100 % of the elements, and the median."""
    frame = frame[frame["p50"].notna()] if len(frame) else frame
    if frame.empty:
        return message(f"No finite {title} was captured here.", style)
    color, at, data = style.palette.accent, frame["step"].to_numpy(), []
    for low, high, alpha, name in BANDS:
        data += band(at, frame[low].to_numpy(), frame[high].to_numpy(), name, translucent(color, alpha))
    data.append(line(at, frame["p50"].to_numpy(), "median", color))
    figure = stack([Panel(data, f"{title} value")], style, steps)
    low, high = frame["p01"].min(), frame["p99"].max()
    pad = 0.25 * (high - low) or 1e-9
    ends = [float(max(frame["min"].min(), low - pad)), float(min(frame["max"].max(), high + pad))]
    if ends[0] < ends[1]:
        figure["layout"]["yaxis"]["range"] = ends
    return figure


def band(at: np.ndarray, low: np.ndarray, high: np.ndarray, name: str, color: str) -> list[dict[str, Any]]:
    """The space between two curves, without lines around it."""
    edge = {"hoverinfo": "skip", "hovertemplate": None, "meta": {"skip": True}}
    bottom = line(at, low, f"{name}, low", color, width=0) | edge
    top = line(at, high, name, color, width=0) | edge
    return [bottom | {"showlegend": False}, top | {"fill": "tonexty", "fillcolor": color}]


def vector(
    at: np.ndarray, values: np.ndarray, name: str, style: Style, steps: tuple[float, float] | None = None
) -> Figure:
    """The values of a small tensor over time: lines up to eight elements, a heat map above.

    `at` (n,) steps; `values` (n, elements).
    """
    if not len(at) or not values.size:
        return message(
            f"The values of {name} are not in the log: they are stored up to 1,024 elements.", style
        )
    label = short(name, 24)
    if values.shape[1] <= MAX_LINES:
        return _lines(at, values, f"value of {label}", style, steps)
    finite = np.abs(values[np.isfinite(values)])
    limit = float(np.percentile(finite, 99)) if len(finite) else 0.0
    p = style.palette
    colors = [[0, p.second], [0.5, p.card], [1, p.accent]]
    return _map(
        at, values, ("value", f"element of {label}"), (-(limit or 1.0), limit or 1.0), colors, style, steps
    )


def share_map(
    at: np.ndarray,
    shares: np.ndarray,
    what: str,
    unit: str,
    style: Style,
    steps: tuple[float, float] | None = None,
) -> Figure:
    """A number between 0 and 1 of every unit or head: lines up to eight of them, a heat map above."""
    if not len(at) or not shares.size:
        return message(f"No {what} was captured here.", style)
    if shares.shape[1] <= MAX_LINES:
        figure = _lines(at, shares, what, style, steps, unit)
        figure["layout"]["yaxis"]["range"] = [-0.02, 1.02]
        return figure
    return _map(at, shares, (what, unit), (0.0, 1.0), style.palette.colorscale(), style, steps)


def activity(
    at: np.ndarray, active: np.ndarray, style: Style, steps: tuple[float, float] | None = None
) -> Figure:
    """Which units were active at each capture. `at` (n,) steps; `active` bool (n, units)."""
    if not len(at) or not active.size:
        return message("The activity of single units was not captured here.", style)
    p = style.palette
    colors = [[0, p.critical], [0.001, translucent(p.accent, 0.12)], [1, translucent(p.accent, 0.4)]]
    return _map(at, active.astype(float), ("active", "unit"), (0.0, 1.0), colors, style, steps, bar=False)


def _lines(
    at: np.ndarray,
    values: np.ndarray,
    title: str,
    style: Style,
    steps: tuple[float, float] | None,
    word: str = "",
) -> Figure:
    p = style.palette
    colors = [p.accent, p.second, p.third, p.fourth, p.dim, p.good, p.info, p.warning]
    names = [f"{word} {i}" if word else f"[{i}]" for i in range(values.shape[1])]
    traces = [line(at, values[:, i], name, colors[i]) for i, name in enumerate(names)]
    return stack([Panel(traces, title)], style, steps)


def _map(
    at: np.ndarray,
    values: np.ndarray,
    names: tuple[str, str],
    limits: tuple[float, float],
    colors: list[list[Any]],
    style: Style,
    steps: tuple[float, float] | None,
    bar: bool = True,
) -> Figure:
    """Elements down, steps across. `names`: of the quantity and of an element."""
    what, row = names
    part = values[_few(len(at))].T
    size = -(-len(part) // MAX_UNITS)
    if size > 1:  # pooled by the mean: a pale row still says that only some of its units are alive
        edges = np.arange(0, len(part), size)
        part = np.add.reduceat(part, edges, axis=0) / np.diff(np.append(edges, len(part)))[:, None]
    drawn = cells(part, log=False, what=what)
    trace: dict[str, Any] = {
        "type": "heatmap",
        "name": what,
        "x": at[_few(len(at))].tolist(),
        "y": (np.arange(len(part)) * size).tolist(),
        **drawn,
        "zmin": to_z(drawn["meta"], limits[0]),
        "zmax": to_z(drawn["meta"], limits[1]),
        "colorscale": colors,
        "hovertemplate": row + " %{y}<br>step %{x:,d}<extra></extra>",
    }
    if bar:
        values_shown = [limits[0], sum(limits) / 2, limits[1]]
        trace["colorbar"] = color_bar(what, style) | {
            "tickvals": [to_z(drawn["meta"], value) for value in values_shown],
            "ticktext": [f"{value:.2g}" for value in values_shown],
        }
    else:
        trace["showscale"] = False
    axis = {"title": {"text": row}, "autorange": "reversed", "showgrid": False, "tickformat": "d"}
    x_axis = step_axis(steps, [trace]) | {"showgrid": False, "nticks": 5}
    return {"data": [trace], "layout": {"hovermode": "closest", "xaxis": x_axis, "yaxis": axis}}


def _few(count: int) -> np.ndarray:
    """Every 2nd, 4th, 8th ... of so many captures, and the last one."""
    size = 2 ** max(int(np.ceil(np.log2(max(count, 1) / COLUMNS))), 0)
    return np.unique(np.append(np.arange(0, count, size), count - 1))
