"""The page as plain HTML until Dash has started: the first rows of a table of runs are there at once.

The server writes the layout as HTML, with boxes where Dash's own controls will be; assets/first.js fills in
the rows, with the functions that draw them later, and takes it all away when the page stands.
"""

from __future__ import annotations

import json
import logging
from html import escape
from typing import Any

import dash_ag_grid as dag
import dash_mantine_components as dmc
from dash import dcc, html
from dash.development.base_component import Component
from flask import request

from .opening import Opener
from .queries import Library
from .shell import frame, screen_of_browser
from .urls import parse

log = logging.getLogger(__name__)
MOST = 60  # rows: a screen has fewer
#: Data of a page that its rows are drawn from.
DATA = ("fleet-data", "runs-fit")
#: Choices that the table of runs follows in the browser alone, and so only later.
LATER = {"sort", "where", "pins"}
NAMES = {"className": "class", "tabIndex": "tabindex"}
KEPT = ("id", "className", "href", "title", "role", "scope", "tabIndex", "style")


def first_page(library: Library, opener: Opener) -> str:
    """The page that is asked for; "" where there is nothing to gain, or something to wait for."""
    url = {"path": request.path, "search": f"?{request.query_string.decode('latin-1')}"}
    view = parse(**url)
    if view.page not in ("runs", "fleet") or not library.at_hand():
        return ""
    if view.page == "runs" and LATER & view.params.keys():
        return ""
    try:
        opened = opener.open(url, screen_of_browser())
        data: dict[str, Any] = {}
        page = _markup(frame(opened.nav, opened.title, opened.body), data)
    except Exception:  # the page itself comes without us
        log.exception("the first paint of %s failed", view)
        return ""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    rows = f'<script type="application/json" id="first-data">{text}</script>'
    return f'<div id="first" class="first">{page}</div>{rows}'


def _markup(part: Any, data: dict[str, Any]) -> str:
    """A layout as HTML; what is to be drawn in the browser goes into `data`."""
    if part is None or isinstance(part, bool):
        return ""
    if isinstance(part, list | tuple):
        return "".join(_markup(each, data) for each in part)
    if not isinstance(part, Component):
        return escape(str(part))
    if isinstance(part, dcc.Store):
        if part.id in DATA:
            data[part.id] = part.data
        return ""
    if isinstance(part, dag.AgGrid):
        data["runs-grid"] = _table(part)
        return '<div id="first-grid" class="scroll"></div>'
    if part._namespace != html.Div._namespace:
        return _stand_in(part)
    name = part._type.lower()
    given = part.to_plotly_json()["props"]
    off = " disabled" if isinstance(part, html.Button) else ""  # nobody listens yet
    return f"<{name}{_attributes(given)}{off}>{_markup(given.get('children'), data)}</{name}>"


def _attributes(given: dict[str, Any]) -> str:
    texts = []
    for key, value in given.items():
        if not (key in KEPT or key.startswith(("aria-", "data-"))):
            continue
        if key == "id" and isinstance(value, dict):
            continue
        if key == "style":
            value = ";".join(f"{name}:{_css(size)}" for name, size in value.items() if size is not None)
        texts.append(f' {NAMES.get(key, key)}="{escape(str(value))}"')
    return "".join(texts)


def _css(size: Any) -> str:
    return f"{size}px" if isinstance(size, int | float) else str(size)


def _stand_in(part: Component) -> str:
    """A control of Dash's, as large as it will be."""
    if isinstance(part, dmc.SegmentedControl):
        words = (f"<span>{escape(str(each['label']))}</span>" for each in part.data)
        return f'<span class="stand-in choices-in">{"".join(words)}</span>'
    if isinstance(part, dmc.TextInput | dmc.Select):
        value, width = getattr(part, "value", None), _css(getattr(part, "w", None) or "100%")
        text = escape(str(value or getattr(part, "placeholder", None) or ""))
        return f'<span class="stand-in{"" if value else " empty"}" style="width:{width}">{text}</span>'
    return ""


def _table(grid: dag.AgGrid) -> dict[str, Any]:
    """Its visible columns and the first of its rows."""
    columns = [column for column in grid.columnDefs if not column.get("hide")]
    fields = {column.get("field") for column in columns}
    rows = [
        {key: value for key, value in row.items() if key in fields or not key.startswith("config.")}
        for row in grid.rowData[:MOST]
    ]
    return {"columns": columns, "rows": rows, "height": grid.style["height"]}
