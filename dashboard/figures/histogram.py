"""Histograms over time: exact log buckets resampled onto a linear or a signed logarithmic value axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..text import integer, rounded
from .base import line, step_axis
from .cells import cells, to_z
from .theme import Figure, Style, blend, message, translucent

BINS = 96
DECADES = 6  # of a logarithmic value axis; what is smaller joins the zero in the middle
TAIL = 0.0005  # left out at each end of a linear axis, so that one outlier does not squeeze the rest
RIDGES = 16
ROWS_A_DECADE = 12
COLUMNS = 256  # of a map; captures beyond are pooled, in powers of two


class Part(NamedTuple):
    """One histogram among several on one axis: a frame with low, high, count."""

    name: str
    frame: pd.DataFrame
    color: str
    meta: dict[str, Any] = {}  # noqa: RUF012 - never changed


def pool(frame: pd.DataFrame, columns: int = COLUMNS) -> pd.DataFrame:
    """At most so many steps, by adding the counts of 2, 4, 8 ... captures; a step is the first of its pool.

    The pools lie at multiples of their size, so that those of a growing run stay what they are.
    """
    steps, place = np.unique(frame["step"].to_numpy(), return_inverse=True)
    if len(steps) <= columns:
        return frame
    size = 2 ** int(np.ceil(np.log2(len(steps) / columns)))
    pooled = frame.assign(step=steps[place // size * size])
    return pooled.groupby(["step", "low", "high"], sort=False, as_index=False)["count"].sum()


def density(frame: pd.DataFrame, bins: int = BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares on a linear value axis: (steps (n,), edges (bins + 1,), share of the elements (bins, n)).

    `frame` has step, low, high, count: one row a bucket. The axis leaves out TAIL at each end of a step.
    """
    steps = _steps(frame)
    low, high = _span(steps)
    edges = np.linspace(low, high, bins + 1)
    return np.array([step for step, _, _ in steps]), edges, _resample(steps, edges)


def log_density(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Shares on a signed logarithmic axis: (steps, positions (rows,), share (rows, n), exponent of zero).

    A position is sign x decades above 10^exponent; 0 holds zero and everything below that.
    """
    ends = np.abs(frame[["low", "high"]].to_numpy(dtype=float))
    largest = float(ends.max(initial=0.0)) or 1.0
    floor = int(np.ceil(np.log10(largest))) - DECADES

    def position(value: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.sign(value) * np.maximum(np.log10(np.abs(value)) - floor, 0.0)

    steps = [(step, position(points), mass) for step, points, mass in _steps(frame)]
    top = round(
        ROWS_A_DECADE * max((float(np.abs(points).max(initial=0.1)) for _, points, _ in steps), default=1.0)
    )
    rows = np.arange(-top, top + 1) / ROWS_A_DECADE
    edges = np.append(rows - 0.5 / ROWS_A_DECADE, rows[-1] + 0.5 / ROWS_A_DECADE)
    return np.array([step for step, _, _ in steps]), rows, _resample(steps, edges), floor


def _steps(frame: pd.DataFrame) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Each step's cumulative distribution: (step, points, mass up to each), two points a bucket."""
    step, low, high, count = (frame[name].to_numpy() for name in ("step", "low", "high", "count"))
    order = np.lexsort((high, low, step))
    step, low, high, count = step[order], low[order].astype(float), high[order].astype(float), count[order]
    starts = np.flatnonzero(np.diff(step, prepend=step[0] - 1)) if len(step) else np.empty(0, int)
    found = []
    for start, stop in zip(starts, [*starts[1:], len(step)], strict=True):
        total = np.concatenate([[0.0], np.cumsum(count[start:stop], dtype=float)])
        if total[-1] > 0:
            points = np.stack([low[start:stop], high[start:stop]], axis=1).ravel()
            mass = np.stack([total[:-1], total[1:]], axis=1).ravel() / total[-1]
            found.append((int(step[start]), np.maximum.accumulate(points), mass))
    return found


def _resample(steps: list[tuple[int, np.ndarray, np.ndarray]], edges: np.ndarray) -> np.ndarray:
    """The share of each bin, by interpolating the cumulative distribution.

    Without this the ever wider buckets of large values would look like peaks.
    """
    columns = [np.diff(np.interp(edges, points, mass, left=0.0, right=1.0)) for _, points, mass in steps]
    return np.array(columns).T if columns else np.zeros((len(edges) - 1, 0))


def _span(steps: list[tuple[int, np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """The ends of a linear axis, on a coarse grid: they rest while a growing run stays within them."""
    low = min((float(np.interp(TAIL, mass, points)) for _, points, mass in steps), default=0.0)
    high = max((float(np.interp(1 - TAIL, mass, points)) for _, points, mass in steps), default=1.0)
    if high <= low:
        pad = max(abs(high), 1e-12) * 0.5
        return low - pad, high + pad
    grid = 2.0 ** np.floor(np.log2((high - low) / 12))
    # Strictly outside: a ReLU's zeros lie exactly on the lowest value.
    return float((np.ceil(low / grid) - 1) * grid), float((np.floor(high / grid) + 1) * grid)


def histogram_map(
    frame: pd.DataFrame,
    title: str,
    style: Style,
    *,
    log: bool = False,
    steps: tuple[float, float] | None = None,
) -> Figure:
    """A histogram at every capture: steps across, values up, darker where more elements are."""
    if frame.empty:
        return nothing(title, style)
    frame = pool(frame)
    value_axis: dict[str, Any] = {"title": {"text": f"{title} value"}, "showgrid": False, "zeroline": False}
    meta: dict[str, Any] = {}
    if log:
        at, rows, shares, floor = log_density(frame)
        value_axis |= _signed_ticks(rows, floor)
        meta = {"floor": {"yaxis": floor}}  # by which assets/hover.js tells the value of a row
    else:
        at, edges, shares = density(frame)
        rows = (edges[:-1] + edges[1:]) / 2
    used = shares[shares > 0]
    # The colours go with the root of the share, so that thin tails are visible; zmax leaves out single peaks.
    places = style.palette.colorscale()
    scale = [[0, style.palette.card], *([max(place**2, 1e-4), color] for place, color in places)]
    drawn = cells(shares, log=False, what="share of the elements")
    trace = {
        "type": "heatmap",
        "name": title,
        "x": at.tolist(),
        "y": rounded(rows),
        **drawn,
        "zmin": to_z(drawn["meta"], 0.0),
        "zmax": to_z(drawn["meta"], float(np.percentile(used, 97)) if len(used) else 1.0),
        "colorscale": scale,
        "showscale": False,
        "hoverongaps": False,
        "hovertemplate": "%{y:.3~g}<br>step %{x:,d}<extra></extra>",
    }
    layout = {
        "hovermode": "closest",
        "showlegend": False,
        "xaxis": step_axis(steps, [trace]) | {"showgrid": False, "nticks": 5},
        "yaxis": value_axis,
        "meta": meta,
    }
    return {"data": [trace], "layout": layout}


def _signed_ticks(rows: np.ndarray, floor: float) -> dict[str, Any]:
    """Powers of ten on both sides of zero, every second decade."""
    decades = [d for d in range(2, DECADES + 1, 2) if d <= rows[-1] + 0.5]
    values = [*(-d for d in reversed(decades)), 0, *decades]

    def label(d: int) -> str:
        return "0" if d == 0 else f"{'−' if d < 0 else ''}10<sup>{int(abs(d) + floor)}</sup>"

    return {"tickvals": values, "ticktext": [label(d) for d in values]}


def ridgeline(frame: pd.DataFrame, title: str, style: Style, *, log: bool = False) -> Figure:
    """The same histograms as curves, one behind the other, the latest in front and strongest in colour."""
    if frame.empty:
        return nothing(title, style)
    frame = pool(frame)
    rows, at, shares, across = _value_axis(frame, title, log)
    chosen = np.unique(np.linspace(0, len(at) - 1, min(RIDGES, len(at))).round().astype(int))
    peak = float(np.percentile(shares[:, chosen].max(axis=0), 80)) or 1.0
    p, data = style.palette, []
    for place, column in enumerate(chosen):
        base, age = float(len(chosen) - 1 - place), place / max(len(chosen) - 1, 1)
        color = blend(p.scale[2], p.scale[-3] if p.name == "light" else p.scale[-2], age)
        curve = base + np.minimum(shares[:, column] / peak, 1.6) * 2.2
        name = f"step {integer(at[column])}"
        floor = line(rows, np.full(len(rows), base), name, color, width=0)
        data.append(floor | {"hoverinfo": "skip", "hovertemplate": None, "meta": {"skip": True}})
        ridge = line(rows, curve, name, color, width=2 if place == len(chosen) - 1 else 1.1)
        ridge["text"] = rounded(shares[:, column], 3)
        data.append(
            ridge
            | {
                "fill": "tonexty",
                "fillcolor": translucent(blend(p.card, color, 0.16), 0.88),
                "hovertemplate": f"<b>{name}</b><br>%{{text:.3~p}} of the elements<extra></extra>",
            }
        )
    marks = list(range(len(chosen) - 1, -1, -max(1, len(chosen) // 5)))
    step_ticks = {
        "tickvals": [len(chosen) - 1 - place for place in marks],
        "ticktext": [integer(at[chosen[place]]) for place in marks],
    }
    return {
        "data": data,
        "layout": {
            "hovermode": "closest",
            "showlegend": False,
            **across,
            "xaxis": across["xaxis"] | {"fixedrange": True},  # a drag would be taken for one over steps
            "yaxis": step_ticks
            | {"title": {"text": "optimizer step"}, "showgrid": False, "zeroline": False, "fixedrange": True},
        },
    }


def _value_axis(
    frame: pd.DataFrame, title: str, log: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """(positions, steps, shares, layout) of values along the x axis; `table` turns positions into values."""
    axis: dict[str, Any] = {"title": {"text": f"{title} value"}, "zeroline": False, "nticks": 6}
    if log:
        at, rows, shares, floor = log_density(frame)
        signed = {"xaxis": axis | _signed_ticks(rows, floor), "meta": {"floor": {"xaxis": floor}}}
        return rows, at, shares, signed
    at, edges, shares = density(frame)
    return (edges[:-1] + edges[1:]) / 2, at, shares, {"xaxis": axis}


def overlaid(parts: Sequence[Part], title: str, style: Style, *, log: bool = False) -> Figure:
    """Histograms of two steps or several runs over each other, each as shares of its own elements."""
    parts = [part for part in parts if len(part.frame)]
    if not parts:
        return nothing(title, style)
    frame = pd.concat([part.frame.assign(step=i) for i, part in enumerate(parts)], ignore_index=True)
    rows, at, shares, across = _value_axis(frame, title, log)
    data = []
    for column, index in enumerate(at):
        part = parts[int(index)]
        trace = line(rows, shares[:, column], part.name, part.color, width=1.8)
        trace |= {"fill": "tozeroy", "fillcolor": translucent(part.color, 0.14), "meta": part.meta}
        data.append(trace | {"hovertemplate": "%{y:.3~p}"})
    share_axis = {"title": {"text": "share of the elements"}, "rangemode": "tozero", "tickformat": ".2~p"}
    layout = {"showlegend": True, **across, "yaxis": share_axis}
    layout["xaxis"] = across["xaxis"] | {"hoverformat": ".3~g"}
    layout["margin"] = {"l": 8, "r": 12, "t": 30, "b": 8}
    return {"data": data, "layout": layout}


def nothing(title: str, style: Style) -> Figure:
    """The words of a histogram that is not there."""
    return message(f"No {title} histogram was captured here.", style)
