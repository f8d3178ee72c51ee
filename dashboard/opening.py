"""A page as it opens: navigation, title and body, with the plots that will be in view drawn already."""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from flask import has_request_context, request

from .pages import PAGES
from .plots import Plot, current, outcome
from .queries import Library
from .sent import Sent
from .shell import cursor, defaults, nav_run, open_page
from .urls import View, parse

#: Plots are drawn with their page for so long; those that remain are asked for when the page stands.
MOST_SECONDS = 0.25


class Opened(NamedTuple):
    """The parts of an open page; `page` is what the browser keeps of it."""

    nav: list[Any]
    title: list[Any]
    body: list[Any]
    page: dict[str, Any]


class Opener:
    """Opens pages. It learns from the browsers which plots of a page are in view at first.

    The first visit to a run's page shows the page and then its plots: reading a long log takes a while. From
    then on they come with it.
    """

    def __init__(self, library: Library, sent: Sent) -> None:
        self._library, self._sent = library, sent
        self._in_view: dict[tuple[str, bool], list[str]] = {}
        self._read: set[tuple[str, str]] = set()

    def learn(self, page: str, run: str, screen: dict[str, Any], plots: list[str]) -> None:
        """A browser has asked for these when it had the page; they have been drawn."""
        if not plots or run not in self._library.runs():
            return  # what is kept is bounded by what there is
        known = self._in_view.setdefault((page, bool(screen.get("narrow"))), [])
        known.extend(name for name in plots if name not in known)
        self._read.add((run, page))

    def open(self, url: dict[str, Any], screen: dict[str, Any]) -> Opened:
        """The page at an address: {"path", "search", "count"}."""
        view = parse(url["path"], url.get("search", ""))
        at, said = cursor(self._library, view.run)
        nav, title, body = open_page(self._library, view, screen)
        self._draw(view, screen, body)
        page = {
            "page": view.page,
            "run": view.run,
            "at": url["path"] + url.get("search", ""),
            "defaults": defaults(body, view),
            "cursor": at,
            "said": said,
            "built": url.get("count", 0),
            "nav": nav_run(self._library, view),
        }
        return Opened(nav, title, body, page)

    def _draw(self, view: View, screen: dict[str, Any], body: list[Any]) -> None:
        wanted = self._in_view.get((view.page, bool(screen.get("narrow"))))
        if not wanted or (view.run, view.page) not in self._read:
            return
        state, parts = {}, {}
        for item in (each for part in body for each in (part, *part._traverse())):
            key = getattr(item, "id", None)
            if isinstance(key, dict) and "state" in key:
                state[key["state"]] = getattr(item, "value", None)
            elif isinstance(key, str):
                parts[key] = item
        begun = time.perf_counter()
        for plot in PAGES[view.page].PLOTS:
            if plot.id in wanted and plot.id in parts and time.perf_counter() - begun < MOST_SECONDS:
                self._fill(plot, view.run, screen, state, parts)

    def _fill(
        self, plot: Plot, run: str, screen: dict[str, Any], state: dict[str, Any], parts: dict[str, Any]
    ) -> None:
        values = [None if state.get(key) == "" else state.get(key) for key in plot.controls]
        drawn = current(plot, self._library, self._sent, {"run": run}, screen, values)
        frame = parts[f"{plot.id}-frame"]
        parts[plot.id].figure, frame.className, parts[f"{plot.id}-said"].children = outcome(drawn)
        # By this the browser knows that it need not ask: see assets/visible.js.
        setattr(frame, "data-drawn", json.dumps([*values, screen.get("theme"), screen.get("narrow")]))


def address() -> dict[str, Any] | None:
    """The page that asks for the layout, from its Referer; None when the browser does not tell.

    Of a very long address it tells the origin only, which looks like the address of the Runs page.
    """
    try:
        asked = urlsplit(request.referrer or "") if has_request_context() else None
    except ValueError:
        return None
    base = request.script_root if asked else ""
    if not asked or asked.netloc != request.host or not asked.path.startswith(f"{base}/"):
        return None
    path = asked.path.removeprefix(base)
    if path == "/":
        return None
    return {
        "path": path,
        "search": f"?{asked.query}" if asked.query else "",
        "count": 0,
    }
