"""The profile beside a layer x step map: all layers at one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..text import integer, rounded
from .base import log_axis
from .grid import Grid, pool
from .theme import Style, translucent

#: So many rows are drawn with a mark each.
MARKS = 80
#: Of a value: finer than a pixel, and a live run sends the whole profile with every capture.
DIGITS = 4


@dataclass(frozen=True)
class Guide:
    """What the profile is compared with: one expected value for each row, NaN where there is none."""

    name: str
    values: np.ndarray
    dash: str = "dot"


def profile_column(grid: Grid, at: float | None) -> int:
    """The capture at or before step `at`; without it the last one that holds a finite value."""
    if at is None:
        seen = np.flatnonzero(np.isfinite(grid.values).any(axis=0))
        return int(seen[-1]) if len(seen) else len(grid.steps) - 1
    return max(int(np.searchsorted(grid.steps, at, side="right")) - 1, 0)


def profiles(
    shown: Grid,
    source: Grid,
    at: tuple[int, float | None],
    guides: Sequence[Guide],
    style: Style,
    bars: bool,
    unit: str,
) -> list[dict[str, Any]]:
    """Values over the rows at one step, faintly those at another, and what they are compared with."""
    accent, dim = style.palette.accent, style.palette.dim
    column, against = at

    def row_values(values: np.ndarray) -> list[float | None]:
        one = replace(
            source,
            steps=source.steps[:1],
            values=values[:, None],
            bad=np.zeros((len(values), 1), bool),
            first=0,
        )
        return rounded(pool(one).values[:, 0], DIGITS)

    base = {"y": shown.names, "xaxis": "x2", "yaxis": "y", "type": "scatter", "mode": "lines"}
    found = [
        base
        | {
            "name": guide.name,
            "x": row_values(guide.values),
            "line": {"color": style.palette.second, "width": 1.2, "dash": guide.dash},
            "connectgaps": True,
            "meta": {"skip": True},
            "hovertemplate": f"{guide.name}: %{{x:.3~g}}{unit}<extra></extra>",
        }
        for guide in guides
    ]
    if against is not None and (other := profile_column(source, against)) != column:
        step = integer(source.steps[other])
        found.append(
            base
            | {
                "name": f"at step {step}",
                "x": row_values(source.values[:, other]),
                "line": {"color": translucent(dim, 0.7), "width": 1},
                "hovertemplate": f"<b>%{{y}}</b><br>%{{x:.3~g}}{unit} at step {step}<extra></extra>",
            }
        )
    step = integer(source.steps[column])
    profile: dict[str, Any] = base | {
        "name": f"at step {step}",
        "x": row_values(source.values[:, column]),
        "hovertemplate": f"<b>%{{y}}</b><br>%{{x:.3~g}}{unit} at step {step}<extra></extra>",
    }
    if bars:
        del profile["mode"]
        profile |= {"type": "bar", "orientation": "h", "marker": {"color": translucent(accent, 0.75)}}
    else:
        profile |= {
            "mode": "lines+markers" if len(shown.names) <= MARKS else "lines",
            "line": {"color": accent, "width": 1.4},
            "marker": {"size": 4},
        }
    return [*found, profile]


def profile_axis(data: list[dict[str, Any]], log: bool, step: str, narrow: bool) -> dict[str, Any]:
    """The axis of values; on a phone its ends are enough."""
    axis: dict[str, Any] = {
        "anchor": "y",
        "title": {"text": f"step {step}", "standoff": 10},
        "nticks": 2 if narrow else 4,
        "fixedrange": True,
    }
    drawn = [x for trace in data if trace.get("xaxis") == "x2" for x in trace["x"] if x is not None]
    values = np.array(drawn, dtype=float)
    if log and (values > 0).any():
        axis |= log_axis(values)
    elif not log:
        axis["rangemode"] = "tozero"
    if narrow and len(axis.get("tickvals", ())) > 2:  # labels would overlap: the ends are enough
        axis |= {key: [axis[key][0], axis[key][-1]] for key in ("tickvals", "ticktext")}
    return axis
