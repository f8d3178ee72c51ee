"""Where in the network the signal dies or explodes: layer x step, one quantity at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from dash import ClientsideFunction, Dash, Input, Output, State, html

from ...monitor import Run
from ..components import choice, pattern, select, step_slider, toolbar
from ..figures.grid import Grid, build, matching, order
from ..figures.layermap import height, layer_map
from ..figures.theme import Figure, Style, message
from ..plots import Plot, Scene, plot_card
from ..queries import Library
from ..urls import View, step_range


@dataclass(frozen=True)
class Metric:
    """A quantity of the heat map: its kind of rows, how it is read from them, and how its colours run."""

    title: str
    kind: str
    read: Callable[[pd.DataFrame], np.ndarray]
    log: bool
    explain: str


def _column(name: str) -> Callable[[pd.DataFrame], np.ndarray]:
    return lambda frame: frame[name].to_numpy(dtype=float)


def _dead(frame: pd.DataFrame) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 - frame["active_units"].to_numpy(dtype=float) / frame["units"].to_numpy(dtype=float)


#: Columns that the quantities read, by kind of row: no quantile among them, so that no histogram is read.
BASE = ("step", "tensor", "count", "nans", "infs")
READ = {
    "gradient": ("norm", "zeros"),
    "update": ("ratio",),
    "weight": ("norm",),
    "activation": ("rms", "units", "active_units"),
}
METRICS = {
    "gradient_norm": Metric(
        "gradient norm",
        "gradient",
        _column("norm"),
        True,
        "A healthy network changes slowly from top to bottom.",
    ),
    "update_ratio": Metric(
        "update ratio", "update", _column("ratio"), True, "|update| ÷ |weight|: about 10⁻³ is customary."
    ),
    "weight_norm": Metric(
        "weight norm", "weight", _column("norm"), True, "Steady growth can end in instability."
    ),
    "activation_rms": Metric(
        "activation rms", "activation", _column("rms"), True, "Should neither shrink nor grow with depth."
    ),
    "dead_units": Metric(
        "dead unit share",
        "activation",
        _dead,
        False,
        "Units whose output was zero for every sample of the capture.",
    ),
    "zeros": Metric(
        "zero gradient share",
        "gradient",
        lambda f: (f["zeros"] / f["count"]).to_numpy(float),
        False,
        "Exact zeros.",
    ),
    "nonfinite": Metric(
        "non-finite gradient share",
        "gradient",
        lambda f: ((f["nans"] + f["infs"]) / f["count"]).to_numpy(float),
        False,
        "NaN and infinite elements.",
    ),
}
ORDERS = {"depth": "Depth", "name": "Name", "badness": "Worst first"}
COLORS = {"robust": "Robust", "full": "Full", "layer": "Per layer"}


def layout(view: View, library: Library, style: Style) -> list[Any]:
    """The map with its controls."""
    run = library.run(view.run)
    metric = view.params.get("metric", "gradient_norm")
    base = grid(library, run, metric if metric in METRICS else "gradient_norm")
    options = [(key, m.title.capitalize()) for key, m in METRICS.items()]
    return [
        toolbar(
            view,
            select(view, "metric", options, "gradient_norm", "Quantity"),
            pattern(view),
            choice(view, "order", ORDERS, "depth", "Order"),
            choice(view, "colors", COLORS, "robust", "Colours"),
            step_slider(view, base.steps.tolist()),
        ),
        html.P(id="flow-note", className="plot-note"),
        plot_card(FLOW, style, height=height(len(base.names), style.narrow)),
    ]


def grid(library: Library, run: Run, metric: str) -> Grid:
    """The whole matrix of a quantity, remembered until the run grows."""
    quantity = METRICS[metric]

    def make() -> Grid:
        frame = run.stats(quantity.kind, None, [*BASE, *READ[quantity.kind]])
        if frame.empty:
            return build(frame, np.array([]))
        bad = (frame["nans"] + frame["infs"]).to_numpy() > 0
        return build(frame, quantity.read(frame), bad)

    return library.memo(run, ("grid", metric), make)


def draw(scene: Scene) -> Figure:
    """The heat map for the chosen quantity, filter, order, colours and zoom."""
    name = scene.text("metric", "gradient_norm")
    metric = METRICS.get(name, METRICS["gradient_norm"])
    whole = grid(scene.runs, scene.run, name if name in METRICS else "gradient_norm")
    if whole.empty:
        return message(
            f"This run holds no {metric.kind} rows, so there is no {metric.title} to show.", scene.style
        )
    found, _ = matching(whole.names, scene.text("filter"))
    if not found:
        return message(f"No layer matches {scene.text('filter')!r}.", scene.style)
    chosen = order(whole.rows(found), scene.text("order", "depth"), metric.log)
    steps, at = step_range(scene.text("range")), scene.values.get("at")
    last = whole.steps[-1]
    return layer_map(
        chosen,
        metric.title,
        scene.style,
        log=metric.log,
        colors=scene.text("colors", "robust"),
        steps=steps,
        at=None if at is None or at >= last else float(at),
    )


FLOW = Plot(
    "flow-map",
    "Layer × step",
    "One row a layer, one column a capture; a cell shows the largest value it covers, NaN and infinity are "
    "red. Click a row to open the layer; drag to zoom in, which reads again at full resolution.",
    draw,
    ("metric", "filter", "order", "colors", "at"),
    good="Rows of similar colour from top to bottom, changing slowly with the steps.",
    bad="A slope from top to bottom (vanishing, exploding), a row unlike its neighbours, red cells.",
    keep=("filter", "order"),
)
PLOTS = (FLOW,)


def register(app: Dash, library: Library) -> None:
    """A note under the title, and the click that opens a layer."""

    @app.callback(
        Output("flow-note", "children"),
        Input({"state": "metric"}, "value"),
        Input({"state": "filter"}, "value"),
        State("page", "data"),
    )
    def note(metric: str, text: str, page: dict[str, Any]) -> str:
        quantity = METRICS.get(metric, METRICS["gradient_norm"])
        whole = grid(library, library.run(page["run"]), metric if metric in METRICS else "gradient_norm")
        found, wrong = matching(whole.names, text or "")
        if wrong:
            return wrong
        count = f"{len(found)} of {len(whole.names)} layers. " if text else f"{len(whole.names)} layers. "
        return f"{quantity.title.capitalize()}: {quantity.explain} {count}"

    app.clientside_callback(
        ClientsideFunction("layerwatch", "openLayer"),
        Output("clicked", "data", allow_duplicate=True),
        Input("flow-map", "clickData"),
        State("page", "data"),
        prevent_initial_call=True,
    )
