"""How far each layer has moved from the reference."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
from dash import ClientsideFunction, Dash, Input, Output, State, html

from ...monitor import Run
from ..components import card, choice, layer_link, pattern, step_slider, toolbar
from ..figures.grid import Grid, build, matching, order
from ..figures.layermap import height, layer_map
from ..figures.theme import Figure, Style, message
from ..plots import Plot, Scene, plot_card
from ..queries import Library
from ..urls import View, step_range

NOTHING = (
    "No drift was captured: the run has no reference (watch(..., reference=None)), or no step was taken yet. "
    'Use reference="start", a state_dict or a checkpoint path.'
)


def layout(view: View, library: Library, style: Style) -> list[Any]:
    """Reference, map with bars, frozen layers."""
    run = library.run(view.run)
    blocks = view.params.get("group") == "block"
    base = grid(library, run, blocks)
    return [
        toolbar(
            view,
            choice(view, "group", {"layer": "Layer", "block": "Block"}, "layer", "Rows"),
            pattern(view),
            choice(
                view, "order", {"depth": "Depth", "name": "Name", "badness": "Most moved"}, "depth", "Order"
            ),
            choice(view, "scale", {"linear": "Linear", "log": "Log"}, "linear", "Colours"),
            step_slider(view, base.steps.tolist()),
        ),
        html.P(reference_sentence(run), className="plot-note"),
        plot_card(DRIFT, style, height=height(len(base.names), style.narrow)),
        html.Div(still_card(run, view.run), id="still"),
    ]


def reference_sentence(run: Run) -> str:
    """What drift is measured from, in words."""
    reference = run.info.get("reference")
    if reference in (None, "", "none"):
        return "This run has no reference."
    if reference == "start":
        return "The reference is the weights at the start of this run; what started at zero stays blank."
    if isinstance(reference, dict):
        reference = (
            reference.get("path") or reference.get("name") or reference.get("kind") or "a given state_dict"
        )
    if reference == "state_dict":
        return "The reference is the state_dict that was passed to watch()."
    return f"The reference is {reference}."


def still_card(run: Run, name: str) -> list[Any]:
    """Layers that cannot move or did not, by name."""
    tensors, drift = run.tensors(), run.drift()
    if tensors.empty:
        return []
    latest = (
        drift.sort_values("step").groupby("tensor")["relative_l2"].last()
        if len(drift)
        else pd.Series(dtype=float)
    )
    unmoved = set(latest[latest == 0].index)
    groups = [
        ("Frozen (requires_grad is off)", tensors.loc[tensors["state"] == "frozen", "tensor"].tolist()),
        ("Not in the optimizer", tensors.loc[tensors["state"] == "no_optimizer", "tensor"].tolist()),
        ("Learning rate 0", tensors.loc[tensors["state"] == "lr_zero", "tensor"].tolist()),
    ]
    named = {layer for _, layers in groups for layer in layers}
    rest = [layer for layer in tensors["tensor"] if layer in unmoved and layer not in named]
    groups.append(("Trainable, yet not moved at all", rest))
    items = [
        html.Div(
            [
                html.H3([title, " ", html.Span(str(len(layers)), className="dim")]),
                html.Div([layer_link(name, layer) for layer in layers[:60]], className="finding-layers"),
                html.P(f"and {len(layers) - 60} more", className="dim") if len(layers) > 60 else None,
            ]
        )
        for title, layers in groups
        if layers
    ]
    if not items:
        return [card("Layers that stand still", "None: every layer has moved from the reference.")]
    return [card("Layers that stand still", "Frozen on purpose or not: these have not moved.", *items)]


def block_of(name: str) -> str:
    """The block of a tensor: its name up to the first number (encoder.layer.3), else its first part.

    >>> block_of("encoder.layer.3.attention.query.weight"), block_of("head.weight"), block_of("w")
    ('encoder.layer.3', 'head', 'w')
    """
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", name)
    return found.group() if found else name.split(".")[0]


def by_block(frame: pd.DataFrame) -> pd.DataFrame:
    """Drift rows added up per block: the squares of distance and reference norm add."""
    blocks = frame.assign(
        tensor=frame["tensor"].map(block_of),
        distance=frame["distance"] ** 2,
        reference_norm=frame["reference_norm"] ** 2,
    )
    total = blocks.groupby(["tensor", "step"], sort=False)[["distance", "reference_norm"]].sum().reset_index()
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.sqrt(total["distance"] / total["reference_norm"])
    total["relative_l2"] = relative.where(total["reference_norm"] > 0)
    return total


def grid(library: Library, run: Run, blocks: bool) -> Grid:
    """Layers (or blocks) x steps of relative L2."""

    def make() -> Grid:
        frame = run.drift()
        if len(frame) and blocks:
            frame = by_block(frame)
        if frame.empty:
            return build(frame, np.array([]))
        values = frame["relative_l2"].to_numpy(dtype=float)
        bad = ~np.isfinite(frame["distance"].to_numpy(dtype=float))
        return build(frame, np.where(np.isfinite(values), values, np.nan), bad)

    return library.memo(run, ("drift", blocks), make)


def draw(scene: Scene) -> Figure:
    """The drift map with bars at one step."""
    whole = grid(scene.runs, scene.run, scene.text("group") == "block")
    if whole.empty:
        return message(NOTHING, scene.style)
    found, wrong = matching(whole.names, scene.text("filter"))
    if wrong or not found:
        return message(wrong or f"No layer matches {scene.text('filter')!r}.", scene.style)
    log, at = scene.text("scale") == "log", scene.values.get("at")
    chosen = order(whole.rows(found), scene.text("order", "depth"), log=False)
    return layer_map(
        chosen,
        "relative L2",
        scene.style,
        log=log,
        colors="full",
        steps=step_range(scene.text("range")),
        at=None if at is None or at >= whole.steps[-1] else float(at),
        bars=True,
    )


DRIFT = Plot(
    "drift-map",
    "Drift from the reference",
    "Relative L2 distance |w − reference| ÷ |reference|: 0 is unmoved, 1 moved by its own length. "
    "Bars: every row at the chosen step. Click a row to open the layer.",
    draw,
    ("group", "filter", "order", "scale", "at"),
    good="Layers of one role move by similar amounts; in fine-tuning later ones more, all of them little.",
    bad="One layer or block far ahead of its like, or drift that grows without slowing down.",
    keep=("group", "filter", "order"),
)
PLOTS = (DRIFT,)


def register(app: Dash, library: Library) -> None:
    """The click that opens a layer (a block is not one); layers that begin to move leave the list."""
    app.clientside_callback(
        ClientsideFunction("layerwatch", "openLayer"),
        Output("clicked", "data", allow_duplicate=True),
        Input("drift-map", "clickData"),
        State("page", "data"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("still", "children"), Input("pulse", "data"), State("page", "data"), prevent_initial_call=True
    )
    def update(_pulse: Any, page: dict[str, Any]) -> list[Any]:
        return still_card(library.run(page["run"]), page["run"])
