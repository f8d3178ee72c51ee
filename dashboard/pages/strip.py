"""The strip of key figures at the top of a page. Its texts follow a live run, its elements stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dash import ALL, Dash, Input, Output, State, ctx, html, no_update

from ...monitor import RunError

#: Label -> value, note, tone ("good", "warning", "critical" or "").
Numbers = dict[str, tuple[str, str, str]]


def strip(page: str, numbers: Numbers) -> html.Div:
    """The figures in the order given."""
    return html.Div([_figure(page, label, *texts) for label, texts in numbers.items()], className="kpis")


def _figure(page: str, label: str, value: str, note: str, tone: str) -> html.Div:
    at = {"strip": page, "label": label}
    return html.Div(
        [
            html.Div(label, className="kpi-label"),
            html.Div(value, className=_look(tone), id=at | {"part": "value"}),
            html.Div(note, className="kpi-note", id=at | {"part": "note"}),
        ],
        className="kpi",
    )


def _look(tone: str) -> str:
    return f"kpi-value {tone}".strip()


def register(app: Dash, page: str, read: Callable[..., Numbers], *follows: Input) -> None:
    """Write the texts anew when the run grew, the detectors spoke, or one of the controls changed.

    `read` gets the name of the run and the values of the controls.
    """
    inputs = [Input("pulse", "data"), Input("verdict", "data"), *follows]

    @app.callback(
        Output({"strip": page, "label": ALL, "part": ALL}, "children"),
        Output({"strip": page, "label": ALL, "part": "value"}, "className"),
        *inputs,
        State("page", "data"),
        prevent_initial_call=True,
    )
    def update(_pulse: Any, _verdict: Any, *rest: Any) -> tuple[Any, Any]:
        *values, opened = rest
        texts, tones = ([place["id"] for place in places] for places in ctx.outputs_list)
        try:
            now = read(opened["run"], *values)
        except (RunError, OSError):  # the headline says so
            return [no_update] * len(texts), [no_update] * len(tones)
        known = [now.get(place["label"], (no_update, no_update, "")) for place in texts]
        return (
            [one[place["part"] == "note"] for one, place in zip(known, texts, strict=True)],
            [_look(now.get(place["label"], ("", "", ""))[2]) for place in tones],
        )
