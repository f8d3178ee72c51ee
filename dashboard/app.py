"""The Dash app: the callbacks that open pages and keep their state in the URL, and the server."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

from dash import ALL, ClientsideFunction, Dash, Input, Output, State, set_props

from . import live, plots, security
from .pages import PAGES
from .queries import Library
from .sent import Sent
from .shell import cursor, defaults, headline, nav_run, open_page, screen_of_browser, shell
from .urls import View, parse

log = logging.getLogger(__name__)
THREADS = 8


class _Page(Dash):
    """Dash with our HTML: a language, and the theme of the last visit before the first paint."""

    def interpolate_index(self, **parts: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        theme = screen_of_browser()["theme"]
        head = f"{parts['metas']}<title>{parts['title']}</title>{parts['css']}"
        scripts = parts["config"] + parts["scripts"] + parts["renderer"]
        return f"""<!DOCTYPE html>
<html lang="en" data-mantine-color-scheme="{theme}">
<head><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="{theme}"><link rel="icon" href="/assets/icon.svg">{head}</head>
<body data-ag-theme-mode="{theme}">{parts["app_entry"]}<footer>{scripts}</footer></body></html>"""


def create_app(root: str | Path, host: str = "127.0.0.1") -> Dash:
    """The dashboard over the runs at or below `root`, ready for any WSGI server (`app.server`).

    Args:
        root: a folder of runs, or one run; or the URL of such a place on an object store.
        host: the address it will be served on; requests for other host names are refused.
    """
    library = Library(root)
    app = _Page(
        "layerwatch",
        assets_folder=str(Path(__file__).parent / "assets"),
        title="layerwatch",
        update_title="",
        suppress_callback_exceptions=True,
        on_error=_report,
    )
    app.layout = shell
    security.protect(app.server, host)
    sent = Sent()
    live.register(app.server, library, sent)
    _register(app, library)
    for page in PAGES.values():
        page.register(app, library)
        plots.register(app, library, sent, page.PLOTS)
        _register_zoom(app, [plot.id for plot in page.PLOTS if plot.on_steps])
    return app


def serve(root: str | Path, host: str = "127.0.0.1", port: int = 8050) -> None:
    """Serve the dashboard until interrupted; prints its address once it listens.

    Raises:
        OSError: the port is taken.
    """
    import waitress

    listener = socket.create_server(
        (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128
    )
    app = create_app(root, host)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a burst of plots is ordinary
    shown = f"[{host}]" if ":" in host else host
    print(f"layerwatch dashboard: http://{shown}:{listener.getsockname()[1]}/ (stop with Ctrl+C)", flush=True)  # noqa: T201
    waitress.serve(app.server, sockets=[listener], threads=THREADS, ident="layerwatch")


def _register(app: Dash, library: Library) -> None:
    @app.callback(
        Output("nav", "children"),
        Output("title", "children"),
        Output("body", "children"),
        Output("page", "data"),
        Input("url", "data"),
        State("screen", "data"),
        prevent_initial_call=True,
    )
    def show(url: dict[str, Any], screen: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
        view = parse(url["path"], url.get("search", ""))
        at, said = cursor(library, view.run)
        nav, title, body = open_page(library, view, screen)
        page = {"page": view.page, "run": view.run, "defaults": defaults(body, view)}
        return (
            nav,
            title,
            body,
            page | {"cursor": at, "said": said, "built": url.get("count", 0), "nav": nav_run(library, view)},
        )

    @app.callback(
        Output("title", "children", allow_duplicate=True),
        Output("error", "className"),
        Input("pulse", "data"),
        Input("verdict", "data"),
        State("page", "data"),
        prevent_initial_call=True,
    )
    def follow(_pulse: Any, _verdict: Any, page: dict[str, Any]) -> tuple[Any, str]:
        return headline(library, View(page.get("page", "runs"), page.get("run", ""))), "hidden"

    run_in_browser = app.clientside_callback
    run_in_browser(ClientsideFunction("layerwatch", "locate"), Output("url", "data"), Input("mantine", "id"))
    run_in_browser(
        ClientsideFunction("layerwatch", "writeState"),
        Output("written", "data"),
        Input({"state": ALL}, "value"),
        Input("screen", "data"),
        State("page", "data"),
        prevent_initial_call=True,
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
            *[Input(name, "relayoutData") for name in ids],
            prevent_initial_call=True,
        )


def _report(error: Exception) -> None:
    """A callback failed: say so at the top of the page and leave what is there."""
    log.error("a callback failed", exc_info=error)
    set_props("error", {"children": f"{type(error).__name__}: {error}", "className": "banner"})
