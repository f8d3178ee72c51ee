"""The Dash app: shell, navigation, the callback that opens a page, and the server."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import dash_mantine_components as dmc
from dash import ALL, ClientsideFunction, Dash, Input, Output, State, dcc, html, set_props
from flask import has_request_context, request

from ..monitor import RunError
from . import live, plots, security
from .components import aria, badge, notice
from .figures.theme import FONT, style_of
from .pages import PAGES
from .queries import Library
from .text import age, integer
from .urls import RUN_PAGES, View, href, parse

log = logging.getLogger(__name__)
THREADS = 8
#: Mantine's ten greys of the dark theme, in the blue tint of assets/style.css.
GREYS = [
    "#e3e7ed",
    "#b4bdc9",
    "#98a3b1",
    "#6b7685",
    "#39414d",
    "#2b323d",
    "#1e242c",
    "#171b21",
    "#12161b",
    "#0f1216",
]
ALWAYS_WRITTEN = ("tensor", "with")  # their defaults depend on the log, so a link must say them


class _Page(Dash):
    """Dash with our HTML: a language, and the theme of the last visit before the first paint."""

    def interpolate_index(self, **parts: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        theme = _screen()["theme"]
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
    app.layout = _shell
    security.protect(app.server, host)
    live.register(app.server, library)
    _register(app, library)
    for page in PAGES.values():
        page.register(app, library)
        plots.register(app, library, page.PLOTS)
        _register_zoom(app, getattr(page, "ZOOMED", ()))
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


def _screen() -> dict[str, Any]:
    """What the browser said about itself; assets/screen.js keeps these cookies."""
    cookies = request.cookies if has_request_context() else {}
    theme = "dark" if cookies.get("layerwatch_theme") == "dark" else "light"
    return {"theme": theme, "narrow": cookies.get("layerwatch_narrow") == "1"}


def _shell() -> dmc.MantineProvider:
    """What stays while pages come and go. The navigation comes first."""
    screen = _screen()
    stores = [
        dcc.Store(id="url"),  # where the browser is: {"path", "search", "count"}
        dcc.Store(id="page", data={}),  # the page that is open: {"page", "run", "defaults"}
        dcc.Store(id="pulse", data=""),  # changes when the run grew
        dcc.Store(id="verdict", data=""),  # changes when the detectors said something new
        dcc.Store(id="screen", data=screen),
        dcc.Store(id="written"),
        dcc.Store(id="clicked"),
    ]
    tools = html.Div(
        [
            html.Button("…", id="live-button", className="pill", title="Click to pause or resume updates"),
            html.Button(
                "Copy link", id="copy-link", className="pill", title="Copy the address of exactly this view"
            ),
            html.Button(
                "◐",
                id="theme-button",
                className="icon-button",
                title="Dark or light",
                **aria("theme"),
            ),  # pyright: ignore[reportArgumentType]
        ],
        className="head-tools",
    )
    shell = html.Div(
        [
            html.Nav(id="nav", className="nav", **aria("Pages")),  # pyright: ignore[reportArgumentType]
            html.Div(
                [
                    html.Header([html.Div(id="title", className="title"), tools], className="head"),
                    html.Div(id="error", className="hidden", role="alert"),
                    html.Main(id="body", className="body"),
                ],
                className="content",
            ),
        ],
        className="shell",
    )
    theme: Any = {
        "primaryColor": "indigo",
        "fontFamily": FONT,
        "defaultRadius": "sm",
        "colors": {"dark": GREYS},
    }
    return dmc.MantineProvider([*stores, shell], id="mantine", theme=theme, forceColorScheme=screen["theme"])


def _navigation(library: Library, view: View) -> list[Any]:
    """Links of the selected run; on the Runs page those of the newest one."""
    names, run = list(library.runs()), _nav_run(library, view)
    brand = html.Div([html.Span(className="mark"), "layerwatch"], className="brand")
    items = [html.A("Runs", href="/", className=_active(view.page == "runs"))]
    for slug, word in RUN_PAGES.items():
        items.append(html.A(word, href=href(slug, run), className=_active(view.page == slug)))
    switch = dmc.Select(
        id="run-switch",
        data=names,
        value=run or None,
        searchable=True,
        allowDeselect=False,
        size="xs",
        placeholder="no run yet",
        maxDropdownHeight=420,
        **aria("run"),
    )
    pages = html.Div([items[0], html.Div(switch, className="switch"), *items[1:]], className="nav-links")
    return [html.Div([brand, pages], className="nav-inner")]


def _nav_run(library: Library, view: View) -> str:
    """The run that the navigation leads to: the one that is open, else the newest."""
    names = library.runs()
    return view.run if view.run in names else next(iter(names), "")


def _active(yes: bool) -> str:
    return "nav-link active" if yes else "nav-link"


def _title(library: Library, view: View) -> list[Any]:
    """Name, health and age of the run; updated while it trains."""
    if view.page == "runs" or not view.run:
        count = len(library.runs())
        line = f"{count} run{'' if count == 1 else 's'} in {library.root}"
        return [html.H1("Runs"), html.Div(line, className="subtitle")]
    run = library.run(view.run)
    judged = library.judgement(view.run, wait=0.3)
    health = judged.health if judged else "checking"
    updated = float(run.info.get("ended") or run.info.get("created") or float("nan"))
    marks: list[Any] = [badge(health)]
    if run.live:
        marks.insert(0, html.Span([html.Span(className="dot"), "live"], className="badge live"))
    line = [f"step {integer(run.last_step)}" if run.last_step >= 0 else "no step yet"]
    line.append(
        "training now"
        if run.live
        else f"finished {age(updated)}"
        if run.info.get("closed")
        else f"last sign {age(updated)}"
    )
    return [
        html.Div([html.H1(view.run), *marks], className="title-row"),
        html.Div(" · ".join([RUN_PAGES.get(view.page, ""), *line]), className="subtitle"),
    ]


def open_page(library: Library, view: View, screen: dict[str, Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Navigation, title and body of a view. Never raises: what is wrong becomes the body."""
    try:
        if view.page == "missing":
            raise RunError(f"There is no page at {view.run}.")
        body = PAGES[view.page].layout(view, library, style_of(screen))
        return _navigation(library, view), _title(library, view), body
    except (RunError, OSError) as error:
        title, text = "This page cannot be shown", str(error)
    except Exception as error:  # a fault of ours must not leave a blank page
        log.exception("opening %s failed", view)
        title, text = "Something went wrong here", f"{type(error).__name__}: {error}"
    back = html.P(html.A("Back to the list", href="/"))
    return _navigation(library, view), [html.H1(title)], [notice(title, [html.P(text), back], "critical")]


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
        cursor, said = _cursor(library, view.run)
        nav, title, body = open_page(library, view, screen)
        page = {"page": view.page, "run": view.run, "defaults": _defaults(body, view)}
        return (
            nav,
            title,
            body,
            page
            | {"cursor": cursor, "said": said, "built": url.get("count", 0), "nav": _nav_run(library, view)},
        )

    @app.callback(
        Output("title", "children", allow_duplicate=True),
        Output("error", "className"),
        Input("pulse", "data"),
        Input("verdict", "data"),
        State("page", "data"),
        prevent_initial_call=True,
    )
    def headline(_pulse: Any, _verdict: Any, page: dict[str, Any]) -> tuple[Any, str]:
        return _title(library, View(page.get("page", "runs"), page.get("run", ""))), "hidden"

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


def _cursor(library: Library, name: str) -> tuple[str, str]:
    """The state that a page is built from; taken before, so that what arrives meanwhile counts as news."""
    try:
        return library.cursor(name)
    except (RunError, OSError):
        return "", ""


def _defaults(body: list[Any], view: View) -> dict[str, Any]:
    """Values of the controls when the URL says nothing: these are left out of the URL."""
    found: dict[str, Any] = {}
    for part in body:
        for item in [part, *part._traverse()]:
            key = getattr(item, "id", None)
            if isinstance(key, dict) and key["state"] not in (*view.params, *ALWAYS_WRITTEN):
                found[key["state"]] = getattr(item, "value", None)
    return found


def _register_zoom(app: Dash, ids: tuple[str, ...]) -> None:
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
