"""What all figures share: curves thinned so that spikes survive, packed arrays, panels on one step axis."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..text import number, rounded
from .theme import Figure, Style

#: More points than this a line costs the browser time and shows nothing more on a screen.
MAX_POINTS = 1000
#: The mark of an axis that carries optimizer steps.
STEPS = "steps"
GAP = 0.06  # between stacked panels, as a share of the figure


def packed(values: np.ndarray) -> dict[str, Any]:
    """A matrix or vector as Plotly's typed array (base64 of float32, a third of the JSON)."""
    data = np.ascontiguousarray(values, dtype=np.float32)
    spec: dict[str, Any] = {"dtype": "f4", "bdata": base64.b64encode(data.tobytes()).decode()}
    if data.ndim == 2:
        spec["shape"] = f"{data.shape[0]}, {data.shape[1]}"
    return spec


def smooth(values: np.ndarray, weight: float) -> np.ndarray:
    """Exponential moving average without start-up bias; `weight` in [0, 1) is the share of the past."""
    if weight <= 0 or len(values) < 2:
        return np.asarray(values, dtype=np.float64)
    series = pd.Series(np.where(np.isfinite(values), values, np.nan))
    return series.ewm(alpha=1 - weight, adjust=True, ignore_na=True).mean().to_numpy()


def thin(steps: np.ndarray, values: np.ndarray, limit: int = MAX_POINTS) -> np.ndarray:
    """Indices of at most about `limit` points: lowest and highest of each bin, first, last. Spikes survive.

    A bin covers a power of two of points and begins at a multiple of that, so a curve that grows keeps the
    points that it has, and a live update need only bring the new ones.
    """
    count = len(steps)
    if count <= limit:
        return np.arange(count)
    width = 1
    while -(-count // width) * 2 > limit:
        width *= 2
    room = np.full(-(-count // width) * width, np.nan)
    room[:count] = values
    starts = np.arange(0, count, width)
    low = np.where(np.isfinite(room), room, np.inf).reshape(-1, width).argmin(axis=1)
    high = np.where(np.isfinite(room), room, -np.inf).reshape(-1, width).argmax(axis=1)
    return np.unique(np.concatenate([[0, count - 1], starts + low, starts + high]))


def window(steps: np.ndarray, shown: tuple[float, float] | None) -> slice:
    """The points of a step range and one on each side, so that a zoomed line reaches the edge."""
    if shown is None:
        return slice(None)
    first, last = np.searchsorted(steps, shown[0]), np.searchsorted(steps, shown[1], side="right")
    return slice(max(int(first) - 1, 0), int(last) + 1)


def line(steps: np.ndarray, values: np.ndarray, name: str, color: str, **extra: Any) -> dict[str, Any]:
    """One thinned curve as a scatter trace of plain lists."""
    steps, values = np.asarray(steps), np.asarray(values, dtype=np.float64)
    index = thin(steps, values)
    few = len(index) <= 2
    trace = {
        "type": "scatter",
        "mode": "lines+markers" if few else "lines",
        "name": name,
        "x": steps[index].tolist(),
        "y": rounded(values[index]),
        "line": {"color": color, "width": extra.pop("width", 1.5)},
        "hovertemplate": "%{y:.3~g}",
    }
    if "dash" in extra:
        trace["line"]["dash"] = extra.pop("dash")
    return trace | extra


@dataclass
class Panel:
    """One row of a stacked figure: its traces, the title of its value axis and its share of the height."""

    traces: list[dict[str, Any]]
    title: str
    weight: float = 1.0
    log: bool = False
    axis: dict[str, Any] | None = None


def stack(panels: list[Panel], style: Style, steps: tuple[float, float] | None = None) -> Figure:
    """Panels below each other on one step axis, so that a zoom or the cursor applies to all of them."""
    total = sum(panel.weight for panel in panels)
    usable = 1 - GAP * (len(panels) - 1)
    layout: dict[str, Any] = {"showlegend": True}
    data: list[dict[str, Any]] = []
    top = 1.0
    for i, panel in enumerate(panels, start=1):
        height = usable * panel.weight / total
        key = "" if i == 1 else str(i)
        axis: dict[str, Any] = {
            "domain": [max(top - height, 0.0), top],
            "anchor": "x",
            "title": {"text": panel.title},
            "nticks": 5,
        }
        values = np.array([y for trace in panel.traces for y in trace["y"]], dtype=float)
        axis |= log_axis(values) if panel.log else level(values)
        layout["yaxis" + key] = axis | (panel.axis or {})
        data += [trace | {"xaxis": "x", "yaxis": "y" + key} for trace in panel.traces]
        top -= height + GAP
    layout["xaxis"] = step_axis(steps, data) | {
        "anchor": "y" + ("" if len(panels) == 1 else str(len(panels)))
    }
    if style.narrow:
        layout["legend"] = {"font": {"size": 11}}
    else:
        layout["margin"] = {"l": 8, "r": 12, "t": 30, "b": 8}  # one line of legend
    return {"data": data, "layout": layout}


def step_axis(
    steps: tuple[float, float] | None = None, data: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """The step axis, zoomed to a range when there is one; else as long as the traces, without padding.

    Its mark tells `times.shown` to convert it, with all that lies on it, when the reader prefers time.
    """
    axis: dict[str, Any] = {"title": {"text": "optimizer step"}, "hoverformat": ",d", "tickformat": ",d"}
    axis["uirevision"] = STEPS  # Plotly allows no attribute of our own
    ends = [trace["x"][end] for trace in data if len(trace["x"]) for end in (0, -1)]
    if steps:
        axis |= {"range": list(steps), "autorange": False}
    elif ends and min(ends) < max(ends):
        axis["autorangeoptions"] = {"clipmin": min(ends), "clipmax": max(ends)}
    return axis


def log_axis(values: np.ndarray) -> dict[str, Any]:
    """A logarithmic axis with at most six labels: powers of ten, or 1-2-5 steps on a short range."""
    with np.errstate(invalid="ignore"):
        finite = values[np.isfinite(values) & (values > 0)]
    if not len(finite):
        return {}
    low, high = float(np.log10(finite.min())), float(np.log10(finite.max()))
    pad = max(0.05 * (high - low), 0.04)
    low, high = low - pad, high + pad
    powers = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    jump = max(1, round((high - low) / 4.5))
    ticks = [10.0**p for p in powers if low <= p <= high and p % jump == 0]
    if len(ticks) < 2:
        ticks = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= np.log10(m * 10.0**p) <= high]
    if len(ticks) < 2:
        ticks = [float(f"{10**x:.2g}") for x in np.linspace(low + pad, high - pad, 2)]
    labels = [power(tick) for tick in ticks]
    return {"type": "log", "range": [low, high], "tickvals": ticks, "ticktext": labels}


def level(values: np.ndarray) -> dict[str, Any]:
    """The axis of a constant: one tick at its value instead of a range from Plotly's imagination."""
    finite = values[np.isfinite(values)]
    if not len(finite) or finite.min() < finite.max():
        return {}
    value = float(finite[0])
    reach = abs(value) or 1.0
    return {"range": [value - reach, value + reach], "tickvals": [value], "ticktext": [number(value)]}


def wide(values: np.ndarray) -> bool:
    """Whether positive values span three decades, so that a linear axis would show only the largest."""
    finite = values[np.isfinite(values)]
    return bool(len(finite) and finite.min() > 0 and finite.max() > 1e3 * finite.min())


def power(value: float) -> str:
    """A tick of a logarithmic axis: 0.01, 50, 10 to the -5."""
    if 0.001 <= value < 100_000:
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    ten = f"10<sup>{int(exponent)}</sup>"
    return ten if float(mantissa) == 1 else f"{float(mantissa):g}·{ten}"


def log_safe(values: np.ndarray) -> np.ndarray:
    """Values for a logarithmic axis: what is not positive becomes a gap."""
    values = np.asarray(values, dtype=np.float64)
    return np.where(values > 0, values, np.nan)
