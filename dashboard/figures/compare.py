"""Several runs in one figure: a scalar over each other, all scalars side by side, A against B by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..text import number, short, words
from .base import Panel, level, line, log_axis, smooth, stack, step_axis, wide, window
from .cells import cells, to_z
from .curves import TALL, panel_at
from .escape import safe
from .theme import Figure, Palette, Style, margin_bar, message, translucent

Curves = Mapping[str, pd.DataFrame]  # run -> step, value
MAX_RUNS = 8
MAX_PANELS = 30
ROWS, COLUMNS = 400, 256  # of a map
FRAME = {"showline": True, "mirror": True}  # where nothing differs a map is as pale as the card
#: Of the runs beyond the four colours that every palette has.
MORE = {
    "light": ("#b3306b", "#5f6f12", "#8a5a2b", "#43607a"),
    "dark": ("#ff8fb8", "#c5d15c", "#dcb185", "#9fb6cf"),
}


def colors_of(runs: list[str], palette: Palette) -> dict[str, str]:
    """The colour of each run, the same in everything on the page (and in assets/compare.css)."""
    own = (palette.accent, palette.second, palette.third, palette.fourth, *MORE[palette.name])
    return {run: own[place % len(own)] for place, run in enumerate(runs)}


def overlay(
    curves: Curves,
    title: str,
    style: Style,
    smoothing: float = 0.0,
    log: bool = False,
    steps: tuple[float, float] | None = None,
) -> Figure:
    """One scalar of several runs on one axis: the raw line faint behind the smooth one."""
    traces = _traces(curves, style, smoothing, log, steps)
    if not traces:
        return message(f"None of these runs has logged {title}.", style)
    return stack([Panel(traces, words(title).lower(), log=log)], style, steps)


def _traces(
    curves: Curves, style: Style, smoothing: float, log: bool, shown: tuple[float, float] | None
) -> list[dict[str, Any]]:
    colors, traces = colors_of(list(curves), style.palette), []
    for run, frame in curves.items():
        if frame.empty:
            continue
        part = window(frame["step"].to_numpy(), shown)
        at, values = frame["step"].to_numpy()[part], frame["value"].to_numpy(dtype=float)
        values = np.where(values > 0, values, np.nan) if log else values
        own = {"meta": {"run": run}, "legendgroup": run}
        if smoothing > 0:
            raw = line(at, values[part], f"{run} (raw)", translucent(colors[run], 0.28), width=1)
            traces.append(raw | own | {"showlegend": False, "hoverinfo": "skip", "hovertemplate": None})
        traces.append(line(at, smooth(values, smoothing)[part], run, colors[run]) | own)
        if len(at) <= 60:
            traces[-1] |= {"mode": "lines+markers", "marker": {"size": 4}}
    return traces


def multiples(
    scalars: Mapping[str, Curves],
    style: Style,
    smoothing: float = 0.0,
    steps: tuple[float, float] | None = None,
) -> Figure:
    """One small panel a scalar, every run in its colour."""
    shown = list(scalars.items())[:MAX_PANELS]
    if not shown:
        return message("None of these runs has logged a scalar.", style)
    columns, tall = columns_of(len(shown), style.narrow), multiples_height(len(shown), style.narrow)
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"showlegend": False, "hovermode": "x", "annotations": []}
    for place, (name, curves) in enumerate(shown):
        key, left, right, top, bottom = panel_at(place, columns, tall)
        values = np.concatenate([frame["value"].to_numpy(dtype=float) for frame in curves.values()])
        log = wide(values)
        traces = _traces(curves, style, smoothing, log, steps)
        data += [trace | {"xaxis": "x" + key, "yaxis": "y" + key} for trace in traces]
        across = step_axis(steps, traces) | {"domain": [left, right], "anchor": "y" + key, "nticks": 5}
        layout["xaxis" + key] = across | {"title": {"text": ""}} | ({"matches": "x"} if place else {})
        axis = {"domain": [max(bottom, 0.0), top], "anchor": "x" + key, "nticks": 4, "ticklabelstandoff": 4}
        layout["yaxis" + key] = axis | (log_axis(values) if log else level(values))
        layout["annotations"].append(_caption(name, left, top, style))
    return {"data": data, "layout": layout | {"margin": {"l": 8, "r": 12, "t": 0, "b": 0}}}


def columns_of(count: int, narrow: bool) -> int:
    """Panels beside each other."""
    return 1 if narrow else min(3, max(count, 1))


def multiples_height(count: int, narrow: bool = False) -> int:
    """Pixels for so many small panels."""
    count = min(max(count, 1), MAX_PANELS)
    return TALL * -(-count // columns_of(count, narrow))


def _caption(name: str, left: float, top: float, style: Style) -> dict[str, Any]:
    return {
        "text": safe(short(name, 40)),
        "x": left,
        "y": top,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 12, "color": style.palette.dim},
    }


def difference_map(
    names: list[str],
    at: np.ndarray,
    values: np.ndarray,
    what: str,
    style: Style,
    colors: tuple[str, str],
    steps: tuple[float, float] | None = None,
) -> Figure:
    """A against B, layer x step, in the colour of the one that is larger, in none where they agree.

    `values` (layers, n) are differences, or logarithms of ratios; NaN where either is missing.
    """
    if not names or not np.isfinite(values).any():
        return message(f"There is no {what} that both runs have captured in a layer of one name.", style)
    names, at, values = pool(names, at, values)
    found = np.abs(values[np.isfinite(values)])
    limit = float(np.percentile(found, 98)) or float(found.max()) or 1.0
    drawn = cells(values, log=False, what=what)
    ends = [-limit, 0.0, limit]
    trace = {
        "type": "heatmap",
        "name": what,
        "x": at.tolist(),
        "y": names,
        **drawn,
        "zmin": to_z(drawn["meta"], -limit),
        "zmax": to_z(drawn["meta"], limit),
        "colorscale": [[0, colors[1]], [0.5, style.palette.card], [1, colors[0]]],
        "hoverongaps": False,
        "hovertemplate": "<b>%{y}</b><br>step %{x:,d}<extra></extra>",
        "colorbar": margin_bar(0.5, style)
        | {
            "tickvals": [to_z(drawn["meta"], end) for end in ends],
            "ticktext": [f"B +{number(limit)}", "0", f"A +{number(limit)}"],
        },
    }
    axis = {
        "type": "category",
        "categoryorder": "array",  # from the bottom up
        "categoryarray": names[::-1],
        "range": [-0.5, len(names) - 0.5],
        "labelalias": {name: short(name, 18 if style.narrow else 26) for name in names},
        "tickfont": {"size": 10 if len(names) > 25 else 11},
        "showgrid": False,
        "ticks": "",
        **FRAME,
    }
    layout = {
        "hovermode": "closest",
        "showlegend": False,
        "xaxis": step_axis(steps, [trace]) | {"showgrid": False, "nticks": 6, **FRAME},
        "yaxis": axis,
        "margin": {"l": 8, "r": 12, "t": 34, "b": 8},
    }
    return {"data": [trace], "layout": layout}


def pool(names: list[str], at: np.ndarray, values: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
    """At most ROWS x COLUMNS cells; a cell shows the largest difference of what it covers, with its sign."""
    wide_by = 2 ** max(int(np.ceil(np.log2(max(len(at), 1) / COLUMNS))), 0)
    tall_by = -(-len(names) // ROWS)
    if wide_by > 1:
        values, at = _largest(values, wide_by), at[::wide_by]
    if tall_by > 1:
        values = _largest(values.T, tall_by).T
        last = len(names) - 1
        names = [f"{names[i]} … {names[min(i + tall_by - 1, last)]}" for i in range(0, len(names), tall_by)]
    return names, at, values


def _largest(values: np.ndarray, by: int) -> np.ndarray:
    """Of every `by` columns the value that is furthest from zero; NaN where all are missing."""
    rows, count = values.shape
    room = np.full((rows, -(-count // by) * by), np.nan)
    room[:, :count] = values
    room = room.reshape(rows, -1, by)
    place = np.where(np.isnan(room), -1.0, np.abs(room)).argmax(axis=2)
    return np.take_along_axis(room, place[:, :, None], axis=2)[:, :, 0]


def map_height(rows: int, narrow: bool = False) -> int:
    """Pixels for a map of so many layers."""
    return int(min(max(110 + 13 * rows, 300), 480 if narrow else 620))
