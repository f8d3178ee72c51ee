"""Histograms over time: exact log buckets resampled onto a linear or a signed logarithmic value axis."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ..text import rounded
from .base import line, packed, step_axis
from .theme import Figure, Style, message, translucent

BINS = 96
DECADES = 6  # of a logarithmic value axis; what is smaller joins the zero in the middle
TAIL = 0.0005  # left out at each end of a linear axis, so that one outlier does not squeeze the rest
RIDGES = 16
ROWS_A_DECADE = 12


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
    found = []
    for step, rows in frame.sort_values(["step", "low", "high"]).groupby("step", sort=True):
        total = np.cumsum(rows["count"].to_numpy(dtype=float))
        if total[-1] > 0:
            points = np.stack(
                [rows["low"].to_numpy(dtype=float), rows["high"].to_numpy(dtype=float)], axis=1
            ).ravel()
            mass = np.stack([np.concatenate([[0.0], total[:-1]]), total], axis=1).ravel() / total[-1]
            found.append((int(step), np.maximum.accumulate(points), mass))  # pyright: ignore[reportArgumentType]
    return found


def _resample(steps: list[tuple[int, np.ndarray, np.ndarray]], edges: np.ndarray) -> np.ndarray:
    """The share of each bin, by interpolating the cumulative distribution.

    Without this the ever wider buckets of large values would look like peaks.
    """
    columns = [np.diff(np.interp(edges, points, mass, left=0.0, right=1.0)) for _, points, mass in steps]
    return np.array(columns).T if columns else np.zeros((len(edges) - 1, 0))


def _span(steps: list[tuple[int, np.ndarray, np.ndarray]]) -> tuple[float, float]:
    low = min((float(np.interp(TAIL, mass, points)) for _, points, mass in steps), default=0.0)
    high = max((float(np.interp(1 - TAIL, mass, points)) for _, points, mass in steps), default=1.0)
    pad = 0.04 * (high - low) or max(abs(high), 1e-12) * 0.5
    return low - pad, high + pad


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
        return message(f"No {title} histogram was captured for this tensor.", style)
    value_axis: dict[str, Any] = {"title": {"text": f"{title} value"}, "showgrid": False, "zeroline": False}
    where = "" if log else "value near %{y:.3~g}<br>"
    if log:
        at, rows, shares, floor = log_density(frame)
        value_axis |= _signed_ticks(rows, floor)
    else:
        at, edges, shares = density(frame)
        rows = (edges[:-1] + edges[1:]) / 2
    used = shares[shares > 0]
    # The colours go with the root of the share, so that thin tails are visible; zmax leaves out single peaks.
    scale = [[place**2, color] for place, color in style.palette.colorscale()]
    trace = {
        "type": "heatmap",
        "x": at.tolist(),
        "y": rounded(rows),
        "z": packed(np.where(shares > 0, shares, np.nan)),
        "zmin": 0,
        "zmax": float(np.percentile(used, 97)) if len(used) else 1.0,
        "colorscale": scale,
        "showscale": False,
        "hoverongaps": False,
        "hovertemplate": "step %{x:,d}<br>" + where + "%{z:.3~p} of the elements<extra></extra>",
    }
    layout = {
        "hovermode": "closest",
        "showlegend": False,
        "xaxis": step_axis(steps) | {"showgrid": False, "nticks": 5},
        "yaxis": value_axis,
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
    """The same histograms as curves, one behind the other, the latest in front."""
    if frame.empty:
        return message(f"No {title} histogram was captured for this tensor.", style)
    if log:
        at, rows, shares, floor = log_density(frame)
    else:
        at, edges, shares = density(frame)
        rows, floor = (edges[:-1] + edges[1:]) / 2, 0.0
    chosen = np.unique(np.linspace(0, len(at) - 1, min(RIDGES, len(at))).round().astype(int))
    peak = float(np.percentile(shares[:, chosen].max(axis=0), 80)) or 1.0
    p, data = style.palette, []
    for place, column in enumerate(chosen):
        base = float(len(chosen) - 1 - place)
        curve = base + np.minimum(shares[:, column] / peak, 1.6) * 2.2
        color = p.accent if place == len(chosen) - 1 else translucent(p.accent, 0.75)
        name = f"step {int(at[column]):,}"
        data.append(line(rows, np.full(len(rows), base), name, translucent(p.accent, 0.0), width=0))
        data[-1] |= {"hoverinfo": "skip", "hovertemplate": None}
        data.append(line(rows, curve, name, color, width=1.2))
        data[-1] |= {
            "fill": "tonexty",
            "fillcolor": translucent(p.card, 0.82),
            "hovertemplate": name + "<extra></extra>",
        }
    value_axis: dict[str, Any] = {"title": {"text": f"{title} value"}, "zeroline": False, "nticks": 5}
    if log:
        value_axis |= _signed_ticks(rows, floor)
    marks = list(range(0, len(chosen), max(1, len(chosen) // 5)))
    step_ticks = {
        "tickvals": [len(chosen) - 1 - place for place in marks],
        "ticktext": [f"{int(at[chosen[place]]):,}" for place in marks],
    }
    return {
        "data": data,
        "layout": {
            "hovermode": "closest",
            "showlegend": False,
            "xaxis": value_axis,
            "yaxis": step_ticks | {"title": {"text": "optimizer step"}, "showgrid": False, "zeroline": False},
        },
    }
