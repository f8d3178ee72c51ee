"""What surrounds every page: navigation, title, tools; and the page of a view."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from typing import Any

import dash_mantine_components as dmc
from dash import dcc, html
from flask import has_request_context, request

from .. import __version__
from ..monitor import RunError
from .components import aria, badge, notice
from .figures.theme import FONT, style_of
from .pages import PAGES, problems
from .queries import Library
from .text import age, integer
from .urls import RUN_PAGES, View, href, problem_href

log = logging.getLogger(__name__)
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
MOST_NAMES = 200  # newest runs in the list of the navigation; the search knows all of them
ALWAYS_WRITTEN = ("tensor", "with")  # their defaults depend on the log, so a link must say them


#: The cookies in which assets/screen.js keeps what the browser says about itself.
SCREEN = {"layerwatch_theme", "layerwatch_narrow"}


def screen_of_browser() -> dict[str, Any]:
    """What the browser said about itself."""
    cookies = request.cookies if has_request_context() else {}
    theme = "dark" if cookies.get("layerwatch_theme") == "dark" else "light"
    return {"theme": theme, "narrow": cookies.get("layerwatch_narrow") == "1"}


def shell(url: dict[str, Any] | None = None, opened: Sequence[Any] = ()) -> dmc.MantineProvider:
    """What stays while pages come and go. The navigation comes first.

    Args:
        url: where the browser is, when it said so. opened: the navigation, title, body and data of that page.
    """
    screen = screen_of_browser()
    nav, title, body, page = opened or (_brand(), None, _skeleton(), {})
    stores = [
        dcc.Store(id="url", data=url),  # where the browser is: {"path", "search", "count"}
        dcc.Store(id="page", data=page),  # the page that is open: {"page", "run", "defaults"}
        dcc.Store(id="pulse", data=""),  # changes when the run grew
        dcc.Store(id="verdict", data=""),  # changes when the detectors said something new
        dcc.Store(id="screen", data=screen),
        dcc.Store(id="written"),
        dcc.Store(id="drawn"),
        dcc.Store(id="clicked"),
        dcc.Store(id="retry"),  # counts the wishes to draw again what failed
    ]
    theme: Any = {
        "primaryColor": "indigo",
        "fontFamily": FONT,
        "defaultRadius": "sm",
        "colors": {"dark": GREYS},
    }
    inside = [*stores, frame(nav, title, body)]
    return dmc.MantineProvider(inside, id="mantine", theme=theme, forceColorScheme=screen["theme"])


def frame(nav: Any, title: Any, body: Any) -> html.Div:
    """Navigation, title, tools and the body of a page, in their places."""
    tools = html.Div(
        [
            html.Button(
                ["Search…", html.Kbd("Ctrl K")],
                id="palette-button",
                className="pill palette-button",
                title="Pages, runs, layers, findings, actions (also /; ? lists all keys)",
            ),
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
    return html.Div(
        [
            html.A("Skip to the content", href="#body", className="skip"),
            html.Nav(nav, id="nav", className="nav", **aria("Pages")),  # pyright: ignore[reportArgumentType]
            html.Div(
                [
                    html.Header([html.Div(title, id="title", className="title"), tools], className="head"),
                    html.Div(id="error", className="hidden", role="alert"),
                    html.Main(body, id="body", className="body", tabIndex=-1),
                ],
                className="content",
            ),
        ],
        className="shell",
    )


def _brand() -> html.Div:
    return html.Div([html.Span(className="mark"), "layerwatch"], className="brand")


def _skeleton() -> list[html.Div]:
    """What is there until the first page is."""
    return [html.Div(className="card bone", style={"height": height}) for height in (64, 420, 260)]


def _navigation(library: Library, view: View) -> list[Any]:
    """Links of the selected run; on the Runs page those of the newest one."""
    run = nav_run(library, view)
    names = list(dict.fromkeys([*islice(library.runs(), MOST_NAMES), *([run] if run else [])]))
    items = [
        html.A(word, href=href(slug), className=_link(slug, view))
        for slug, word in {"runs": "Runs", "fleet": "Fleet"}.items()
    ]
    for slug, word in RUN_PAGES.items():
        items.append(html.A(word, href=href(slug, run), className=_link(slug, view)))
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
    about = html.A("Problems", href=problem_href(), className=_link("problems", view))
    parts = [*items[:2], html.Div(switch, className="switch"), *items[2:], about]
    pages = html.Div(parts, className="nav-links")
    foot = html.Div(f"version {__version__}", className="nav-foot")
    return [html.Div([_brand(), pages, foot], className="nav-inner")]


def nav_run(library: Library, view: View) -> str:
    """The run that the navigation leads to: the one that is open, else the newest."""
    names = library.runs()
    return view.run if view.run in names else next(iter(names), "")


def _link(page: str, view: View) -> str:
    return f"nav-link nav-{page}{' active' if view.page == page else ''}"


def headline(library: Library, view: View) -> list[Any]:
    """Name, health and age of the run; updated while it trains."""
    if view.page == "problems":
        page = problems.about(view)
        said = page.code if page else "what the detectors look for"
        return [html.H1(page.title if page else "Problems"), html.Div(said, className="subtitle")]
    if view.page in ("runs", "fleet") or not view.run:
        fleet = view.page == "fleet" and library.table.table
        count = len(library.table.rows) if fleet else len(library.runs())
        line = f"{integer(count)} run{'' if count == 1 else 's'} in {library.title}"
        return [html.H1("Fleet" if view.page == "fleet" else "Runs"), html.Div(line, className="subtitle")]
    run = library.run(view.run)
    judged = library.judgement(view.run, wait=0.1)
    health = judged.health if judged else "checking"
    updated = float(run.info.get("ended") or run.info.get("created") or float("nan"))
    marks: list[Any] = [badge(health)]
    if run.live:
        marks.insert(0, html.Span([html.Span(className="dot"), "live"], className="badge live"))
    world = int(run.info.get("world") or 1)
    gone = run.missing_ranks() if world > 1 else ()
    if len(gone):
        text = f"{len(gone)} of {world} ranks missing since step {integer(int(gone['missing_since'].min()))}"
        marks.append(html.Span(text, className="badge warning"))
    line = [f"step {integer(run.last_step)}" if run.last_step >= 0 else "no step yet"]
    line.append(
        "training now"
        if run.live
        else f"finished {age(updated)}"
        if run.info.get("closed")
        else f"last sign {age(updated)}"
    )
    if world > 1:
        line.append(f"{world} ranks")
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
        return _navigation(library, view), headline(library, view), body
    except (RunError, OSError) as error:
        title, text = "This page cannot be shown", library.explain(error)
    except Exception as error:  # a fault of ours must not leave a blank page
        log.exception("opening %s failed", view)
        title, text = "Something went wrong here", f"{type(error).__name__}; the log of the server says more."
    back = html.P(html.A("Back to the list", href=href("runs")))
    return _navigation(library, view), [html.H1(title)], [notice(title, [html.P(text), back], "critical")]


def cursor(library: Library, name: str) -> tuple[str, str]:
    """The state that a page is built from; taken before, so that what arrives meanwhile counts as news."""
    try:
        return library.cursor(name)
    except (RunError, OSError):
        return "", ""


def defaults(body: list[Any], view: View) -> dict[str, Any]:
    """Values of the controls when the URL says nothing: these are left out of the URL."""
    found: dict[str, Any] = {}
    for part in body:
        for item in [part, *part._traverse()]:
            key = getattr(item, "id", None)
            state = key.get("state") if isinstance(key, dict) else None
            if state and state not in (*view.params, *ALWAYS_WRITTEN):
                found[state] = getattr(item, "value", None)
    return found
