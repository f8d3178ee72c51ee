"""Everything about one tensor, the outputs of one module, or one attention, with the tree of all of them."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
import numpy as np
from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update

from ...monitor import Run, RunError
from ...monitor.findings import Finding
from ..components import aria, badge, choice, finding_item, notice, scale, state_id, toolbar
from ..figures.theme import Style
from ..plots import Plot, plot_card
from ..queries import Library
from ..text import integer, words
from ..urls import View
from .layer_cards import CARDS, HISTOGRAMS, PLOTS, SHOWN, available
from .layer_facts import (
    FACTS,
    about,
    attention_names,
    facts,
    marks,
    module_names,
    module_of,
    selectable,
    worst,
)
from .layer_plots import KINDS

__all__ = ["PLOTS", "SHOWN", "available", "layout", "register", "worst"]

LEVELS = 8  # of the hint at a tensor's gradient norm in the tree
OFFERED = 200  # names in the list at once: those are in the page even while it is closed
WIDE = ("history",)  # cards as wide as the page


def layout(view: View, library: Library, style: Style) -> list[Any]:
    """The selector, the tree, what the layer is, its histograms, quantiles, values and history."""
    run = library.run(view.run)
    names = selectable(run)
    chosen = view.params.get("tensor", "")
    if chosen not in names:
        chosen = worst(run, library.judgement(view.run, wait=1.0))
    if not chosen:
        return [notice("No layers", "Nothing was captured in this run yet, so there is no layer to show.")]
    classes = dict(zip(SHOWN, available(run, chosen), strict=True))
    cards = [
        _card(name, plot, style, classes, _picks(view) if name == "steps" else ())
        for name, plot in CARDS.items()
        if name not in WIDE
    ]
    bar = toolbar(
        view,
        _selector(run, chosen),
        choice(view, "view", {"map": "Map", "ridges": "Ridges"}, "map", "Histograms as"),
        scale(view),
        choice(view, "kind", KINDS, "weight", "Steps and quantiles of"),
    )
    main = [
        _about(chosen, facts(run, chosen)),
        html.Div(id="layer-findings", className="finding-lines"),
        html.Div(
            [_card(kind, plot, style, classes) for kind, plot in HISTOGRAMS.items()],
            className="layer-histograms",
        ),
        html.Div(cards, className="layer-cards"),
        *[_card(name, CARDS[name], style, classes) for name in WIDE],
    ]
    return [
        bar,
        dcc.Store(id="layer-tree", data=tree(run, names)),
        dcc.Store(id="layer-marks"),
        dcc.Store(id="layer-said"),
        html.Div(
            [_drawer(len(names), style), html.Div(main, className="layer-main")], className="layer-page"
        ),
    ]


def tree(run: Run, names: list[str]) -> dict[str, Any]:
    """What assets/tree.js builds the tree of: all names, a hint at the gradient norm of each (0: none)."""
    hints = np.zeros(len(names), dtype=int)
    if "gradient" in run.kinds():
        frame = run.stats(
            "gradient", None, ["step", "tensor", "norm"], steps=(_recent(run), None), max_points=1
        )
        last = frame.drop_duplicates("tensor", keep="last").set_index("tensor")["norm"]
        norms = last.reindex(names).to_numpy(dtype=float)
        norms = np.log10(np.where(np.isfinite(norms) & (norms > 0), norms, np.nan))
        if np.isfinite(norms).any():
            low, high = np.nanmin(norms), np.nanmax(norms)
            place = (norms - low) / (high - low) if high > low else norms * 0 + 0.5
            hints = np.nan_to_num(1 + np.round(place * (LEVELS - 1))).astype(int)
    return {"names": names, "hints": hints.tolist()}


def _recent(run: Run) -> int:
    """A step after which only the last few captures lie."""
    captured = run.stats("gradient", run.names("gradient")[0], ["step"], max_points=256)["step"]
    return int(captured.iloc[max(len(captured) - 4, 0)])


def _drawer(count: int, style: Style) -> html.Details:
    """The tree: a column beside the plots, on a phone a drawer above them."""
    rows = html.Div(id="layer-rows", role="tree", className="tree", **aria("Layers"))  # pyright: ignore[reportArgumentType]
    legend = html.Div(
        [html.Span(className="tree-hint", style={"--level": "6"}), "gradient norm, among all layers"],
        className="tree-legend",
        id="layer-legend",
    )
    summary = html.Summary([html.Span("Layers"), html.Span(integer(count), className="dim")])
    return html.Details([summary, rows, legend], className="card tree-drawer", open=not style.narrow)


def _selector(run: Run, chosen: str) -> html.Div:
    tensors, modules = run.tensors()["tensor"].tolist(), module_names(run)
    known = {*tensors, *modules}
    groups = [
        {"group": "Tensors", "items": tensors},
        {"group": "Outputs of modules", "items": [name for name in modules if name not in set(tensors)]},
        {"group": "Attention", "items": [name for name in attention_names(run) if name not in known]},
    ]
    select = dmc.Select(
        id=state_id("tensor"),
        data=[group for group in groups if group["items"]],  # pyright: ignore[reportArgumentType]
        value=chosen,
        searchable=True,
        allowDeselect=False,
        size="xs",
        className="tensor-select",
        maxDropdownHeight=420,
        limit=OFFERED,
        nothingFoundMessage="no layer of that name",
        **aria("layer"),
    )
    previous = html.Button("‹", id="layer-previous", title="previous layer (key k)", className="icon-button")
    following = html.Button("›", id="layer-next", title="next layer (key j)", className="icon-button")
    hint = html.Span(["keys ", html.Kbd("j"), " ", html.Kbd("k")], className="dim hint")
    return html.Div(
        [
            html.Span("Layer", className="label"),
            html.Div([previous, select, following, hint], className="joined"),
        ],
        className="control grow",
    )


def _about(name: str, known: dict[str, str]) -> html.Section:
    """The name and a place for every fact; places stay, only their texts change."""
    places = [
        html.Div(
            [html.Dt(word), html.Dd(known.get(key, ""), id=f"fact-{key}")],
            id=f"fact-{key}-place",
            className="" if known.get(key) else "hidden",
        )
        for key, word in FACTS.items()
    ]
    title = html.H2(name, id="layer-name", dir="auto")
    return html.Section([title, html.Dl(places)], className="card layer-about")


def _picks(view: View) -> list[Any]:
    """The two steps that are compared, typed or picked in a histogram."""
    return [
        _step(view, "first", "First captured step"),
        html.Span("with", className="dim"),
        _step(view, "second", "Last captured step"),
    ]


def _step(view: View, key: str, empty: str) -> dmc.NumberInput:
    text = view.params.get(key, "")
    return dmc.NumberInput(
        id=state_id(key),
        value=int(text) if text.isdecimal() and len(text) < 16 else "",
        placeholder=key if key == "first" else "last",
        min=0,
        hideControls=True,
        debounce=400,
        size="xs",
        w=76,
        **aria(f"{key} step; empty: {empty.lower()}"),
    )


def _card(name: str, plot: Plot, style: Style, classes: dict[str, str], tools: Any = ()) -> html.Div:
    return html.Div(plot_card(plot, style, tools=tools), id=f"card-{name}", className=classes.get(name, ""))


def finding_line(run: str, finding: Finding) -> html.Details:
    """One line a finding; opened, all that is known."""
    summary = html.Summary(
        [
            badge(finding.severity),
            html.B(words(finding.problem)),
            html.Span(finding.summary, className="line-text"),
            html.Span(f"since step {integer(finding.first_step)}", className="since"),
        ]
    )
    return html.Details([summary, finding_item(run, finding)], className=f"finding-line {finding.severity}")


def register(app: Dash, library: Library) -> None:
    """What is known about the layer, which cards it has, the marks of the tree, the picked steps."""

    @app.callback(
        Output("layer-name", "children"),
        *[Output(f"fact-{key}", "children") for key in FACTS],
        *[Output(f"fact-{key}-place", "className") for key in FACTS],
        *[Output(f"card-{card}", "className") for card in SHOWN],
        Input(state_id("tensor"), "value"),
        Input("pulse", "data"),
        State("page", "data"),
        prevent_initial_call=True,
    )
    def describe(name: str, _pulse: Any, page: dict[str, Any]) -> list[Any]:
        try:
            run = library.run(page["run"])
            known, cards = facts(run, name), available(run, name)
        except (RunError, OSError) as error:
            known, cards = {"state": f"cannot be read: {library.explain(error)}"}, [""] * len(SHOWN)
        texts = [known.get(key, "") for key in FACTS]
        return [name, *texts, *["" if text else "hidden" for text in texts], *cards]

    @app.callback(
        Output("layer-findings", "children"),
        Output("layer-marks", "data"),
        Output("layer-said", "data"),
        Input(state_id("tensor"), "value"),
        Input("verdict", "data"),
        State("page", "data"),
        State("layer-said", "data"),
    )
    def accuse(name: str, _verdict: Any, page: dict[str, Any], said: str | None) -> tuple[Any, Any, Any]:
        try:
            run, judged = library.run(page["run"]), library.judgement(page["run"])
        except (RunError, OSError):
            return [], {}, ""
        found = about(judged, name, module_of(run, name))
        now = f"{judged.stamp if judged else ''} {found!r}"  # what is open stays open while nothing changes
        lines = no_update if now == said else [finding_line(page["run"], one) for one in found]
        return lines, marks(judged), now

    in_browser = app.clientside_callback
    in_browser(
        ClientsideFunction("layerwatch", "showTree"),
        Output("layer-rows", "className"),
        Input("layer-tree", "data"),
        Input(state_id("tensor"), "value"),
    )
    in_browser(  # apart from the rows, which must not wait for the detectors
        ClientsideFunction("layerwatch", "markTree"),
        Output("layer-legend", "className"),
        Input("layer-marks", "data"),
        Input("layer-tree", "data"),
    )
    in_browser(
        ClientsideFunction("layerwatch", "pickStep"),
        Output(state_id("first"), "value"),
        Output(state_id("second"), "value"),
        *[Input(plot.id, "clickData") for plot in HISTOGRAMS.values()],
        State(state_id("first"), "value"),
        State(state_id("second"), "value"),
        prevent_initial_call=True,
    )
