"""Training and validation loss, the gap between them, and the findings on the same step axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd

from ...monitor.losses import gap
from ..text import integer, words
from .base import Panel, line, log_axis, smooth, stack, thin, window
from .curves import aired, limits
from .evidence import Region, shaded
from .theme import Figure, Style, translucent, wrap

MAX_LANES = 8


class Marked(Protocol):
    """What a mark needs of a finding."""

    @property
    def problem(self) -> str: ...
    @property
    def severity(self) -> str: ...
    @property
    def first_step(self) -> int: ...
    @property
    def last_step(self) -> int: ...
    @property
    def summary(self) -> str: ...


def loss_traces(
    train: pd.DataFrame,
    val: pd.DataFrame,
    style: Style,
    smoothing: float,
    shown: tuple[float, float] | None = None,
) -> list[dict[str, Any]]:
    """The two losses: raw faint behind smooth, steps that are not finite in red."""
    p = style.palette
    traces = []
    for frame, name, color in ((train, "train", p.accent), (val, "validation", p.second)):
        if frame.empty:
            continue
        part = window(frame["step"].to_numpy(), shown)
        steps, values = frame["step"].to_numpy()[part], frame["value"].to_numpy(dtype=float)
        if smoothing > 0:
            raw = line(steps, values[part], f"{name} (raw)", translucent(color, 0.28), width=1)
            traces.append(raw | {"showlegend": False, "hoverinfo": "skip", "hovertemplate": None})
        traces.append(line(steps, smooth(values, smoothing)[part], name, color))
        if len(steps) <= 60:
            traces[-1] |= {"mode": "lines+markers", "marker": {"size": 4}}
    for frame, name in ((train, "train"), (val, "validation")):
        traces += _not_finite(frame, name, [train, val], p.critical)
    return traces


def _not_finite(frame: pd.DataFrame, name: str, both: list[pd.DataFrame], color: str) -> list[dict[str, Any]]:
    """A red line at the top over the steps whose loss was NaN or infinite."""
    bad = ~np.isfinite(frame["value"].to_numpy(dtype=float))
    if not bad.any():
        return []
    values = np.concatenate([part["value"].to_numpy(dtype=float) for part in both])
    level = float(np.max(values[np.isfinite(values)], initial=0.0)) or 1.0
    index = thin(np.arange(len(bad)), bad.astype(float))
    trace = line(
        frame["step"].to_numpy()[index],
        np.where(bad[index], level, np.nan),
        f"{name} not finite",
        color,
        width=4,
    )
    few = int(bad.sum()) <= 60
    return [
        trace
        | {"mode": "lines+markers" if few else "lines", "marker": {"size": 5}, "hovertemplate": "not finite"}
    ]


def gap_panel(frame: pd.DataFrame, style: Style, relative: bool = False, title: str = "") -> Panel:
    """Generalisation gap with a band of two standard errors on each side; relative: of the training loss."""
    color, steps = style.palette.third, frame["step"].to_numpy()
    scale = frame["train"].abs().to_numpy() if relative else np.ones(len(frame))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.where(scale > 0, frame["gap"].to_numpy() / scale, np.nan)
        noise = np.where(scale > 0, 2 * frame["noise"].to_numpy() / scale, np.nan)
    traces = []
    if np.isfinite(noise).sum() > 1:
        known = np.isfinite(noise)
        for edge, fill in ((-noise, None), (noise, "tonexty")):
            band = line(steps[known], (values + edge)[known], "noise", color, width=0)
            band |= {"hoverinfo": "skip", "hovertemplate": None, "showlegend": False, "meta": {"skip": True}}
            traces.append(band | ({"fill": fill, "fillcolor": translucent(color, 0.22)} if fill else {}))
    name = title or ("gap ÷ training" if relative else "gap")
    traces.append(line(steps, values, name, color, width=1.4))
    axis = {"zeroline": True, "zerolinecolor": style.palette.line}
    return Panel(traces, "gap<br>÷ training" if relative else "gap", 0.42, axis=axis)


def loss(
    train: pd.DataFrame,
    val: pd.DataFrame,
    findings: Sequence[Marked],
    style: Style,
    smoothing: float = 0.0,
    log: bool = False,
    steps: tuple[float, float] | None = None,
    robust: bool = False,
    selected: Region | None = None,
) -> Figure:
    """Losses, gap and findings stacked on one step axis. Frames have columns step and value.

    `robust`: outliers do not set the value axis. `selected`: the steps of a finding, shaded.
    """
    panels = [loss_panel(train, val, style, smoothing, log, steps, robust)]
    gaps = gap(train, val)
    if len(gaps):
        panels.append(gap_panel(gaps, style))
    shown = list(findings)[:MAX_LANES]
    last = max([int(f["step"].max()) for f in (train, val) if len(f)] + [f.last_step for f in shown] + [1])
    if shown:
        panels.append(_lanes(shown, last, style))
    figure = stack(panels, style, steps)
    figure["layout"].setdefault("legend", {})["traceorder"] = "normal"  # a filled band reverses it
    figure["layout"]["shapes"] = [*(shaded(selected, style) if selected else []), *_marks(shown, style)]
    return figure


def loss_panel(
    train: pd.DataFrame,
    val: pd.DataFrame,
    style: Style,
    smoothing: float = 0.0,
    log: bool = False,
    steps: tuple[float, float] | None = None,
    robust: bool = False,
    title: str = "loss",
) -> Panel:
    """The two losses on their own value axis."""
    traces = loss_traces(train, val, style, smoothing, steps)
    if log:
        for trace in traces:
            trace["y"] = [y if y is not None and y > 0 else None for y in trace["y"]]
    values = np.array([y for trace in traces for y in trace["y"]], dtype=float)
    inside = limits(values, log) if robust else None
    if inside is None:
        return Panel(traces, title, 1.0, log)
    return Panel(
        traces, title, 1.0, log, axis=log_axis(np.array(inside)) if log else {"range": aired(inside)}
    )


def _lanes(findings: list[Marked], last: int, style: Style) -> Panel:
    """One lane a finding: a bar from its first to its last step with its name above it."""
    traces = []
    for row, finding in enumerate(findings):
        color = style.palette.severity(finding.severity)
        late = finding.first_step > 0.55 * last
        start, stop = finding.first_step, max(finding.last_step, finding.first_step)
        label = words(finding.problem)
        anchor = [label, ""] if not late else ["", label]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers+text",
                "name": label,
                "x": [start, stop],
                "y": [-row, -row],
                "text": anchor,
                "textposition": ["top right", "top left"],
                "textfont": {"size": 11, "color": color},
                "line": {"color": color, "width": 4},
                "marker": {"color": color, "size": 7},
                "customdata": [[wrap(finding.summary, 70), integer(start), integer(stop)]] * 2,
                "hovertemplate": "steps %{customdata[1]} to %{customdata[2]}<br>%{customdata[0]}",
                "showlegend": False,
                "cliponaxis": False,
            }
        )
    axis = {"range": [-len(findings) + 0.55, 1.0], "fixedrange": True, "showgrid": False, "zeroline": False}
    return Panel(
        traces, "findings", max(0.17 * len(findings) + 0.08, 0.34), axis=axis | {"showticklabels": False}
    )


def _marks(findings: list[Marked], style: Style) -> list[dict[str, Any]]:
    return [
        {
            "type": "line",
            "xref": "x",
            "yref": "paper",
            "x0": f.first_step,
            "x1": f.first_step,
            "y0": 0,
            "y1": 1,
            "layer": "below",
            "line": {
                "color": translucent(style.palette.severity(f.severity), 0.55),
                "width": 1,
                "dash": "dot",
            },
        }
        for f in findings
    ]


def best_validation(val: pd.DataFrame) -> tuple[int, float] | None:
    """(step, loss) of the lowest finite validation loss."""
    finite = val[np.isfinite(val["value"])]
    if finite.empty:
        return None
    row = finite.loc[finite["value"].idxmin()]
    return int(row["step"]), float(row["value"])
