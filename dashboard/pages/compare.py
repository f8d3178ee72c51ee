"""Two to eight runs: their curves, settings and results; two of them layer by layer."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, html, no_update

from ...monitor import RunError
from ...monitor.comparing import matching_note, parting_sentence
from ..components import aria, choice, notice, scale, select, smoothing, state_id, toolbar
from ..figures.compare import MAX_PANELS, MAX_RUNS, map_height, multiples_height
from ..figures.theme import Style
from ..plots import plot_card
from ..queries import Library
from ..urls import View
from .compare_facts import (
    chosen,
    common_layers,
    pair_of,
    parting,
    scalar_names,
)
from .compare_plots import ALL, CURVES, DRIFT, GRADIENT, HISTOGRAM, KINDS, PLOTS
from .compare_tables import legend, settings_table, table_card, values_table

__all__ = ["PLOTS", "layout", "register"]


def layout(view: View, library: Library, style: Style) -> list[Any]:
    """The runs, their curves, what differs; A against B."""
    library.run(view.run)
    others = [name for name in library.runs() if name != view.run]
    if not others:
        return [notice("Only one run", "There is no second run below this folder to compare with.")]
    names, unknown = chosen(view.params.get("with", ""), library, view.run)
    names = names if len(names) > 1 else [view.run, others[0]]
    scalars, layers = scalar_names(library, names), common_layers(library, names)
    rows, panels = map_height(len(layers), style.narrow), min(len(scalars), MAX_PANELS)
    return [
        toolbar(
            view,
            _others(others, names[1:]),
            select(view, "scalar", [(s, s) for s in scalars], next(iter(scalars), ""), "Scalar", 180),
            scale(view),
            smoothing(view),
            choice(view, "show", {"one": "One", "all": "All"}, "one", "Scalars"),
        ),
        *([_unknown(unknown)] if unknown else []),
        html.Div(legend(names), id="compare-runs", className="compare-runs"),
        html.Div(plot_card(CURVES, style), id="compare-one"),
        html.Div(plot_card(ALL, style, height=multiples_height(panels, style.narrow)), id="compare-all"),
        html.Div([table_card("values", "Results"), table_card("settings", "Settings")], className="halves"),
        _pair_card(view, names),
        html.Div([plot_card(plot, style, height=rows) for plot in (GRADIENT, DRIFT)], className="halves"),
        plot_card(HISTOGRAM, style, tools=_layer_choice(view, layers)),
    ]


def _others(others: list[str], picked: list[str]) -> html.Div:
    control = dmc.MultiSelect(
        id=state_id("with"),
        data=others,
        value=picked,
        searchable=True,
        maxValues=MAX_RUNS - 1,
        size="xs",
        className="tensor-select",
        maxDropdownHeight=360,
        nothingFoundMessage="no run of that name",
        hidePickedOptions=True,
        **aria("compare with"),
    )
    label = html.Span(f"Compare with (up to {MAX_RUNS - 1})", className="label")
    return html.Div([label, control], className="control grow")


def _unknown(names: list[str]) -> html.Div:
    shown = ", ".join(name if len(name) <= 60 else f"{name[:57]}…" for name in names[:3])
    return notice("Not found", f"There is no run named {shown} below this folder; it is left out.", "warning")


def _pair_card(view: View, names: list[str]) -> html.Section:
    """Which two are A and B, and where they part."""
    first, second = pair_of(names, view.params.get("one", ""), view.params.get("two", ""))
    options = [(name, name) for name in names]
    picks = [select(view, "one", options, first, "A", 190), select(view, "two", options, second, "B", 190)]
    words = [
        html.H2("Where two runs part"),
        html.P(id="compare-parting", className="parting", dir="auto"),
        html.P(id="compare-matching", className="explain", dir="auto"),
    ]
    head = [html.Div(words, className="card-title"), html.Div(picks, className="tools")]
    return html.Section(html.Div(head, className="card-head"), className="card")


def _layer_choice(view: View, layers: list[str]) -> list[Any]:
    step = view.params.get("at", "")
    at = dmc.NumberInput(
        id=state_id("at"),
        value=int(step) if step.isdecimal() and len(step) < 16 else "",
        placeholder="last",
        min=0,
        hideControls=True,
        debounce=400,
        size="xs",
        w=76,
        **aria("step; empty: the last one"),
    )
    return [
        select(
            view, "tensor", [(name, name) for name in layers], next(iter(layers), ""), "Layer", 250, limit=200
        ),
        choice(view, "kind", KINDS, "weight", "Histogram of"),
        html.Div([html.Span("At step", className="label"), at], className="control"),
    ]


def register(app: Dash, library: Library) -> None:
    """Everything that follows the choice of runs and is no plot."""

    @app.callback(
        Output("compare-runs", "children"),
        Output("compare-settings", "children"),
        Output("compare-settings-note", "children"),
        Output("compare-settings-search", "className"),
        Output(state_id("one"), "data"),
        Output(state_id("two"), "data"),
        Output(state_id("one"), "value"),
        Output(state_id("two"), "value"),
        Input(state_id("with"), "value"),
        State(state_id("one"), "value"),
        State(state_id("two"), "value"),
        State("page", "data"),
    )
    def choose(others: Any, one: str, two: str, page: dict[str, Any]) -> list[Any]:
        names, _ = chosen(others, library, page["run"])
        try:
            filled = settings_table(library, names)
        except (RunError, OSError) as error:
            filled = html.P(library.explain(error)), "", "hidden"
        first, second = pair_of(names, one, two) if len(names) > 1 else (one, two)
        values = [no_update if new == old else new for new, old in ((first, one), (second, two))]
        return [legend(names), *filled, names, names, *values]

    @app.callback(
        Output("compare-values", "children"),
        Output("compare-values-note", "children"),
        Output("compare-values-search", "className"),
        Input(state_id("with"), "value"),
        Input("pulse", "data"),
        State("page", "data"),
    )
    def results(others: Any, _pulse: Any, page: dict[str, Any]) -> list[Any]:
        names, _ = chosen(others, library, page["run"])
        try:
            return list(values_table(library, names))
        except (RunError, OSError) as error:
            return [html.P(library.explain(error)), "", "hidden"]

    @app.callback(
        Output("compare-parting", "children"),
        Output("compare-matching", "children"),
        Input(state_id("with"), "value"),
        Input(state_id("one"), "value"),
        Input(state_id("two"), "value"),
        Input("pulse", "data"),
        State("page", "data"),
    )
    def parted(others: Any, one: str, two: str, _pulse: Any, page: dict[str, Any]) -> list[Any]:
        names, _ = chosen(others, library, page["run"])
        if len(names) < 2:
            return ["Choose a second run to compare with.", ""]
        first, second = pair_of(names, one, two)
        try:
            found, both = parting(library, library.run(first), library.run(second))
        except (RunError, OSError) as error:
            return [library.explain(error), ""]
        return [parting_sentence(found, first, second), matching_note(both, first, second)]

    @app.callback(
        Output("compare-one", "className"),
        Output("compare-all", "className"),
        Input(state_id("show"), "value"),
    )
    def show(which: str) -> list[str]:
        return ["hidden", ""] if which == "all" else ["", "hidden"]
