"""Two runs side by side: one scalar on top of the other, and what was configured differently."""

from __future__ import annotations

import json
from typing import Any

from dash import Dash, Input, Output, State, html

from ...monitor import Run, RunError
from ..components import card, notice, scale, select, smoothing, toolbar
from ..figures.curves import overlay
from ..figures.theme import Figure, Style, message
from ..plots import Plot, Scene, plot_card
from ..queries import Library
from ..text import integer, number
from ..urls import View, fraction, step_range

FIRST = ("train_loss", "val_loss")


def layout(view: View, library: Library, style: Style) -> list[Any]:
    """The other run, the scalar, the curves, the differences."""
    run = library.run(view.run)
    others = [name for name in library.runs() if name != view.run]
    if not others:
        return [notice("Only one run", "There is no second run below this folder to compare with.")]
    names = scalar_names(library, run)
    return [
        toolbar(
            view,
            select(view, "with", [(name, name) for name in others], others[0], "Compare with", 230),
            select(
                view, "scalar", [(name, name) for name in names], names[0] if names else "", "Scalar", 190
            ),
            scale(view),
            smoothing(view),
        ),
        plot_card(CURVES, style),
        html.Div(id="compare-tables", className="halves"),
    ]


def scalar_names(library: Library, run: Run) -> list[str]:
    """Scalars of any run, the losses first."""
    names = set(run.scalar_names())
    for other in list(library.runs().values())[:50]:
        names |= set(other.scalar_names())
    return [name for name in FIRST if name in names] + sorted(names - set(FIRST))


def draw(scene: Scene) -> Figure:
    """One scalar of both runs."""
    other, name = scene.text("with"), scene.text("scalar", "train_loss")
    try:
        second = scene.runs.run(other)
    except RunError as error:
        return message(scene.runs.explain(error), scene.style)
    curves = {scene.name: scene.run.scalars(name), other: second.scalars(name)}
    smooth, log = fraction(scene.values["smoothing"]), scene.text("scale") == "log"
    return overlay(curves, name, scene.style, smooth, log, step_range(scene.text("range")))


CURVES = Plot(
    "compare-plot",
    "Both runs",
    "The same scalar of both runs on one step axis; drag to zoom.",
    draw,
    ("with", "scalar", "scale", "smoothing"),
    good="Runs that differ in a seed only stay within each other's noise.",
    bad="A step at which one run leaves the other: look there at gradient flow and drift.",
    height=380,
    keep=("with", "scalar", "scale"),
)
PLOTS = (CURVES,)


def settings(run: Run) -> dict[str, str]:
    """What was chosen for a run, flattened: config, optimizers, seed, versions, size."""
    info = run.info
    flat: dict[str, str] = {}
    for prefix, value in (("config", info.get("config")), ("optimizer", info.get("optimizers"))):
        _flatten(flat, prefix, value)
    for key in ("seed", "every", "git_commit", "host"):
        if info.get(key) is not None:
            flat[key] = str(info[key])
    _flatten(flat, "version", info.get("versions"))
    tensors = run.tensors()
    flat["parameters"] = integer(tensors["elements"].sum()) if len(tensors) else "0"
    flat["tensors"] = str(len(tensors))
    return flat


def _flatten(flat: dict[str, str], prefix: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(flat, f"{prefix}.{key}", inner)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, inner in enumerate(value):
            _flatten(flat, prefix if len(value) == 1 else f"{prefix}.{i}", inner)
    elif value is not None:
        flat[prefix] = value if isinstance(value, str) else json.dumps(value, default=str)


def differences(one: dict[str, str], two: dict[str, str]) -> tuple[list[tuple[str, str, str]], int]:
    """(key, value in one, value in two) where they differ, and how many are the same."""
    keys = list(dict.fromkeys([*one, *two]))
    rows = [(key, one.get(key, "–"), two.get(key, "–")) for key in keys if one.get(key) != two.get(key)]
    return rows, len(keys) - len(rows)


def tables(library: Library, name: str, other: str) -> list[Any]:
    """Configuration differences, and the last value of every scalar."""
    one, two = library.run(name), library.run(other)
    rows, same = differences(settings(one), settings(two))
    last = [(key, _last(one, key), _last(two, key)) for key in scalar_names_of(one, two)]
    return [
        card("Configuration", f"Only what differs; {same} settings are the same.", _table(rows, name, other)),
        card("Last values", "The latest value of each scalar.", _table(last, name, other)),
    ]


def scalar_names_of(one: Run, two: Run) -> list[str]:
    """Scalars of either run."""
    return sorted(set(one.scalar_names()) | set(two.scalar_names()))


def _last(run: Run, name: str) -> str:
    frame = run.scalars(name)
    return number(frame["value"].iloc[-1]) if len(frame) else number(None)


def _table(rows: list[tuple[str, str, str]], name: str, other: str) -> Any:
    if not rows:
        return html.P("No difference.", className="dim")
    head = html.Thead(html.Tr([html.Th(""), html.Th(name), html.Th(other)]))
    body = html.Tbody([html.Tr([html.Th(key, scope="row"), html.Td(a), html.Td(b)]) for key, a, b in rows])
    return html.Div(html.Table([head, body], className="table"), className="scroll")


def register(app: Dash, library: Library) -> None:
    """The tables follow the other run."""

    @app.callback(
        Output("compare-tables", "children"), Input({"state": "with"}, "value"), State("page", "data")
    )
    def update(other: str, page: dict[str, Any]) -> list[Any]:
        try:
            return tables(library, page["run"], other)
        except RunError as error:
            return [notice("Cannot compare", library.explain(error), "warning")]
