"""Where in the network the signal dies or explodes: layer x step, one quantity at a time."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, Output, State, html

from ...monitor import Run
from ..components import aria, choice, pattern, state_id, toolbar
from ..figures.depth import slope, slope_sentence
from ..figures.grid import MAX_ROWS, Grid, matching, order
from ..figures.layermap import height, layer_map
from ..figures.profile import profile_column
from ..figures.theme import Figure, Style, message
from ..plots import Plot, Scene, plot_card
from ..quantities import DEFAULT, QUANTITIES, absent, families, guides, known, of_role, read
from ..queries import Library
from ..urls import View, step_range
from . import slices
from .slices import labelled, sliders, step_of

ORDERS = {"depth": "Depth", "name": "Name", "badness": "Worst first"}
COLORS = {"robust": "Robust", "full": "Full", "layer": "Per layer"}


def layout(view: View, library: Library, style: Style) -> list[Any]:
    """The map with its controls. Nothing of the matrix is read yet: the page is there at once."""
    run = library.run(view.run)
    key = known(view.params.get("metric", DEFAULT))
    rows = len(run.names(QUANTITIES[key].kind)) or len(run.tensors())
    return [
        toolbar(
            view,
            metric_choice(view, run),
            choice(view, "role", families(run), "all", "Parameters"),
            pattern(view),
            choice(view, "order", ORDERS, "depth", "Order"),
            choice(view, "colors", COLORS, "robust", "Colours"),
        ),
        html.P(id="flow-note", className="plot-note"),
        plot_card(
            FLOW,
            style,
            tools=sliders(view, run),
            explain=[FLOW.explain, html.Strong(id="flow-slope")],
            height=height(rows, style.narrow),
        ),
    ]


def metric_choice(view: View, run: Run) -> html.Div:
    """The quantities by group. What this run does not hold is listed, disabled, with the reason."""
    groups = []
    for group, members in groupby(QUANTITIES.items(), key=lambda item: item[1].group):
        items = []
        for key, quantity in members:
            why = absent(run, key)
            word = quantity.title[:1].upper() + quantity.title[1:]
            items.append({"value": key, "label": f"{word}: {why}" if why else word, "disabled": bool(why)})
        groups.append({"group": group, "items": items})
    control = dmc.Select(
        id=state_id("metric"),
        data=groups,
        value=known(view.params.get("metric", DEFAULT)),
        size="xs",
        w=220,
        allowDeselect=False,
        searchable=True,
        nothingFoundMessage="nothing of that name",
        maxDropdownHeight=420,
        comboboxProps={"width": 330, "position": "bottom-start"},
        **aria("Quantity"),
    )
    return labelled(control, "Quantity")


def rows(library: Library, run: Run, key: str, family: str, text: str) -> tuple[Grid, Grid, str]:
    """The whole matrix, the rows that role and filter leave, and what is wrong with the filter."""
    whole = read(library, run, key)
    chosen = whole.rows(of_role(run, whole.names, family))
    found, wrong = matching(chosen.names, text)
    return whole, chosen.rows(found), wrong


def draw(scene: Scene) -> Figure:
    """The heat map for the chosen quantity, rows, order, colours and zoom."""
    key = known(scene.text("metric", DEFAULT))
    quantity, run = QUANTITIES[key], scene.run
    if why := absent(run, key):
        return message(f"There is no {quantity.title} to show: {why}.", scene.style)
    family, text = scene.text("role", "all"), scene.text("filter")
    whole, chosen, _ = rows(scene.runs, run, key, family, text)
    if whole.empty:
        return message(f"This run holds no {quantity.title} yet.", scene.style)
    if chosen.empty:
        of = "" if family == "all" else f" of the {families(run).get(family, family).lower()}"
        return message(
            f"No layer{of} matches {text!r}." if text else f"There are no layers{of}.", scene.style
        )
    by = scene.text("order", "depth")
    chosen = order(chosen, by, quantity.log)
    steps = step_range(scene.text("range"))
    part = read(scene.runs, run, key, steps).aligned(chosen.names)
    return layer_map(
        part,
        quantity.title,
        scene.style,
        log=quantity.log,
        colors=scene.text("colors", "robust"),
        steps=steps,
        at=step_of(scene.values.get("at"), whole),
        against=step_of(scene.values.get("against"), whole) or 0.0,
        whole=chosen,
        guides=guides(run, key, chosen.names),
        blocks=by == "depth",
    )


def notes(library: Library, run: Run, values: dict[str, Any]) -> tuple[str, str]:
    """What the map shows, in a line; and the slope over depth when it is steep."""
    key = known(values.get("metric") or DEFAULT)
    quantity = QUANTITIES[key]
    if why := absent(run, key):
        return f"This run holds no {quantity.title}: {why}.", ""
    whole, chosen, wrong = rows(library, run, key, values.get("role") or "all", values.get("filter") or "")
    if wrong or whole.empty:
        return wrong, ""
    count, total = len(chosen.names), len(whole.names)
    layers = f"{count:,} of {total:,} layers." if count < total else f"{total:,} layers."
    if count > MAX_ROWS:
        layers += (
            f" Each row shows the largest of {-(-count // MAX_ROWS)}: a click narrows the rows to these."
        )
    note = f"{quantity.title[:1].upper()}{quantity.title[1:]}: {quantity.explain} {layers}"
    if not quantity.flow or chosen.empty:
        return note, ""
    matrices = chosen.rows(of_role(run, chosen.names, "matrix"))
    judged = matrices if len(matrices.names) > 1 else chosen
    column = profile_column(judged, step_of(values.get("at"), whole))
    found = slope(judged.values[:, column])
    back = quantity.flow == "back"
    return note, slope_sentence(found, quantity.title, int(judged.steps[column]), back)


FLOW = Plot(
    "flow-map",
    "Layer × step",
    "One row a layer, one column a capture; a cell shows the largest value it covers, NaN and infinity are "
    "red. Beside it all layers at one step. Click a row to open the layer; drag to zoom in, which reads "
    "again at full resolution.",
    draw,
    ("metric", "role", "filter", "order", "colors", "at", "against"),
    good="Rows of similar colour from top to bottom, changing slowly with the steps; an upright profile.",
    bad="A profile that leans (vanishing, exploding), a row unlike its neighbours, red cells.",
    keep=("metric", "role", "filter", "order"),
)
PLOTS = (FLOW,)
NOTED = ("metric", "role", "filter", "at")


def register(app: Dash, library: Library) -> None:
    """The line above the map, the sliders, and the click that opens a layer."""
    slices.register(app)

    @app.callback(
        Output("flow-note", "children"),
        Output("flow-slope", "children"),
        *[Input(state_id(key), "value") for key in NOTED],
        Input("pulse", "data"),
        State("page", "data"),
    )
    def note(*given: Any) -> tuple[str, str]:
        *values, _pulse, page = given
        return notes(library, library.run(page["run"]), dict(zip(NOTED, values, strict=True)))

    app.clientside_callback(
        ClientsideFunction("layerwatch", "openRow"),
        Output("clicked", "data", allow_duplicate=True),
        Input("flow-map", "clickData"),
        State("page", "data"),
        prevent_initial_call=True,
    )
