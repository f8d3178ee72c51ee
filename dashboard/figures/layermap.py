"""The layer x step heat map with a profile over the layers beside it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..text import integer, short
from .base import log_axis, packed, step_axis
from .grid import Grid, limits, per_layer, pool, scaled
from .theme import Figure, Style, color_bar, message, translucent

#: Two step-like axes that measure themselves collide, so the space below the map is fixed.
FIXED = {"automargin": False, "title": {"text": "optimizer step", "standoff": 32}}


def layer_map(
    grid: Grid,
    title: str,
    style: Style,
    *,
    log: bool = True,
    colors: str = "robust",
    steps: tuple[float, float] | None = None,
    at: float | None = None,
    bars: bool = False,
    unit: str = "",
) -> Figure:
    """A grid as colours. `title` names the quantity, `at` is the step of the profile (default: the last).

    Cells that were NaN or infinite are a layer of their own in red; cells never captured stay empty.
    """
    if grid.empty:
        return message("Nothing was captured for this view.", style)
    column = profile_column(grid, at)
    profile = grid.values[:, column]
    shown = pool(grid.between(steps))
    z = scaled(shown.values, log)
    if colors == "layer":
        z, low, high = per_layer(z), 0.0, 1.0
    else:
        low, high = limits(z, colors)
    narrow, width = style.narrow, 18 if style.narrow else 34
    data = [
        _heat(
            shown,
            z,
            low,
            high,
            title,
            unit,
            style,
            _color_ticks(low, high, log and colors != "layer", colors),
        )
    ]
    if shown.bad.any():
        data.append(_red(shown, style))
    axis: dict[str, Any] = {
        "type": "category",
        "categoryorder": "array",  # from the bottom up
        "categoryarray": shown.names[::-1],
        "range": [-0.5, len(shown.names) - 0.5],
        "labelalias": {name: short(name, width) for name in shown.names},
        "tickfont": {"size": 10 if len(shown.names) > 25 else 11},
        "showgrid": False,
        "ticks": "",
        "title": {"text": "layer, first on top" if not narrow else "layer"},
    }
    right = 1.0 if len(shown.names) != len(grid.names) else 0.62 if narrow else 0.78
    layout: dict[str, Any] = {
        "hovermode": "closest",
        "showlegend": False,
        "yaxis": axis,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 58},
        "xaxis": step_axis(steps) | {"domain": [0, right], "showgrid": False} | FIXED,
    }
    if right < 1:
        data.append(_profile(grid.names, profile, style, bars, unit))
        beside = _profile_axis(profile, log, title, grid.steps[column])
        if narrow and len(beside.get("tickvals", ())) > 2:  # labels would overlap: the ends are enough
            beside |= {key: [beside[key][0], beside[key][-1]] for key in ("tickvals", "ticktext")}
        layout["xaxis2"] = beside | {"domain": [right + (0.08 if narrow else 0.03), 1]}
        layout["shapes"] = [_cursor(float(grid.steps[column]), style)]
    return {"data": data, "layout": layout}


def profile_column(grid: Grid, at: float | None) -> int:
    """The capture at or before step `at`; without it the last one that holds a finite value."""
    if at is None:
        seen = np.flatnonzero(np.isfinite(grid.values).any(axis=0))
        return int(seen[-1]) if len(seen) else len(grid.steps) - 1
    return max(int(np.searchsorted(grid.steps, at, side="right")) - 1, 0)


def height(rows: int, narrow: bool = False) -> int:
    """Pixels for a map of so many layers."""
    return int(min(max(150 + 15 * rows, 300), 560 if narrow else 760))


def _heat(
    grid: Grid,
    z: np.ndarray,
    low: float,
    high: float,
    title: str,
    unit: str,
    style: Style,
    ticks: dict[str, Any],
) -> dict[str, Any]:
    bar = color_bar(title, style)
    return {
        "type": "heatmap",
        "name": title,
        "x": grid.steps.tolist(),
        "y": grid.names,
        "z": packed(z),
        "customdata": packed(grid.values),
        "zmin": low,
        "zmax": high,
        "colorbar": bar | ticks,
        "hoverongaps": False,
        "hovertemplate": "<b>%{y}</b><br>step %{x:,d}<br>"
        + title
        + " %{customdata:.3~g}"
        + unit
        + "<extra></extra>",
    }


def _color_ticks(low: float, high: float, log: bool, colors: str) -> dict[str, Any]:
    """Ticks of the colour bar: powers of ten for logarithms, words for per-layer colours."""
    if colors == "layer":
        return {"tickvals": [0.02, 0.98], "ticktext": ["layer's lowest", "layer's highest"]}
    if not log:
        return {"nticks": 5}
    first, last = int(np.ceil(low)), int(np.floor(high))
    if last - first >= 1:
        jump = max(1, (last - first) // 5)
        powers = list(range(first, last + 1, jump))
        return {"tickvals": powers, "ticktext": [f"10<sup>{p}</sup>" for p in powers]}
    values = np.linspace(low, high, 3)
    return {"tickvals": values.tolist(), "ticktext": [f"{10**v:.2g}" for v in values]}


def _red(grid: Grid, style: Style) -> dict[str, Any]:
    color = style.palette.critical
    return {
        "type": "heatmap",
        "name": "NaN or infinite",
        "x": grid.steps.tolist(),
        "y": grid.names,
        "z": packed(np.where(grid.bad, 1.0, np.nan)),
        "colorscale": [[0, color], [1, color]],
        "showscale": False,
        "hoverongaps": False,
        "hovertemplate": "<b>%{y}</b><br>step %{x:,d}<br>NaN or infinite values<extra></extra>",
    }


def _profile(names: list[str], values: np.ndarray, style: Style, bars: bool, unit: str) -> dict[str, Any]:
    accent = style.palette.accent
    trace: dict[str, Any] = {
        "name": "profile",
        "x": [float(v) if np.isfinite(v) else None for v in values],
        "y": names,
        "xaxis": "x2",
        "yaxis": "y",
        "hovertemplate": "<b>%{y}</b><br>%{x:.3~g}" + unit + "<extra></extra>",
    }
    if bars:
        return trace | {"type": "bar", "orientation": "h", "marker": {"color": translucent(accent, 0.75)}}
    mode = "lines+markers" if len(names) <= 80 else "lines"
    return trace | {
        "type": "scatter",
        "mode": mode,
        "line": {"color": accent, "width": 1.2},
        "marker": {"size": 4},
    }


def _profile_axis(values: np.ndarray, log: bool, title: str, step: int) -> dict[str, Any]:
    axis: dict[str, Any] = {
        "anchor": "y",
        "title": {"text": f"{title}<br>at step {integer(step)}"},
        "nticks": 4,
        "fixedrange": True,
        "automargin": False,
    }
    finite = values[np.isfinite(values)]
    if log and (finite > 0).any():
        axis |= log_axis(finite)
    elif not log:
        axis["rangemode"] = "tozero"
    return axis


def _cursor(step: float, style: Style) -> dict[str, Any]:
    stroke = {"color": style.palette.accent, "width": 1.5, "dash": "dot"}
    return {
        "type": "line",
        "xref": "x",
        "yref": "paper",
        "x0": step,
        "x1": step,
        "y0": 0,
        "y1": 1,
        "line": stroke,
    }
