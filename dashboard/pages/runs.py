"""The table of all runs: which of them needs a look, and which to compare."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import dash_ag_grid as dag
import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, Output, State, ctx, dcc, html, no_update

from ...monitor.fleet.search import SearchError
from ..components import aria, code, hidden, notice, state_id
from ..figures.theme import Style
from ..filters import field
from ..plots import Plot
from ..queries import Library
from ..rows import PREFIX, Row, Rows
from ..urls import View
from .runs_columns import COLUMNS, column_defs, columns_of, configured

PLOTS: tuple[Plot, ...] = ()
FIRST = 100  # rows that come with the page
MOST = 60  # rows that are shown without a scroll bar of the table's own

FIRST_RUN = """from layerwatch import watch

watcher = watch(model, optimizer, run="runs/exp1")
# in the loop: loss.backward(); optimizer.step(); optimizer.zero_grad()
watcher.log(train_loss=loss)"""

_tables: WeakKeyDictionary[Library, Rows] = WeakKeyDictionary()


def layout(view: View, library: Library, style: Style) -> list[Any]:
    """The table, or how to make a first run."""
    rows, cursor = table_of(library).all(library)
    settings = table_of(library).settings()
    shown = columns_of(view, rows, style)
    defs = column_defs(view, settings, shown, style)
    fit = _fit(library, view.params.get("filter", ""))
    wanted = set(fit["runs"] or ())
    broken = library.broken()
    later = len(rows) > FIRST  # the first screen at once, the others behind it
    first = [row for row in rows if not (later and wanted) or row["run"] in wanted][:FIRST]
    parts: list[Any] = [
        dcc.Store(id="runs-news", data={"cursor": "" if later else cursor}),
        dcc.Store(id="runs-cursor", data="" if later else cursor),
        dcc.Store(id="runs-rest", data=later),
        dcc.Store(id="runs-view"),
        dcc.Store(id="runs-fit", data=fit),
        dcc.Store(id="runs-fitted"),
        html.Div(_first_run(library), id="runs-empty", className="hidden" if rows else ""),
        html.Section(
            [_head(view, shown, settings, style), _compare_bar(), _grid(defs, first, len(rows), style)],
            className="card" if rows else "card hidden",
            id="runs-card",
            **aria("Table of runs"),  # pyright: ignore[reportArgumentType]
        ),
    ]
    if broken:
        lines = [html.Li([html.B(name), ": ", reason]) for name, reason in broken.items()]
        parts.append(notice("Folders that cannot be read", html.Ul(lines), "warning"))
    return parts


def table_of(library: Library) -> Rows:
    """The rows of a library, kept as long as the server runs."""
    return _tables.setdefault(library, Rows())


def _first_run(library: Library) -> html.Div:
    where = f"There is no run in {library.title} yet. These lines write one; it appears here by itself:"
    after = html.P("Or train five small example runs with `layerwatch demo`.")
    return notice("No runs yet", [html.P(where), code(FIRST_RUN), after])


def _head(view: View, shown: list[str], settings: dict[str, bool], style: Style) -> html.Div:
    """What the table can be narrowed to, and which columns it has."""
    states = [hidden(view, key) for key in ("sort", "where", "pins")]
    count = html.Span("", id="runs-count", className="dim", role="status")
    hint = html.Span("Tick 2 to 8 to compare, ☆ keeps a run at the top", className="dim hint")
    tools = [
        field(view, style.narrow),
        count,
        html.Div(className="spring"),
        hint,
        _chooser(shown, settings),
    ]
    return html.Div([*tools, *states], className="runs-head")


def _chooser(shown: list[str], settings: dict[str, bool]) -> html.Details:
    """A menu of columns; what a run was configured with is at the end."""
    own = [dmc.Checkbox(label=word, value=key, size="xs") for key, word in COLUMNS.items()]
    more = [
        dmc.Checkbox(label=name, value=PREFIX + name, size="xs")
        for name in dict.fromkeys([*settings, *configured(shown)])
    ]
    rest = [html.Div("Configuration", className="label"), *more] if more else []
    group = dmc.CheckboxGroup(
        id=state_id("columns"), value=shown, children=html.Div([*own, *rest], className="choices")
    )
    return html.Details(
        [html.Summary("Columns"), html.Div(group, className="menu-items")], className="menu words"
    )


def _compare_bar() -> html.Div:
    """Appears when runs are ticked; assets/grid.js fills it."""
    return html.Div(
        [
            html.Span("", id="compare-said"),
            html.A("Compare", id="compare-link", className="action", href="#"),
            html.Button("Clear", id="compare-clear", className="pill"),
        ],
        id="compare-bar",
        className="hidden",
        role="status",
    )


def _fit(library: Library, text: str) -> dict[str, Any]:
    """The names of the runs that fit a filter, None: all of them; and what is wrong with it."""
    if not text.strip():
        return {"runs": None, "wrong": ""}
    try:
        return {"runs": table_of(library).fitting(library, text), "wrong": ""}
    except SearchError as error:
        return {"runs": None, "wrong": str(error)}


def _grid(defs: list[dict[str, Any]], first: list[Row], total: int, style: Style) -> dag.AgGrid:
    few = total <= MOST
    return dag.AgGrid(
        id="runs-grid",
        rowData=first,
        columnDefs=defs,
        defaultColDef={"sortable": True, "filter": True, "resizable": True},
        getRowId="params.data.run",
        dashGridOptions={
            "domLayout": "autoHeight" if few else "normal",
            "theme": {"function": "layerwatchGridTheme(themeQuartz)"},
            "rowHeight": 40,
            "headerHeight": 38,
            "animateRows": False,
            "suppressFieldDotNotation": True,
            "enableCellTextSelection": True,
            "suppressMovableColumns": style.narrow,
            "tooltipShowDelay": 400,
            "rowSelection": {
                "mode": "multiRow",
                "checkboxes": True,
                "headerCheckbox": False,
                "enableClickSelection": False,
            },
            "selectionColumnDef": {
                "headerName": "Ticked",
                "headerClass": "unseen-head",
                "width": 38,
                "resizable": False,
                "suppressHeaderMenuButton": True,
            },
            "isExternalFilterPresent": {"function": "layerwatchFiltered()"},
            "doesExternalFilterPass": {"function": "layerwatchFits(params)"},
            "postSortRows": {"function": "layerwatchPinsFirst(params)"},
            "localeText": dict.fromkeys(("noRowsToShow", "noMatchingRows"), "No run fits the filter."),
        },
        style={"height": None if few else "76vh"},
        className="runs-grid",
        dangerously_allow_code=False,
    )


def register(app: Dash, library: Library) -> None:
    """Rows that changed are sent, and the browser puts them into the table that stays."""

    @app.callback(
        Output("runs-news", "data"),
        Input("pulse", "data"),
        Input("verdict", "data"),
        Input("runs-rest", "data"),
        State("runs-cursor", "data"),
    )
    def news(_pulse: Any, _verdict: Any, rest: bool, cursor: str) -> Any:
        if not rest and ctx.triggered_id in (None, "runs-rest"):
            return no_update  # the page is new and has all rows
        changed, gone, after = table_of(library).since(library, cursor or "")
        return {"rows": changed, "gone": gone, "cursor": after, "all": not cursor}

    app.clientside_callback(
        ClientsideFunction("runs", "apply"),
        Output("runs-cursor", "data"),
        Input("runs-news", "data"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        ClientsideFunction("runs", "show"),
        Output("runs-view", "data"),
        Input("runs-grid", "id"),
        Input(state_id("columns"), "value"),
        Input(state_id("pins"), "value"),
    )

    @app.callback(
        Output("runs-fit", "data"),
        Input(state_id("filter"), "value"),
        Input("runs-cursor", "data"),
        State("page", "data"),
        prevent_initial_call=True,  # the page came with it
    )
    def fit(filter: str, _cursor: str, page: dict[str, Any]) -> Any:
        return _fit(library, str(filter or "")) if page.get("page") == "runs" else no_update

    app.clientside_callback(
        ClientsideFunction("runs", "fit"), Output("runs-fitted", "data"), Input("runs-fit", "data")
    )
