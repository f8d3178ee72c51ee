"""The route that assets/visible.js asks: the plots of a page that are in view, drawn in one answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Flask, Response, jsonify, request
from plotly.io.json import to_json_plotly

from .pages import PAGES
from .plots import current, outcome
from .sent import Sent

if TYPE_CHECKING:
    from .opening import Opener
    from .queries import Library

PATH = "/api/plots"


def register(server: Flask, library: Library, sent: Sent, opener: Opener) -> None:
    """`POST /api/plots`, a JSON object of the run, the page with the values of its controls, the screen and
    the ids of plots -> {id: {"figure", "className", "said"}}, without those that the page does not have: a
    reader who leaves a page may still ask for its plots. "first" is true of those that were in view at once.
    """

    @server.post(PATH)
    def drawn() -> Response | tuple[Response, int]:
        asked = request.get_json()
        if not isinstance(asked, dict):
            return jsonify({"error": "a JSON object is expected"}), 400
        page = PAGES.get(str(asked.get("page")))
        known = {plot.id: plot for plot in page.PLOTS} if page else {}
        wanted = [str(name) for name in _of(asked, "plots", list)]
        state, screen, found = _of(asked, "state", dict), _of(asked, "screen", dict), {}
        for plot in (known[name] for name in dict.fromkeys(wanted) if name in known):
            values = [None if state.get(key) == "" else state.get(key) for key in plot.controls]
            shown = outcome(current(plot, library, sent, {"run": str(asked.get("run"))}, screen, values))
            found[plot.id] = dict(zip(("figure", "className", "said"), shown, strict=True))
        if asked.get("first") is True:
            opener.learn(str(asked.get("page")), str(asked.get("run")), screen, list(found))
        answer = Response(str(to_json_plotly(found)), content_type="application/json")
        answer.headers["Cache-Control"] = "no-store"
        return answer


def _of(asked: dict[str, Any], key: str, kind: type) -> Any:
    value = asked.get(key)
    return value if isinstance(value, kind) else kind()
