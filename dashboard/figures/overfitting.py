"""Training against validation, the gap with its noise, the best step; and how the weights grew meanwhile."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ...monitor.detectors.validation import Stop
from ...monitor.losses import gap
from ..text import integer, number, short
from .base import Panel, line, stack
from .loss import gap_panel, loss_panel
from .theme import Figure, Style, message


def overfitting(
    train: pd.DataFrame,
    val: pd.DataFrame,
    style: Style,
    smoothing: float = 0.0,
    log: bool = False,
    steps: tuple[float, float] | None = None,
    *,
    robust: bool = False,
    relative: bool = False,
    stop: Stop | None = None,
    metric: str = "loss",
    falls: bool = True,
) -> Figure:
    """The metric of both, its gap below, the best step and where early stopping would have stopped."""
    panels = [loss_panel(train, val, style, smoothing, log, steps, robust, metric)]
    gaps = signed_gap(train, val, falls)
    if len(gaps):
        panels.append(gap_panel(gaps, style, relative))
    figure = stack(panels, style, steps)
    figure["layout"].setdefault("legend", {})["traceorder"] = "normal"  # a filled band reverses it
    if stop:
        figure["data"].append(_best(stop, style))
        figure["layout"]["shapes"] = _lines(stop, style)
        if stop.at is not None:
            figure["layout"]["annotations"] = [_stopped(stop.at, style)]
    return figure


def signed_gap(train: pd.DataFrame, val: pd.DataFrame, falls: bool) -> pd.DataFrame:
    """The gap so that more is worse: of an accuracy it is training minus validation."""
    if falls:
        return gap(train, val)
    found = gap(*(frame.assign(value=-frame["value"]) for frame in (train, val)))
    return found.assign(train=-found["train"], val=-found["val"])


def _best(stop: Stop, style: Style) -> dict[str, Any]:
    color = style.palette.good
    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"best validation: {number(stop.best_value)} at step {integer(stop.best)}",
        "x": [stop.best],
        "y": [stop.best_value],
        "xaxis": "x",
        "yaxis": "y",
        "marker": {"size": 11, "symbol": "circle-open", "color": color, "line": {"width": 2}},
        "hovertemplate": "%{y:.3~g}",
        "meta": {"skip": True},
    }


def _lines(stop: Stop, style: Style) -> list[dict[str, Any]]:
    across = {"type": "line", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    marks = [(stop.best, style.palette.good, "dot")]
    if stop.at is not None:
        marks.append((stop.at, style.palette.warning, "dash"))
    return [
        across | {"x0": x, "x1": x, "line": {"color": color, "width": 1.2, "dash": dash}}
        for x, color, dash in marks
    ]


def _stopped(step: int, style: Style) -> dict[str, Any]:
    return {
        "text": "early stop",
        "x": step,
        "xref": "x",
        "xanchor": "left",
        "xshift": 4,
        "y": 1,
        "yref": "paper",
        "yanchor": "top",
        "showarrow": False,
        "font": {"size": 11, "color": style.palette.warning},
    }


def growth(
    weights: dict[str, pd.DataFrame],
    drift: dict[str, pd.DataFrame],
    style: Style,
    steps: tuple[float, float] | None = None,
) -> Figure:
    """Weight norm and drift: all layers together in bold, the layers that grew or moved most beside them."""
    panels = [
        Panel(_curves(curves, style, title), title, 1.0)
        for curves, title in ((weights, "weight norm<br>÷ first"), (drift, "drift"))
        if curves
    ]
    if not panels:
        return message("No weight norms and no drift were captured.", style)
    return stack(panels, style, steps)


def _curves(curves: dict[str, pd.DataFrame], style: Style, title: str) -> list[dict[str, Any]]:
    p = style.palette
    colors = [p.accent, p.second, p.third, p.fourth, p.info]
    what = "drift" if title == "drift" else "norm"
    traces = []
    for (name, frame), color in zip(curves.items(), colors, strict=False):
        width = 2.2 if not traces else 1.1
        shown = f"{what}: {short(name, 30)}"
        trace = line(frame["step"].to_numpy(), frame["value"].to_numpy(), shown, color, width=width)
        traces.append(trace | ({"line": trace["line"] | {"dash": "solid" if not traces else "dot"}}))
    return traces
