"""The sliders that choose the steps of the profiles beside a map."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, Output, State, html

from ...monitor import Run
from ..components import hidden
from ..figures.grid import Grid
from ..urls import View, fraction


def labelled(control: Any, label: str) -> html.Div:
    """A control with its name over it."""
    return html.Div([html.Span(label, className="label"), control], className="control")


def sliders(view: View, run: Run, *, compare: bool = True) -> list[Any]:
    """The step of the profile, and the one that it is compared with.

    At rest, at the end and at the start of the run, they choose nothing: the state stays empty, so that the
    profile follows a run that grows.
    """
    parts: list[Any] = [hidden(view, "at"), _slider(view, run, "at", "Profile at step", run.last_step)]
    if compare:
        parts += [hidden(view, "against"), _slider(view, run, "against", "Compare with step", 0)]
    return parts


def _slider(view: View, run: Run, key: str, label: str, rest: int) -> html.Div:
    high = max(run.last_step, 1)
    control = dmc.Slider(
        id={"slider": key},
        value=int(fraction(view.params.get(key), default=max(rest, 0), limit=high)),
        min=0,
        max=high,
        step=1,
        size="sm",
        w=150,
        updatemode="mouseup",
        thumbLabel=label.lower(),
    )
    return labelled(html.Div(control, className="slider"), label)


def register(app: Dash) -> None:
    """The sliders move the state. Once for all pages that have them."""
    for key, function, end in (("at", "fromEnd", "max"), ("against", "fromStart", "min")):
        app.clientside_callback(
            ClientsideFunction("layerwatch", function),
            Output({"state": key}, "value"),
            Input({"slider": key}, "value"),
            State({"slider": key}, end),
            prevent_initial_call=True,
        )


def step_of(value: object, whole: Grid) -> float | None:
    """The step that a state names; None when it names none, or one behind the last capture."""
    step = fraction(value, default=-1.0, limit=float("inf")) if value not in (None, "") else -1.0
    return None if step < 0 or not len(whole.steps) or step >= whole.steps[-1] else step
