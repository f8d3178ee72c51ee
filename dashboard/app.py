"""The Dash app: the callbacks that open pages and keep their state in the URL, and the server."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dash import ALL, ClientsideFunction, Dash, Input, Output, State, no_update, set_props
from flask import request
from werkzeug.routing import PathConverter

from . import downloads, live, names, visible
from .first import first_page
from .opening import Opened, Opener, address
from .pages import PAGES
from .prefix import below, prefix_of
from .queries import Library
from .security import Access, protect
from .sent import Sent
from .shell import SCREEN, headline, screen_of_browser, shell
from .static import alone, together
from .urls import View

log = logging.getLogger(__name__)
ASSETS = Path(__file__).parent / "assets"


class _Name(PathConverter):
    """A run's name in an address: of any characters, newlines among them."""

    regex = r"[^/][\s\S]*?"


class _Page(Dash):
    """Dash with our HTML: a language, and the theme of the last visit before the first paint."""

    together: dict[str, str]  # our scripts and styles, see `static`
    first: Callable[[], str]  # the page that asks as plain HTML, see `first`

    def interpolate_index(self, **parts: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        theme = screen_of_browser()["theme"]
        icon = f'<link rel="icon" href="{self.get_asset_url("icon.svg")}">'
        # Dash asks for it when the first plot is on the page; assets/urls.js asks while the page is made.
        plotly = self.get_relative_path("/_dash-component-suites/plotly/package_data/plotly.min.js")
        runs = request.path == "/"
        later = request.path in ("/", "/fleet")  # where there is no plot
        early = f'<link id="plotly" rel="{"prefetch" if later else "preload"}" as="script" href="{plotly}">'
        if request.cookies.keys() >= SCREEN and "theme" not in request.args:
            # So does the layout, which Dash asks for when all scripts have run.
            layout = self.get_relative_path("/_dash-layout")
            early += f'<link rel="preload" as="fetch" href="{layout}" crossorigin="anonymous">'
        ours = {kind: self.get_relative_path(f"/assets/{name}") for kind, name in self.together.items()}
        css = f'{alone(parts["css"])}<link rel="stylesheet" href="{ours["css"]}">'
        head = f"{icon}{parts['metas']}<title>{parts['title']}</title>{css}{early}"
        # The grid is a quarter of all scripts, and only the Runs page has one.
        grid = "" if runs else r'<script src="[^"]*/dash_ag_grid/[^"]*"></script>'
        script = f'<script src="{ours["js"]}"></script>'  # before Dash's, which take a while
        scripts = parts["config"] + script + re.sub(grid, "", alone(parts["scripts"])) + parts["renderer"]
        body = parts["app_entry"] + self.first()
        return f"""<!DOCTYPE html>
<html lang="en" data-mantine-color-scheme="{theme}">
<head><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="{theme}">{head}</head>
<body data-ag-theme-mode="{theme}">{body}<footer>{scripts}</footer></body></html>"""


def create_app(
    root: str | Path, host: str = "127.0.0.1", *, access: Access | None = None, prefix: str = ""
) -> Dash:
    """The dashboard over the runs at or below `root`, ready for any WSGI server (`app.server`).

    Args:
        root: a folder of runs, or one run, or the file of a scan table; or a URL of one of these.
        host: the address it will be served on; requests for other host names are refused.
        access: who may ask, when more is to be said of it than the host; a host that others can reach needs
            a token: `Access("0.0.0.0", token="...")`.
        prefix: the path that a proxy serves it at, such as "/x/".

    Raises:
        ValueError: others can reach the host and there is no token; the prefix is no path; the scan table
            cannot be read.
    """
    prefix = prefix_of(prefix)
    library = Library(root)
    app = _Page(
        "layerwatch",
        assets_folder=str(ASSETS),
        title="layerwatch",
        update_title="",
        requests_pathname_prefix=f"{prefix}/",
        routes_pathname_prefix="/",
        suppress_callback_exceptions=True,
        on_error=_report,
    )
    sent = Sent()
    opener = Opener(library, sent)
    app.layout = lambda: shell(url := address(), opener.open(url, screen_of_browser()) if url else ())
    app.together = together(app.server, ASSETS)
    app.first = lambda: first_page(library, opener)
    app.server.extensions["layerwatch"] = library
    app.server.url_map.converters["name"] = _Name
    app.server.add_url_rule("/run/<name:path>", "run", lambda path: app.index())
    app.server.add_url_rule("/problems", "problems", lambda: app.index())
    app.server.add_url_rule("/problems/<code>", "problem", lambda code: app.index())
    protect(app.server, access or Access(host))
    if prefix:
        app.server.wsgi_app = below(app.server.wsgi_app, prefix)
    downloads.register(app.server, library)
    live.register(app.server, library, sent)
    visible.register(app.server, library, sent, opener)
    names.register(app.server, library)
    _register(app, library, opener)
    for page in PAGES.values():
        page.register(app, library)
        _register_zoom(app, [plot.id for plot in page.PLOTS if plot.on_steps])
    return app


def _register(app: Dash, library: Library, opener: Opener) -> None:
    @app.callback(
        Output("nav", "children"),
        Output("title", "children"),
        Output("body", "children"),
        Output("page", "data"),
        Input("url", "data"),
        State("screen", "data"),
        prevent_initial_call=True,
    )
    def show(url: dict[str, Any], screen: dict[str, Any]) -> Opened:
        return opener.open(url, screen)

    @app.callback(
        Output("title", "children", allow_duplicate=True),
        Output("error", "className"),
        Input("pulse", "data"),
        Input("verdict", "data"),
        State("page", "data"),
        prevent_initial_call=True,
    )
    def follow(_pulse: Any, _verdict: Any, page: dict[str, Any]) -> tuple[Any, str]:
        if page.get("page") == "problems":  # a text, which nothing changes
            return no_update, "hidden"
        return headline(library, View(page.get("page", "runs"), page.get("run", ""))), "hidden"

    run_in_browser = app.clientside_callback
    run_in_browser(
        ClientsideFunction("layerwatch", "locate"),
        Output("url", "data"),
        Input("mantine", "id"),
        State("page", "data"),
    )
    run_in_browser(
        ClientsideFunction("layerwatch", "writeState"),
        Output("written", "data"),
        Input({"state": ALL}, "value"),
        Input("screen", "data"),
        State("page", "data"),
    )
    run_in_browser(
        ClientsideFunction("layerwatch", "drawVisible"),
        Output("drawn", "data"),
        Input({"state": ALL}, "value"),
        Input("screen", "data"),
        Input("retry", "data"),
        State("page", "data"),
    )
    run_in_browser(
        ClientsideFunction("layerwatch", "switchRun"),
        Output("clicked", "data"),
        Input("run-switch", "value"),
        State("page", "data"),
        prevent_initial_call=True,
    )
    run_in_browser(
        ClientsideFunction("layerwatch", "applyTheme"),
        Output("mantine", "forceColorScheme"),
        Input("screen", "data"),
    )


def _register_zoom(app: Dash, ids: list[str]) -> None:
    """A drag in any of these plots becomes the page's step range, and so a part of the URL."""
    if ids:
        app.clientside_callback(
            ClientsideFunction("layerwatch", "zoomed"),
            Output({"state": "range"}, "value", allow_duplicate=True),
            *[Input(name, "relayoutData", allow_optional=True) for name in ids],
            prevent_initial_call=True,
        )


def _report(error: Exception) -> None:
    """A callback failed: say so at the top of the page and leave what is there."""
    log.error("a callback failed", exc_info=error)
    text = f"Something went wrong here ({type(error).__name__}); the log of the server says more."
    set_props("error", {"children": text, "className": "banner"})
