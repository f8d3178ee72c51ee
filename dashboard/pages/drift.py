"""How far each layer has moved from the reference."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import pandas as pd
from dash import ALL, ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update

from ...monitor import Run
from .. import drifting
from ..components import card, choice, layer_link, pattern, select, state_id, toolbar
from ..drifting import GROUPS, METRICS, REFERENCE
from ..figures.grid import Grid, matching, order
from ..figures.layermap import height, layer_map
from ..figures.profile import profile_column
from ..figures.theme import Figure, Style, message
from ..plots import Plot, Scene, plot_card
from ..queries import Library
from ..urls import View, href, step_range
from .slices import sliders, step_of

NOTHING = (
    "No drift was captured: the run has no reference (watch(..., reference=None)), or no step was taken yet. "
    'Use reference="start", a state_dict or a checkpoint path.'
)
ORDERS = {"depth": "Depth", "name": "Name", "badness": "Most moved"}
SHOWN = 8  # rows of the ranking
CELLS = 4  # of a row, besides the layer


def layout(view: View, library: Library, style: Style) -> list[Any]:
    """Reference, map with bars, who moved most, frozen layers."""
    run = library.run(view.run)
    rows = len(run.names("drift")) or len(run.tensors())
    words = {key: metric.word for key, metric in METRICS.items()}
    still = still_layers(run)
    return [
        toolbar(
            view,
            select(view, "from", drifting.sources(run), drifting.sources(run)[0][0], "From", 180),
            choice(view, "metric", words, "relative_l2", "Measure"),
            choice(view, "group", GROUPS, "layer", "Rows"),
            pattern(view),
            choice(view, "order", ORDERS, "depth", "Order"),
            choice(view, "scale", {"linear": "Linear", "log": "Log"}, "linear", "Colours"),
        ),
        html.P(
            [reference_sentence(run), " ", html.Span(id="drift-blocks", className="dim")],
            className="plot-note",
        ),
        plot_card(DRIFT, style, tools=sliders(view, run, compare=False), height=height(rows, style.narrow)),
        card(
            "Moved most among their like",
            "Relative L2 against the median of all layers of the same role at this step; the score is a "
            "robust z of its logarithm, unusual from about 3.5.",
            rank_table(),
        ),
        html.Div(still_card(still, view.run), id="still"),
        dcc.Store(id="still-layers", data=still),
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
    return f"The reference is {'/'.join(PurePath(str(reference)).parts[-2:])}."


def rank_table() -> html.Div:
    """The ranking, empty: its cells are filled by a callback, so that a live run takes no focus away."""
    head = html.Tr([html.Th(word) for word in ("Layer", "Role", "Moved by", "Median of the role", "Score")])
    rows = [
        html.Tr(
            [
                html.Td(html.A(id={"rank": row}, className="layer-link")),
                *[
                    html.Td(id={"row": row, "cell": cell}, className="figure" if cell else "")
                    for cell in range(CELLS)
                ],
            ]
        )
        for row in range(SHOWN)
    ]
    note = html.P(id="rank-note", className="dim")
    return html.Div([html.Table([html.Thead(head), html.Tbody(rows)], id="ranks", className="plain"), note])


def still_layers(run: Run) -> dict[str, list[str]]:
    """Layers that cannot move or did not, by the reason."""
    tensors = run.tensors()
    if tensors.empty:
        return {}
    groups = {
        reason: tensors.loc[tensors["state"] == state, "tensor"].tolist()
        for reason, state in (
            ("Frozen (requires_grad is off)", "frozen"),
            ("Not in the optimizer", "no_optimizer"),
            ("Learning rate 0", "lr_zero"),
        )
    }
    last = run.last_step
    drift = run.drift(max_points=64) if last >= 0 and "drift" in run.kinds() else pd.DataFrame()
    latest = (
        drift.groupby("tensor", sort=False)["relative_l2"].last() if len(drift) else pd.Series(dtype=float)
    )
    unmoved, moved = set(latest[latest == 0].index), set(latest[latest > 0].index)
    # A frozen weight moves with its adapter; a rate that has decayed to 0 has moved layers before.
    groups = {reason: [layer for layer in layers if layer not in moved] for reason, layers in groups.items()}
    named = {layer for layers in groups.values() for layer in layers}
    groups["Trainable, yet not moved at all"] = [
        layer for layer in tensors["tensor"] if layer in unmoved and layer not in named
    ]
    return {reason: layers for reason, layers in groups.items() if layers}


def still_card(still: dict[str, list[str]], name: str) -> list[Any]:
    """Layers that stand still, by name."""
    items = [
        html.Div(
            [
                html.H3([title, " ", html.Span(str(len(layers)), className="dim")]),
                html.Div([layer_link(name, layer) for layer in layers[:60]], className="finding-layers"),
                html.P(f"and {len(layers) - 60} more", className="dim") if len(layers) > 60 else None,
            ]
        )
        for title, layers in still.items()
    ]
    if not items:
        return [card("Layers that stand still", "None: every layer has moved from the reference.")]
    return [card("Layers that stand still", "Frozen on purpose or not: these have not moved.", *items)]


def known(value: object, among: Any, default: str) -> str:
    """A value of a control if it is one of these (a URL is user input)."""
    return str(value) if value in among else default


def source_of(run: Run, value: object) -> str:
    """What drift is measured from."""
    among = [source for source, _ in drifting.sources(run)]
    return known(value, among, among[0])


def draw(scene: Scene) -> Figure:
    """The drift map with bars at one step."""
    run, library = scene.run, scene.runs
    source = source_of(run, scene.values.get("from"))
    metric = known(scene.text("metric"), METRICS, "relative_l2")
    group = known(scene.text("group"), GROUPS, "layer")
    if source == REFERENCE and "drift" not in run.kinds():
        return message(NOTHING, scene.style)
    if source != REFERENCE and metric == "flipped":
        return message("Sketches at anchor steps do not tell signs: choose another measure.", scene.style)
    whole = drifting.read(library, run, metric, source, group)
    if whole.empty:
        return message(NOTHING, scene.style)
    found, wrong = matching(whole.names, scene.text("filter"))
    if wrong or not found:
        return message(wrong or f"No layer matches {scene.text('filter')!r}.", scene.style)
    by, log = scene.text("order", "depth"), scene.text("scale") == "log"
    chosen, steps = order(whole.rows(found), by, log=False), step_range(scene.text("range"))
    part = drifting.read(library, run, metric, source, group, steps).aligned(chosen.names)
    figure = layer_map(
        part,
        METRICS[metric].title,
        scene.style,
        log=log,
        colors="full",
        steps=steps,
        at=step_of(scene.values.get("at"), whole),
        whole=chosen,
        bars=True,
        blocks=by == "depth" and group == "layer",
    )
    if group == "block" and figure["data"]:
        figure["data"][0]["meta"]["blocks"] = True  # a click shows the layers of the block
    return figure


def compared(library: Library, run: Run, values: dict[str, Any]) -> tuple[str, list[drifting.Rank], str]:
    """How blocks compare, the ranking, and why there is none."""
    source = source_of(run, values.get("from"))
    if source == REFERENCE and "drift" not in run.kinds():
        return "", [], NOTHING
    layers: Grid = drifting.read(library, run, "relative_l2", source, "layer")
    if layers.empty:
        return "", [], NOTHING
    at = step_of(values.get("at"), layers)
    blocks = drifting.read(library, run, "relative_l2", source, "block")
    found = drifting.ranks(run, layers, profile_column(layers, at))[:SHOWN]
    none = "" if found else "No role has five layers that moved, so there is nothing to compare with."
    return drifting.block_sentence(blocks, profile_column(blocks, at)), found, none


DRIFT = Plot(
    "drift-map",
    "Drift from the reference",
    "How far each row has moved; relative L2 is |w − reference| ÷ |reference|: 0 is unmoved, 1 moved by its "
    "own length. Bars: every row at the chosen step. Click a row to open the layer, a block to see its "
    "layers.",
    draw,
    ("from", "metric", "group", "filter", "order", "scale", "at"),
    good="Layers of one role move by similar amounts; in fine-tuning later ones more, all of them little.",
    bad="One layer or block far ahead of its like, or drift that grows without slowing down.",
    keep=("from", "group", "filter", "order"),
)
PLOTS = (DRIFT,)


def register(app: Dash, library: Library) -> None:
    """The click that opens a layer; the ranking; layers that begin to move leave the list."""
    app.clientside_callback(
        ClientsideFunction("layerwatch", "openRow"),
        Output("clicked", "data", allow_duplicate=True),
        Input("drift-map", "clickData"),
        State("page", "data"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("drift-blocks", "children"),
        Output({"rank": ALL}, "children"),
        Output({"rank": ALL}, "href"),
        Output({"row": ALL, "cell": ALL}, "children"),
        Output("rank-note", "children"),
        Output("ranks", "className"),
        Input(state_id("from"), "value"),
        Input(state_id("at"), "value"),
        Input("pulse", "data"),
        State("page", "data"),
    )
    def rank(source: Any, at: Any, _pulse: Any, page: dict[str, Any]) -> tuple[Any, ...]:
        name = page["run"]
        sentence, found, none = compared(library, library.run(name), {"from": source, "at": at})
        empty = [""] * (SHOWN - len(found))
        links = [href("layer", name, tensor=one.tensor) for one in found]
        cells = [text for one in found for text in drifting.rank_cells(one)]
        names = [one.tensor for one in found]
        shown = "plain" if found else "hidden"
        return sentence, names + empty, links + empty, cells + empty * CELLS, none, shown

    @app.callback(
        Output("still", "children"),
        Output("still-layers", "data"),
        Input("pulse", "data"),
        State("still-layers", "data"),
        State("page", "data"),
        prevent_initial_call=True,
    )
    def update(_pulse: Any, before: dict[str, list[str]], page: dict[str, Any]) -> tuple[Any, Any]:
        now = still_layers(library.run(page["run"]))
        return (still_card(now, page["run"]), now) if now != before else (no_update, no_update)
