"""The figures of one tensor: quantiles, values of a bias, norms, update ratio, drift."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ..text import short
from .base import Panel, line, log_safe, packed, stack, step_axis
from .theme import Figure, Style, color_bar, message, translucent

MAX_LINES = 8
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
        return message(f"No finite {title} was captured for this tensor.", style)
    color, at, data = style.palette.accent, frame["step"].to_numpy(), []
    for low, high, alpha, name in BANDS:
        edge = translucent(color, 0.0)
        bottom = line(at, frame[low].to_numpy(), low, edge, width=0)
        top = line(at, frame[high].to_numpy(), name, edge, width=0)
        data += [
            bottom | {"showlegend": False, "hoverinfo": "skip", "hovertemplate": None},
            top
            | {
                "fill": "tonexty",
                "fillcolor": translucent(color, alpha),
                "hoverinfo": "skip",
                "hovertemplate": None,
            },
        ]
    data.append(line(at, frame["p50"].to_numpy(), "median", color))
    figure = stack([Panel(data, f"{title} value")], style, steps)
    low, high = frame["p01"].min(), frame["p99"].max()
    pad = 0.25 * (high - low) or 1e-9
    figure["layout"]["yaxis"]["range"] = [
        float(max(frame["min"].min(), low - pad)),
        float(min(frame["max"].max(), high + pad)),
    ]
    if figure["layout"]["yaxis"]["range"][0] == figure["layout"]["yaxis"]["range"][1]:
        figure["layout"]["yaxis"].pop("range")
    return figure


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
    if values.shape[1] <= MAX_LINES:
        p = style.palette
        colors = [p.accent, p.second, p.third, p.fourth, p.dim, p.good, p.info, p.warning]
        traces = [line(at, values[:, i], f"[{i}]", colors[i]) for i in range(values.shape[1])]
        return stack([Panel(traces, f"value of {short(name, 24)}")], style, steps)
    keep = np.unique(np.linspace(0, len(at) - 1, min(len(at), 400)).round().astype(int))
    part = values[keep].T
    finite = np.abs(part[np.isfinite(part)])
    limit = float(np.percentile(finite, 99)) if len(finite) and finite.max() > 0 else 1.0
    p = style.palette
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": at[keep].tolist(),
        "z": packed(part),
        "zmin": -(limit or 1.0),
        "zmax": limit or 1.0,
        "colorscale": [[0, p.second], [0.5, p.card], [1, p.accent]],
        "colorbar": color_bar("value", style) | {"nticks": 5},
        "hovertemplate": "element %{y}<br>step %{x:,d}<br>%{z:.3~g}<extra></extra>",
    }
    axis = {
        "title": {"text": f"element of {short(name, 24)}"},
        "autorange": "reversed",
        "showgrid": False,
        "tickformat": "d",
    }
    layout = {"hovermode": "closest", "xaxis": step_axis(steps, [trace]) | {"showgrid": False}, "yaxis": axis}
    return {"data": [trace], "layout": layout}


def history(
    weight: pd.DataFrame,
    gradient: pd.DataFrame,
    update: pd.DataFrame,
    drift: pd.DataFrame,
    style: Style,
    steps: tuple[float, float] | None = None,
) -> Figure:
    """Gradient norm, update ratio, weight norm and drift of one tensor, below each other."""
    p = style.palette
    rows = (
        (gradient, "norm", "gradient norm", p.second, True),
        (update, "ratio", "update ratio", p.third, True),
        (weight, "norm", "weight norm", p.accent, False),
        (drift, "relative_l2", "drift", p.fourth, False),
    )
    panels = []
    for frame, column, name, color, log in rows:
        if len(frame) and frame[column].notna().any():
            values = frame[column].to_numpy(dtype=float)
            shown = log_safe(values) if log and (values > 0).any() else values
            trace = line(frame["step"].to_numpy(), shown, name, color) | {"showlegend": False}
            panels.append(Panel([trace], name.replace(" ", "<br>"), log=log and bool((values > 0).any())))
    if not panels:
        return message("Nothing was captured for this tensor.", style)
    figure = stack(panels, style, steps)
    if "ratio" in update and len(update):
        index = [i for i, panel in enumerate(panels, start=1) if panel.title == "update<br>ratio"]
        figure["layout"]["shapes"] = [_healthy(i, style) for i in index]
    return figure


def _healthy(index: int, style: Style) -> dict[str, Any]:
    """The customary size of an update, about a thousandth of the weight."""
    key = "y" if index == 1 else f"y{index}"
    stroke = {"color": style.palette.good, "width": 1, "dash": "dot"}
    return {
        "type": "line",
        "xref": "paper",
        "yref": key,
        "x0": 0,
        "x1": 1,
        "y0": 1e-3,
        "y1": 1e-3,
        "line": stroke,
    }


def activity(
    at: np.ndarray, active: np.ndarray, style: Style, steps: tuple[float, float] | None = None
) -> Figure:
    """Which units were active at each capture. `at` (n,) steps; `active` bool (n, units)."""
    if not len(at) or not active.size:
        return message("The activity of single units was not captured here.", style)
    keep = np.unique(np.linspace(0, len(at) - 1, min(len(at), 400)).round().astype(int))
    part = active[keep].T.astype(float)
    if len(part) > 256:  # pooled by the mean: a pale row still says that only some of its units are alive
        edges = np.linspace(0, len(part), 257).astype(int)[:-1]
        part = np.add.reduceat(part, edges, axis=0) / np.diff(np.append(edges, len(part)))[:, None]
    p = style.palette
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": at[keep].tolist(),
        "z": packed(part),
        "zmin": 0,
        "zmax": 1,
        "colorscale": [
            [0, p.critical],
            [0.001, translucent(p.accent, 0.12)],
            [1, translucent(p.accent, 0.4)],
        ],
        "showscale": False,
        "hovertemplate": "unit %{y}<br>step %{x:,d}<br>active %{z:.0%}<extra></extra>",
    }
    axis = {"title": {"text": "unit"}, "autorange": "reversed", "showgrid": False, "tickformat": "d"}
    layout = {"hovermode": "closest", "xaxis": step_axis(steps, [trace]) | {"showgrid": False}, "yaxis": axis}
    return {"data": [trace], "layout": layout}
