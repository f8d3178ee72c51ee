"""All runs as a scan has found them: how many are sick, what got worse, of what, and whose they are."""

from __future__ import annotations

from typing import Any

from dash import ClientsideFunction, Dash, Input, Output, State, ctx, dcc, html, no_update

from ..components import aria, choice, code, hidden, notice, state_id
from ..figures.theme import Style
from ..filters import field
from ..fleet import PAGE, SINCE, SORTS, shown
from ..plots import Plot
from ..queries import Library
from ..urls import View

PLOTS: tuple[Plot, ...] = ()
WORDS = {"scan": "Scan before", "day": "24 hours", "week": "7 days"}
#: Cards of values to choose among: field -> title, and where there is nothing to count.
CARDS = {
    "problem": ("Problems", "No alarm in these runs."),
    "model": ("Models", "No run says what its model is."),
    "owner": ("Owners", "No run has an owner: watch(owner=...), or `layerwatch label RUN --owner NAME`."),
    "tag": ("Tags", "No run has a tag: watch(tags=[...]), or `layerwatch label RUN --tag TAG`."),
}


def layout(view: View, library: Library, style: Style) -> list[Any]:
    """Empty places with their data, which assets/fleet.js fills; or how to scan."""
    library.runs()
    data = _data(library, view.params)
    if "none" in data:
        return [_first_scan(library, data["fault"])]
    return [
        dcc.Store(id="fleet-data", data=data),
        dcc.Store(id="fleet-drawn"),
        html.Div(
            [
                field(view, style.narrow),
                html.Span("", id="fleet-count", className="dim", role="status"),
                html.Div(className="spring"),
                html.Div(id="fleet-scan", className="facts-strip dim"),
                *(hidden(view, key) for key in ("sort", "rows")),
            ],
            className="toolbar fleet-filter",
        ),
        html.Section(id="fleet-health", **aria("Runs by health")),  # pyright: ignore[reportArgumentType]
        html.Div([_news_card(view), _card("problem")], className="split fleet-split"),
        html.Div([_card(key) for key in ("model", "owner", "tag")], className="fleet-facets"),
        html.Section(
            [
                html.H2("Runs"),
                html.Div(id="fleet-table", className="scroll"),
                html.Button("", id="fleet-more", className="pill hidden"),
            ],
            className="card",
        ),
        html.Section(id="fleet-notes", className="card notice hidden"),
    ]


def _data(library: Library, state: dict[str, Any]) -> dict[str, Any]:
    """What is shown for the values of the controls, which come from an address and may be anything."""
    rows = str(state.get("rows") or "")
    return shown(
        library,
        str(state.get("filter") or ""),
        state["since"] if state.get("since") in SINCE else "scan",
        sort if (sort := str(state.get("sort") or "")).lstrip("-") in SORTS else "health",
        int(rows) if rows.isdecimal() and len(rows) < 6 else PAGE,
    )


def _news_card(view: View) -> html.Section:
    said = html.P("", id="fleet-news-said", className="explain")
    title = html.Div([html.H2("What got worse"), said], className="card-title")
    head = html.Div([title, choice(view, "since", WORDS, "scan", "Compared with")], className="card-head")
    return html.Section([head, html.Div(id="fleet-news", className="fleet-list")], className="card")


def _card(key: str) -> html.Section:
    title, empty = CARDS[key]
    box = html.Div(id=f"fleet-{key}", className="fleet-list", **{"data-empty": empty})  # pyright: ignore[reportArgumentType]
    return html.Section([html.H2(title), box], className="card")


def _first_scan(library: Library, fault: str) -> html.Div:
    if fault:
        return notice("The scan table cannot be read", html.P(fault), "critical")
    lines = f"layerwatch scan {library.title}\nlayerwatch scan {library.title} --every 600   # and go on"
    about = "A scan reads every run once, judges it and keeps one row of it; this page counts the rows:"
    after = html.P("The page is there when the scan has ended. Open it again then.")
    return notice("No scan yet", [html.P(about), code(lines), after])


def register(app: Dash, library: Library) -> None:
    """The server filters and counts; the browser draws."""

    @app.callback(
        Output("fleet-data", "data"),
        Input(state_id("filter"), "value"),
        Input(state_id("since"), "value"),
        Input(state_id("sort"), "value"),
        Input(state_id("rows"), "value"),
        Input("pulse", "data"),
        State("page", "data"),
        prevent_initial_call=True,  # the page came with its data
    )
    def narrowed(filter: str, since: str, sort: str, rows: str, _pulse: Any, page: dict[str, Any]) -> Any:
        if ctx.triggered_id is None or page.get("page") != "fleet":
            return no_update
        data = _data(library, {"filter": filter, "since": since, "sort": sort, "rows": rows})
        return {"wrong": data["wrong"]} if data.get("wrong") else data

    app.clientside_callback(
        ClientsideFunction("fleet", "draw"),
        Output("fleet-drawn", "data"),
        Input("fleet-data", "data"),
    )
