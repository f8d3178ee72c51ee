"""The table of all runs: which of them needs a look, and which to compare."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import dash_ag_grid as dag
import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, Output, State, ctx, dcc, html, no_update

from ..components import aria, code, hidden, notice, state_id
from ..figures.theme import Style
from ..plots import Plot
from ..queries import Library
from ..rows import PREFIX, Row, Rows, config_names
from ..urls import View

PLOTS: tuple[Plot, ...] = ()
FIRST = 100  # rows that come with the page
MOST = 60  # rows that are shown without a scroll bar of the table's own

FIRST_RUN = """from layerwatch import watch

watcher = watch(model, optimizer, run="runs/exp1")
# in the loop: loss.backward(); optimizer.step(); optimizer.zero_grad()
watcher.log(train_loss=loss)"""

#: What can be shown of a run besides its name.
COLUMNS = {
    "rank": "Health",
    "finding": "Worst finding",
    "step": "Step",
    "updated": "Age",
    "train": "Train",
    "val": "Val",
    "gap": "Gap",
    "drift": "Largest drift",
    "tags": "Tags",
}
ON_A_PHONE = ["rank", "val"]
NUMBER: dict[str, Any] = {
    "type": "rightAligned",
    "filter": "agNumberColumnFilter",
    "cellClass": "figure",
    "valueFormatter": {"function": "params.data.texts[params.colDef.field]"},
    "comparator": {"function": "layerwatchNumbers"},
}
LOOKS: dict[str, dict[str, Any]] = {
    "rank": {"cellRenderer": "Health", "width": 108, "filter": False, "sortingOrder": ["desc", "asc", None]},
    "finding": {"minWidth": 150, "flex": 2, "tooltipField": "finding"},
    "step": NUMBER | {"cellRenderer": "Progress", "width": 128},
    "updated": {
        "cellRenderer": "Age",
        "width": 106,
        "filter": False,
        "comparator": {"function": "layerwatchNumbers"},
        "sortingOrder": ["desc", "asc", None],
    },
    "train": NUMBER | {"width": 100},
    "val": NUMBER | {"width": 92},
    "gap": NUMBER | {"width": 92},
    "drift": NUMBER | {"cellRenderer": "Drift", "width": 168, "type": None, "cellClass": ""},
    "tags": {
        "cellRenderer": "Tags",
        "width": 150,
        "valueFormatter": {"function": "params.value.join(', ')"},
        "filterValueGetter": {"function": "params.data.tags.join(', ')"},
        "getQuickFilterText": {"function": "params.data.tags.join(' ')"},
    },
}

_tables: WeakKeyDictionary[Library, Rows] = WeakKeyDictionary()


def layout(view: View, library: Library, style: Style) -> list[Any]:
    """The table, or how to make a first run."""
    rows, cursor = table_of(library).all(library)
    broken = library.broken()
    later = len(rows) > FIRST  # the first screen at once, the others behind it
    parts: list[Any] = [
        dcc.Store(id="runs-news", data={"cursor": "" if later else cursor}),
        dcc.Store(id="runs-cursor", data="" if later else cursor),
        dcc.Store(id="runs-rest", data=later),
        dcc.Store(id="runs-view"),
        html.Div(_first_run(library), id="runs-empty", className="hidden" if rows else ""),
        html.Section(
            [_head(view, rows, style), _compare_bar(), _grid(view, rows, style)],
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


def _head(view: View, rows: list[Row], style: Style) -> html.Div:
    """What the table can be narrowed to, and which columns it has."""
    search = dmc.TextInput(
        id=state_id("filter"),
        value=view.params.get("filter", ""),
        placeholder="Filter: name, finding, tag, setting …",
        size="xs",
        w="100%" if style.narrow else 290,
        spellCheck=False,
        **aria("filter runs"),
    )
    states = [hidden(view, key) for key in ("sort", "where", "pins")]
    count = html.Span("", id="runs-count", className="dim", role="status")
    hint = html.Span("Tick 2 to 8 to compare, ☆ keeps a run at the top", className="dim hint")
    tools = [search, count, html.Div(className="spring"), hint, _chooser(view, rows, style)]
    return html.Div([*tools, *states], className="runs-head")


def _chooser(view: View, rows: list[Row], style: Style) -> html.Details:
    """A menu of columns; what a run was configured with is at the end."""
    shown = columns_of(view, rows, style)
    own = [dmc.Checkbox(label=word, value=key, size="xs") for key, word in COLUMNS.items()]
    more = [
        dmc.Checkbox(label=name, value=PREFIX + name, size="xs")
        for name in dict.fromkeys([*config_names(rows), *_configured(shown)])
    ]
    rest = [html.Div("Configuration", className="label"), *more] if more else []
    group = dmc.CheckboxGroup(
        id=state_id("columns"), value=shown, children=html.Div([*own, *rest], className="choices")
    )
    return html.Details(
        [html.Summary("Columns"), html.Div(group, className="menu-items")], className="menu words"
    )


def columns_of(view: View, rows: list[Row], style: Style) -> list[str]:
    """The columns of a link. Else all, without tags that no run has; on a phone there is room for few."""
    if "columns" not in view.params:
        tagged = any(row["tags"] for row in rows)
        return ON_A_PHONE if style.narrow else [key for key in COLUMNS if key != "tags" or tagged]
    asked = [name for name in view.params["columns"].split(",") if name]
    return [name for name in asked if name in COLUMNS or name.startswith(PREFIX)]


def _configured(names: list[str]) -> list[str]:
    return [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]


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


def _grid(view: View, rows: list[Row], style: Style) -> dag.AgGrid:
    shown, few = columns_of(view, rows, style), len(rows) <= MOST
    return dag.AgGrid(
        id="runs-grid",
        rowData=rows[:FIRST],
        columnDefs=column_defs(view, rows, shown, style),
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
                "width": 42,
                "resizable": False,
                "suppressHeaderMenuButton": True,
            },
            "includeHiddenColumnsInQuickFilter": True,
            "quickFilterText": view.params.get("filter", ""),
            "postSortRows": {"function": "layerwatchPinsFirst(params)"},
            "localeText": {"noRowsToShow": "No run fits the filter."},
        },
        style={"height": None if few else "76vh"},
        className="runs-grid",
        dangerously_allow_code=False,
    )


def column_defs(view: View, rows: list[Row], shown: list[str], style: Style) -> list[dict[str, Any]]:
    """All columns, those that are not asked for hidden, sorted as the link says."""
    star = {
        "colId": "pin",
        "headerName": "Pinned",
        "headerClass": "unseen-head",
        "cellRenderer": "Star",
        "width": 40,
        "sortable": False,
        "filter": False,
        "resizable": False,
        "cellClass": "star-cell",
    }
    run = {"field": "run", "headerName": "Run", "cellRenderer": "RunLink", "flex": 2}
    run["minWidth"] = 120 if style.narrow else 168
    own = [{"field": key, "headerName": word, **LOOKS[key]} for key, word in COLUMNS.items()]
    names = dict.fromkeys([*config_names(rows), *_configured(shown)])
    more = [{"field": PREFIX + name, "headerName": name, "width": 130, **_kind(name, rows)} for name in names]
    order = sorting(view)
    for definition in (run, *own, *more):
        field = definition["field"]
        definition["hide"] = field != "run" and field not in shown
        if field in order:
            definition |= {"sort": order[field], "sortIndex": list(order).index(field)}
    return [star, run, *own, *more]


def _kind(name: str, rows: list[Row]) -> dict[str, Any]:
    """A column of numbers is filtered and aligned as numbers."""
    values = [row.get(PREFIX + name) for row in rows]
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        numbers = {"type": "rightAligned", "filter": "agNumberColumnFilter", "cellClass": "figure"}
        return numbers | {"comparator": {"function": "layerwatchNumbers"}}
    return {"valueFormatter": {"function": "layerwatchSetting(params.value)"}}


def sorting(view: View) -> dict[str, str]:
    """Field -> "asc" or "desc", from a link such as sort=rank:desc,step:asc."""
    pairs = [part.rpartition(":") for part in view.params.get("sort", "").split(",") if part]
    return {field: way for field, _, way in pairs if field and way in ("asc", "desc")}


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
        Input(state_id("filter"), "value"),
        Input(state_id("columns"), "value"),
        Input(state_id("pins"), "value"),
    )
