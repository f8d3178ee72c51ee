"""The route that assets/live.js asks: what has changed on this page since the state that it shows?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Flask, Response, jsonify, request

from ..monitor import RunError
from .pages import PAGES
from .plots import Plot, current, stamp
from .sent import Sent, stamp_of

if TYPE_CHECKING:
    from .figures.diff import Patch
    from .queries import Library

PATH = "/api/live"


def register(server: Flask, library: Library, sent: Sent) -> None:
    """`POST /api/live`, a JSON object of the run, its cursors, the page with the values of its controls, the
    screen, and the tags of the plots on it -> {"cursor", "said", "live", "plots": {id: patch}, "texts"}.

    No run name asks for all runs; an unknown one is 404.
    """

    @server.post(PATH)
    def live() -> tuple[Response, int]:
        asked = request.get_json()
        if not isinstance(asked, dict):
            return jsonify({"error": "a JSON object is expected"}), 400
        name = str(asked.get("run") or "")
        try:
            cursor, said = library.cursor(name)
            run = library.run(name) if name else None
            going = run.live if run else library.live()
        except (RunError, OSError):
            return jsonify({"error": "There is no such run, or it cannot be read."}), 404
        news = {"cursor": cursor, "said": said, "live": going, "plots": {}, "texts": {}}
        page = PAGES.get(str(asked.get("page")))
        if name and page:
            news["plots"] = patches(library, sent, page.PLOTS, asked, (cursor, said))
            if (cursor, said) != (asked.get("cursor"), asked.get("said")):
                news["texts"] = getattr(page, "texts", _none)(library, name)
        answer = jsonify(news)
        answer.headers["Cache-Control"] = "no-store"
        return answer, 200


def _none(_library: Library, _name: str) -> dict[str, str]:
    return {}


def patches(
    library: Library, sent: Sent, plots: tuple[Plot, ...], asked: dict[str, Any], cursors: tuple[str, str]
) -> dict[str, Patch]:
    """For each plot of the page that was drawn from an older state of the log: what has changed."""
    held, state, screen = (_object(asked.get(key)) for key in ("plots", "state", "screen"))
    found: dict[str, Patch] = {}
    for plot in plots:
        if plot.id in held and stamp_of(held[plot.id]) != stamp(plot, cursors):
            values = [None if state.get(key) == "" else state.get(key) for key in plot.controls]
            figure = current(plot, library, sent, {"run": asked["run"]}, screen, values)
            patch = sent.patch(str(held[plot.id]), figure)
            if patch:
                found[plot.id] = patch
    return found


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
