"""Whether the network still learns what carries over: training against validation, and when to stop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from dash import Dash, Input, Output, State, html

from ...monitor import Run
from ..components import code, key_figure, notice, scale, smoothing, toolbar
from ..figures.loss import best_validation, gap, overfitting, stopping_advice
from ..figures.theme import Figure, Style, message
from ..plots import Plot, Scene, plot_card
from ..queries import Library
from ..text import integer, number
from ..urls import View, fraction, step_range

HOW = "watcher.log(val_loss=validate(model))   # whenever you validate; it attaches to the current step"


def layout(view: View, library: Library, style: Style) -> list[Any]:
    """The stopping sentence, its numbers, the curves."""
    run = library.run(view.run)
    losses = [run.scalars(name)["value"].to_numpy() for name in ("train_loss", "val_loss")]
    parts: list[Any] = []
    if run.scalars("val_loss").empty:
        text = [
            html.P(
                "Overfitting shows as a gap between validation and training loss. Log the validation loss:"
            ),
            code(HOW),
        ]
        parts.append(notice("No val_loss was logged", text))
    parts += [
        html.Div(summary(run), id="overfitting-summary", className="body"),
        toolbar(view, scale(view, *losses), smoothing(view)),
        plot_card(CURVES, style),
    ]
    return parts


def summary(run: Run) -> list[Any]:
    """Key figures and the sentence on stopping."""
    train, val = run.scalars("train_loss"), run.scalars("val_loss")
    best = best_validation(val)
    if best is None:
        return []
    gaps = gap(train, val)
    now = gaps["gap"].iloc[-1] if len(gaps) else None
    then = gaps.loc[gaps["step"] == best[0], "gap"].tolist()
    figures = [
        key_figure("Best validation", number(best[1]), f"at step {integer(best[0])}", "good"),
        key_figure(
            "Latest validation", number(val["value"].iloc[-1]), f"at step {integer(val['step'].iloc[-1])}"
        ),
        key_figure("Gap now", number(now), "validation − training"),
        key_figure("Gap at the best", number(then[0] if then else None)),
        key_figure("Weight norm ÷ first", number(_last(weight_growth(run))), "all layers"),
    ]
    advice = html.P(stopping_advice(train, val), className="lead")
    return [html.Div(figures, className="kpis"), html.Div(advice, className="card")]


def _last(frame: pd.DataFrame) -> float | None:
    return float(frame["value"].iloc[-1]) if len(frame) else None


def weight_growth(run: Run) -> pd.DataFrame:
    """The norm over all weights by step, relative to the first capture. Columns: step, value."""
    frame = run.stats("weight", None, ["step", "norm"])
    if frame.empty:
        return pd.DataFrame({"step": [], "value": []})
    squares = frame.assign(square=frame["norm"] ** 2).groupby("step")["square"].agg(["sum", "count"])
    total = np.sqrt(squares.loc[squares["count"] == squares["count"].max(), "sum"])
    first = float(total.iloc[0])
    values = total.to_numpy() / first if first > 0 else total.to_numpy()
    return pd.DataFrame({"step": total.index.to_numpy(), "value": values})


def draw(scene: Scene) -> Figure:
    """Losses, gap and growth."""
    run = scene.run
    train, val = run.scalars("train_loss"), run.scalars("val_loss")
    if train.empty and val.empty:
        return message("Neither train_loss nor val_loss was logged in this run.", scene.style)
    growth = scene.runs.memo(run, "growth", lambda: weight_growth(run))
    steps = step_range(scene.text("range"))
    weight = fraction(scene.values["smoothing"])
    return overfitting(train, val, growth, scene.style, weight, scene.text("scale") == "log", steps)


CURVES = Plot(
    "overfitting-plot",
    "Training against validation",
    "Weight norm ÷ first: how much the weights grew, over all layers together.",
    draw,
    ("scale", "smoothing"),
    good="Validation falls with training and levels off; the gap stays within its noise.",
    bad="Validation turns up while training still falls, the gap widens, the weights keep growing.",
    height=520,
    keep=("scale",),
)
PLOTS = (CURVES,)


def register(app: Dash, library: Library) -> None:
    """The summary follows a live run."""

    @app.callback(
        Output("overfitting-summary", "children"),
        Input("pulse", "data"),
        State("page", "data"),
        prevent_initial_call=True,
    )
    def update(_pulse: Any, page: dict[str, Any]) -> list[Any]:
        return summary(library.run(page["run"]))
