"""What happened and when: findings and events on a timeline and in one list, the latest first."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import dash_mantine_components as dmc
import numpy as np
from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update

from ...monitor import Run, RunError
from ..components import aria, card, choice, select, state_id, toolbar
from ..figures.theme import Figure, Style
from ..figures.timeline import height, lanes, timeline
from ..happenings import FINDINGS, KINDS, Happening, happenings, narrowed
from ..plots import Plot, Scene, plot_card
from ..text import integer
from ..urls import View, href, step_range
from .evidence import around

if TYPE_CHECKING:
    from ..judging import Judgement
    from ..queries import Library

SHOWN = {"all": "All", "alarms": "Alarms", "findings": "Findings", "events": "Events"}
MOST = 300  # lines; a reader narrows the list down, and does not scroll through thousands
LAYERS = 3
FOLLOWED = ("show", "kind", "filter")


def layout(view: View, library: Library, style: Style) -> list[Any]:
    """The timeline, the list with its filters, what could not be judged."""
    run = library.run(view.run)
    judged = library.judgement(view.run, wait=0.3)
    found = happenings(run, judged)
    present = [(kind, KINDS[kind]) for kind in lanes(found)]
    values = [view.params.get(key, "") for key in FOLLOWED]
    data = listed(run, view.run, judged, *values)
    return [
        toolbar(
            view,
            choice(view, "show", SHOWN, "all", "Show"),
            select(view, "kind", [("any", "Any kind"), *present], "any", "Kind", 160),
            _search(view),
        ),
        plot_card(TIMELINE, style, height=height(len(present))),
        dcc.Store(id="alerts-data", data=data),
        dcc.Store(id="alerts-view"),
        card(
            "Findings and events",
            "The latest first. What the detectors found stands at the step where it began.",
            html.P("", id="alerts-said", className="dim", role="status"),
            html.Div(id="alert-list", className="happenings"),
        ),
        html.Section(
            [
                html.H2("Could not be judged"),
                html.P(
                    "Detectors that lack what they need say so here; they never guess.", className="explain"
                ),
                html.Ul(id="alerts-notes"),
            ],
            className="card hidden",
            id="alerts-unjudged",
        ),
    ]


def _search(view: View) -> html.Div:
    box = dmc.TextInput(
        id=state_id("filter"),
        value=view.params.get("filter", ""),
        placeholder="word or layer",
        debounce=250,
        size="xs",
        w=180,
        spellCheck=False,
        **aria("search the list"),
    )
    return html.Div([html.Span("Search", className="label"), box], className="control")


def listed(
    run: Run, name: str, judged: Judgement | None, show: str, kind: str, wanted: str
) -> dict[str, Any]:
    """What the browser writes into the list, and a stamp that tells whether it has changed."""
    every = happenings(run, judged)
    found = narrowed(every, show or "all", kind or "any", wanted or "")
    content = {
        "rows": [line(h, name, run.last_step) for h in found[:MOST]],
        "said": said(len(found), len(every), judged),
        "notes": list(judged.notes) if judged else [],
    }
    stamp = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()
    return content | {"stamp": stamp}


def said(found: int, every: int, judged: Judgement | None) -> str:
    """How many lines there are, and what is not among them."""
    wait = " The detectors are still reading the log." if judged is None else ""
    if judged is not None and judged.error:
        wait = f" The detectors stopped: {judged.error}."
    if not every:
        return "Nothing to report: no finding, no event." + wait
    count = integer(found) if found == every else f"{integer(found)} of {integer(every)}"
    cut = f"; the latest {MOST} are shown, narrow the list to see others" if found > MOST else ""
    return f"{count} line{'' if count == '1' else 's'}{cut}.{wait}"


def line(h: Happening, name: str, last_step: int) -> dict[str, Any]:
    """One line as plain texts and addresses of ours."""
    span = integer(h.first) if h.first >= 0 else "–"
    span += f" – {integer(h.last)}" if h.last > h.first else ""
    shown = [{"text": layer, "href": href("layer", name, tensor=layer)} for layer in h.layers[:LAYERS]]
    more = len(h.layers) - LAYERS
    return {
        "key": f"{h.kind}|{h.first}|{h.problem or h.title}|{h.time or 0:.3f}",
        "step": span,
        "time": clock(h.time),
        "tone": h.tone,
        "label": h.kind if h.kind in FINDINGS else "event",
        "title": h.title,
        "text": h.text,
        "more": f"and {more} more" if more > 0 else "",
        "layers": shown,
        "link": _evidence(h, name, last_step),
    }


def _evidence(h: Happening, name: str, last_step: int) -> dict[str, str]:
    """Where a line leads: the proof of a finding, else the steps around an event."""
    span = around(max(h.first, 0), max(h.last, 0), last_step)
    if h.problem:
        layer = {"tensor": h.layers[0]} if h.layers else {}
        return {"text": "Evidence", "href": href("overview", name, finding=h.problem, range=span, **layer)}
    return {"text": "Show steps", "href": href("overview", name, range=span)}


def clock(moment: float | None) -> str:
    """A unix time as local date and time."""
    if moment is None or not np.isfinite(moment):
        return "–"
    return datetime.fromtimestamp(moment).strftime("%d %b %H:%M:%S")


def draw(scene: Scene) -> Figure:
    """The timeline of what the list shows."""
    judged = scene.runs.judgement(scene.name, wait=0.3)
    found = happenings(scene.run, judged)
    wanted = [scene.text(key) for key in FOLLOWED]
    return timeline(
        narrowed(found, *wanted), scene.run.last_step, scene.style, step_range(scene.text("range"))
    )


TIMELINE = Plot(
    "timeline-plot",
    "Timeline",
    "A bar for what lasted, a dot for what happened at one step. Drag to zoom.",
    draw,
    FOLLOWED,
    good="A start, an end, and nothing in between.",
    bad="Critical bars that go on to the end, restarts and lost captures, many skipped steps.",
    keep=FOLLOWED,
    judged=True,
)
PLOTS = (TIMELINE,)


def register(app: Dash, library: Library) -> None:
    """The list follows its filters and a live run; the browser changes the lines that differ."""

    @app.callback(
        Output("alerts-data", "data"),
        *[Input(state_id(key), "value") for key in FOLLOWED],
        Input("pulse", "data"),
        Input("verdict", "data"),
        State("page", "data"),
        State("alerts-data", "data"),
        prevent_initial_call=True,
    )
    def update(
        show: str,
        kind: str,
        wanted: str,
        _pulse: Any,
        _verdict: Any,
        page: dict[str, Any],
        known: dict[str, Any],
    ) -> Any:
        name = page["run"]
        try:
            data = listed(library.run(name), name, library.judgement(name, wait=0.5), show, kind, wanted)
        except (RunError, OSError) as error:
            return (known or {}) | {"said": f"This run cannot be read: {error}", "stamp": ""}
        return no_update if known and data["stamp"] == known.get("stamp") else data

    app.clientside_callback(
        ClientsideFunction("alerts", "show"), Output("alerts-view", "data"), Input("alerts-data", "data")
    )
