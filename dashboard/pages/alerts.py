"""Findings and events of a run in one list, the latest first."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np
from dash import Dash, Input, Output, State, html

from ...monitor import Run, RunError
from ..components import badge, card, choice, layer_link, notice
from ..figures.theme import Style
from ..plots import Plot
from ..queries import Judgement, Library
from ..text import integer, words
from ..urls import View

PLOTS: tuple[Plot, ...] = ()
SHOWN = {"all": "All", "alarms": "Alarms", "events": "Events"}
TONES = {"error": "critical", "skipped": "warning", "note": "info"}


def layout(view: View, library: Library, style: Style) -> list[Any]:
    """The list with its filter."""
    return [
        html.Div(choice(view, "show", SHOWN, "all", "Show"), className="toolbar"),
        card(
            "Alerts and events",
            "What the detectors found (where it begins) and what happened to the run, latest first.",
            html.Div(id="alert-list", className="scroll"),
        ),
    ]


def rows(run: Run, judged: Judgement | None, name: str, show: str) -> list[dict[str, Any]]:
    """One row an alert or event: step, time, tone, label, text, layers."""
    found: list[dict[str, Any]] = []
    if show != "events":
        for f in judged.findings if judged else []:
            if show == "alarms" and f.severity == "info":
                continue
            found.append(
                {
                    "step": f.first_step,
                    "time": time_of(run, f.first_step),
                    "tone": f.severity,
                    "label": f.severity,
                    "title": words(f.problem),
                    "text": f.summary,
                    "layers": f.layers,
                }
            )
    if show != "alarms":
        for event in run.events().itertuples():
            found.append(
                {
                    "step": int(event.step),  # pyright: ignore[reportArgumentType]
                    "time": float(event.time),  # pyright: ignore[reportArgumentType]
                    "tone": TONES.get(str(event.event), "event"),
                    "label": "event",
                    "title": words(str(event.event)),
                    "text": str(event.message),
                    "layers": (),
                }
            )
    return sorted(found, key=lambda r: (r["step"], r["time"] or 0), reverse=True)


def time_of(run: Run, step: int) -> float | None:
    """When a step was logged, from the scalar nearest to it."""
    for name in ("train_loss", *run.scalar_names()[:1]):
        frame = run.scalars(name)
        if len(frame):
            place = int(np.searchsorted(frame["step"].to_numpy(), step))
            return float(frame["time"].iloc[min(place, len(frame) - 1)])
    return None


def table(found: list[dict[str, Any]], name: str) -> Any:
    """The rows as a table."""
    if not found:
        return notice("Nothing to report", "No alarm was raised and no event was recorded.", "good")
    head = html.Thead(html.Tr([html.Th(text) for text in ("Step", "Time", "", "What", "Where")]))
    body = [
        html.Tr(
            [
                html.Td(integer(row["step"]) if row["step"] >= 0 else "–", className="figure"),
                html.Td(clock(row["time"]), className="figure dim"),
                html.Td(badge(row["tone"], row["label"])),
                html.Td([html.B(row["title"]), html.Div(row["text"], className="dim")]),
                html.Td(_where(name, row["layers"])),
            ]
        )
        for row in found
    ]
    return html.Table([head, html.Tbody(body)], className="table alerts")


def _where(name: str, layers: tuple[str, ...]) -> list[Any]:
    links: list[Any] = [html.Div(layer_link(name, layer)) for layer in layers[:3]]
    return links + ([html.Div(f"and {len(layers) - 3} more", className="dim")] if len(layers) > 3 else [])


def clock(moment: float | None) -> str:
    """A unix time as local date and time."""
    if moment is None or not np.isfinite(moment):
        return "–"
    return datetime.fromtimestamp(moment).strftime("%d %b %H:%M:%S")


def register(app: Dash, library: Library) -> None:
    """The list follows the filter and a live run."""

    @app.callback(
        Output("alert-list", "children"),
        Input({"state": "show"}, "value"),
        Input("pulse", "data"),
        Input("verdict", "data"),
        State("page", "data"),
    )
    def update(show: str, _pulse: Any, _verdict: Any, page: dict[str, Any]) -> Any:
        name = page["run"]
        try:
            return table(rows(library.run(name), library.judgement(name, wait=2.0), name, show), name)
        except (RunError, OSError) as error:
            return notice("This run cannot be read", library.explain(error), "critical")
