"""The layer x step heat map with a profile over the layers beside it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from ...monitor.weights.names import block_of
from ..text import integer, short
from .base import packed, step_axis
from .cells import HIGH, LOW, cells, to_z
from .grid import Grid, limits, pool, scaled
from .profile import Guide, profile_axis, profile_column, profiles
from .theme import Figure, Style, margin_bar, message, translucent

FIXED = {"title": {"text": "optimizer step", "standoff": 10}}
#: More rows than this are labelled by their blocks, and there are at most so many labels.
LABELS = 46


def layer_map(
    grid: Grid,
    title: str,
    style: Style,
    *,
    log: bool = True,
    colors: str = "robust",
    steps: tuple[float, float] | None = None,
    at: float | None = None,
    against: float | None = None,
    whole: Grid | None = None,
    guides: Sequence[Guide] = (),
    bars: bool = False,
    unit: str = "",
    blocks: bool = True,
) -> Figure:
    """A grid as colours. `title` names the quantity, `at` is the step of the profile (default: the last).

    Cells that were NaN or infinite are a layer of their own in red; cells never captured stay empty.

    Args:
        against: a second step, whose profile is drawn faintly.
        whole: the same rows over the whole run, for the profiles, when `grid` is a part of it.
        blocks: rows are in order of depth: neighbours of one block belong together.
    """
    if grid.empty:
        return message("Nothing was captured for this view.", style)
    shown = pool(grid.between(steps))
    source = grid if whole is None else whole
    column = profile_column(source, at)
    heat = _heat(shown, title, unit, style, log, colors)
    if shown.width > 1:  # a click narrows the filter to the layers of the row
        heat["meta"] |= {"layers": grid.names, "width": shown.width}
    data = [heat]
    if shown.bad.any():
        data.append(_red(shown, style))
    data += profiles(shown, source, (column, against), guides, style, bars, unit)
    narrow = style.narrow
    right = 0.6 if narrow else 0.78
    beside = profile_axis(data, log, integer(source.steps[column]), narrow)
    layout: dict[str, Any] = {
        "hovermode": "closest",
        "showlegend": False,
        "yaxis": _row_axis(shown, blocks, style),
        "margin": {"l": 8, "r": 14, "t": 34, "b": 42},
        "xaxis": step_axis(steps)
        | {"domain": [0, right], "showgrid": False, "nticks": 5 if narrow else 9}
        | FIXED,
        "xaxis2": beside | {"domain": [right + (0.06 if narrow else 0.025), 1]},
        "shapes": [*_fences(shown, blocks, style), _cursor(float(source.steps[column]), style)],
        "bargap": 0.15,
    }
    return {"data": data, "layout": layout}


def height(rows: int, narrow: bool = False) -> int:
    """Pixels for a map of so many layers."""
    return int(min(max(120 + 15 * rows, 300), 560 if narrow else 760))


def _heat(grid: Grid, title: str, unit: str, style: Style, log: bool, colors: str) -> dict[str, Any]:
    """The cells; their texts are made in the browser from `meta`."""
    each = colors == "layer"
    trace: dict[str, Any] = {
        "type": "heatmap",
        "name": title,
        "x": grid.steps.tolist(),
        "y": grid.names,
        **cells(grid.values, log=log, what=title, unit=unit, each=each),
        "hoverongaps": False,
        "hovertemplate": "<b>%{y}</b><br>step %{x:,d}<extra></extra>",
    }
    if each:
        ends = {"tickvals": [LOW, HIGH], "ticktext": ["lowest of the layer", "highest"]}
        return trace | {"zmin": LOW, "zmax": HIGH, "colorbar": _bar(title, style) | ends}
    low, high = limits(scaled(grid.values, log), colors)
    meta = trace["meta"]
    ticks = _color_ticks(low, high, log, unit)
    return trace | {
        "zmin": to_z(meta, low),
        "zmax": to_z(meta, high),
        "colorbar": _bar(title, style)
        | {"tickvals": [to_z(meta, t) for t in ticks], "ticktext": [*ticks.values()]},
    }


def _bar(title: str, style: Style) -> dict[str, Any]:
    """A colour bar in the margin above the map, its title behind it."""
    return margin_bar(0.55 if style.narrow else 0.26, style) | {
        "title": {
            "text": "" if style.narrow else title,  # there is no room beside it on a phone
            "side": "right",
            "font": {"size": 12, "color": style.palette.dim},
        },
    }


def _color_ticks(low: float, high: float, log: bool, unit: str) -> dict[float, str]:
    """Ticks of the colour bar: where (a value, or its logarithm) and what they say. Powers of ten if there
    are two."""
    first, last = int(np.ceil(low)), int(np.floor(high))
    if log and last - first >= 1:
        jump = -(-(last - first) // 4)
        return {float(p): f"10<sup>{p}</sup>".replace("-", "−") for p in range(first, last + 1, jump)}
    values = [low, high] if log else np.linspace(low, high, 3).tolist()
    return {v: f"{10**v if log else v:.2g}{unit}" for v in values}


def _red(grid: Grid, style: Style) -> dict[str, Any]:
    color = style.palette.critical
    return {
        "type": "heatmap",
        "name": "NaN or infinite",
        "x": grid.steps.tolist(),
        "y": grid.names,
        "z": packed(np.where(grid.bad, 1.0, np.nan)),
        "meta": {"skip": True, "says": "NaN or infinite values"},
        "colorscale": [[0, color], [1, color]],
        "showscale": False,
        "hoverongaps": False,
        "hovertemplate": "<b>%{y}</b><br>step %{x:,d}<br>NaN or infinite values<extra></extra>",
    }


def _row_axis(grid: Grid, blocks: bool, style: Style) -> dict[str, Any]:
    """One row a layer, the first one on top. Many rows are labelled by block, or every so many."""
    names, width = grid.names, 18 if style.narrow else 34
    at = list(range(len(names)))
    labels = list(names)
    if len(names) > LABELS:
        runs = _blocks(names) if blocks else []
        if 1 < len(runs) <= len(names) // 2:
            at, labels = [first + (size - 1) // 2 for _, first, size in runs], [name for name, *_ in runs]
        jump = -(-len(at) // LABELS)
        at, labels = at[::jump], labels[::jump]
    return {
        "type": "category",
        "categoryorder": "array",  # from the bottom up
        "categoryarray": names[::-1],
        "range": [-0.5, len(names) - 0.5],
        "tickmode": "array",
        "tickvals": [names[i] for i in at],
        "ticktext": [short(name, width).replace("&", "&amp;").replace("<", "&lt;") for name in labels],
        "tickfont": {"size": 10 if len(at) > 25 else 11},
        "showgrid": False,
        "ticks": "",
        "title": {"text": ""},
    }


def _blocks(names: list[str]) -> list[tuple[str, int, int]]:
    """Neighbours of one block: its name, its first row, how many rows."""
    found, first = [], 0
    for name, members in groupby(names, block_of):
        size = len(list(members))
        found.append((name, first, size))
        first += size
    return found


def _fences(grid: Grid, blocks: bool, style: Style) -> list[dict[str, Any]]:
    """Faint lines between blocks of several rows."""
    runs = _blocks(grid.names) if blocks else []
    if not 1 < len(runs) <= min(LABELS, len(grid.names) // 3):
        return []
    places = [len(grid.names) - 0.5 - first for _, first, _ in runs[1:]]
    stroke = {"color": translucent(style.palette.dim, 0.45), "width": 0.7}
    return [
        {"type": "line", "xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": stroke}
        for y in places
    ]


def _cursor(step: float, style: Style) -> dict[str, Any]:
    stroke = {"color": style.palette.accent, "width": 1.5, "dash": "dot"}
    line = {"xref": "x", "yref": "paper", "x0": step, "x1": step, "y0": 0, "y1": 1}
    return {"type": "line", **line, "line": stroke}
