"""Training and validation loss, the gap between them, and the findings on the same step axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd

from ..text import integer, number, words
from .base import Panel, line, log_safe, smooth, stack, thin, window
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


def gap(train: pd.DataFrame, val: pd.DataFrame) -> pd.DataFrame:
    """Validation minus training loss at each validation step.

    The training loss is the mean since the previous validation, because one batch is too noisy to subtract;
    where nothing was logged in between it is interpolated. Columns: step, train, val, gap.
    """
    columns = ["step", "train", "val", "gap"]
    train, val = train[np.isfinite(train["value"])], val[np.isfinite(val["value"])]
    if train.empty or val.empty:
        return pd.DataFrame(columns=columns, dtype=float)
    steps, values = train["step"].to_numpy(), train["value"].to_numpy()
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = val["step"].to_numpy()
    stop = np.searchsorted(steps, at, side="right")
    start = np.concatenate([[0], stop[:-1]])
    count = stop - start
    mean = (total[stop] - total[start]) / np.maximum(count, 1)
    mean = np.where(count > 0, mean, np.interp(at, steps, values))
    return pd.DataFrame(
        {"step": at, "train": mean, "val": val["value"].to_numpy(), "gap": val["value"] - mean}
    )


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


def gap_panel(frame: pd.DataFrame, style: Style) -> Panel:
    """Generalisation gap: validation minus training loss."""
    color = style.palette.third
    trace = line(frame["step"].to_numpy(), frame["gap"].to_numpy(), "gap", color, width=1.2)
    trace |= {"fill": "tozeroy", "fillcolor": translucent(color, 0.18)}
    return Panel([trace], "gap", 0.42, axis={"zeroline": True, "zerolinecolor": style.palette.line})


def loss(
    train: pd.DataFrame,
    val: pd.DataFrame,
    findings: Sequence[Marked],
    style: Style,
    smoothing: float = 0.0,
    log: bool = False,
    steps: tuple[float, float] | None = None,
) -> Figure:
    """Losses, gap and findings stacked on one step axis. Frames have columns step and value."""
    traces = loss_traces(train, val, style, smoothing, steps)
    if log:
        for trace in traces:
            trace["y"] = [y if y is not None and y > 0 else None for y in trace["y"]]
    panels = [Panel(traces, "loss", 1.0, log)]
    gaps = gap(train, val)
    if len(gaps):
        panels.append(gap_panel(gaps, style))
    shown = list(findings)[:MAX_LANES]
    last = max([int(f["step"].max()) for f in (train, val) if len(f)] + [f.last_step for f in shown] + [1])
    if shown:
        panels.append(_lanes(shown, last, style))
    figure = stack(panels, style, steps)
    figure["layout"]["shapes"] = _marks(shown, style)
    return figure


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


def overfitting(
    train: pd.DataFrame,
    val: pd.DataFrame,
    growth: pd.DataFrame,
    style: Style,
    smoothing: float = 0.0,
    log: bool = False,
    steps: tuple[float, float] | None = None,
) -> Figure:
    """Losses with the best validation step marked, the gap, and the growth of the weight norm."""
    p = style.palette
    panels = [Panel(loss_traces(train, val, style, smoothing, steps), "loss", 1.0, log)]
    gaps = gap(train, val)
    if len(gaps):
        panels.append(gap_panel(gaps, style))
    if len(growth):
        trace = line(growth["step"].to_numpy(), log_safe(growth["value"].to_numpy()), "weight norm", p.fourth)
        panels.append(Panel([trace], "weight norm<br>÷ first", 0.42))
    figure = stack(panels, style, steps)
    best = best_validation(val)
    if best:
        step, value = best
        figure["data"].append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"best validation: {number(value)} at step {integer(step)}",
                "x": [step],
                "y": [value],
                "xaxis": "x",
                "yaxis": "y",
                "marker": {"size": 11, "symbol": "circle-open", "color": p.good, "line": {"width": 2}},
                "hovertemplate": "%{y:.3~g}",
            }
        )
        mark = {"type": "line", "xref": "x", "yref": "paper", "x0": step, "x1": step, "y0": 0, "y1": 1}
        figure["layout"]["shapes"] = [
            mark | {"layer": "below", "line": {"color": p.good, "width": 1, "dash": "dot"}}
        ]
    return figure


def best_validation(val: pd.DataFrame) -> tuple[int, float] | None:
    """(step, loss) of the lowest finite validation loss."""
    finite = val[np.isfinite(val["value"])]
    if finite.empty:
        return None
    row = finite.loc[finite["value"].idxmin()]
    return int(row["step"]), float(row["value"])


def stopping_advice(train: pd.DataFrame, val: pd.DataFrame) -> str:
    """One sentence: when validation was best, what happened since, what stopping there would have saved."""
    best = best_validation(val)
    if best is None:
        return "No finite validation loss was logged, so there is nothing to stop by."
    step, value = best
    finite = val[np.isfinite(val["value"])]
    final, end = (
        float(finite["value"].iloc[-1]),
        int(max(val["step"].max(), train["step"].max() if len(train) else 0)),
    )
    since = int((finite["step"] > step).sum())
    if since == 0 or final <= value * 1.02:
        return (
            f"Validation loss is at its best now ({number(value)} at step {integer(step)}, "
            f"last {number(final)}): no reason to stop early."
        )
    rise = 100 * (final / value - 1) if value > 0 else float("nan")
    return (
        f"Validation loss was lowest at step {integer(step)} ({number(value)}) and has risen by "
        f"{number(rise)} % to {number(final)} over the {integer(since)} validations since. "
        f"Stopping there would have saved {integer(end - step)} of {integer(end)} steps "
        f"({number(100 * (end - step) / max(end, 1))} %)."
    )
