"""What a page declares of a plot, and the one callback that draws any of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dash import Dash, Input, Output, State

from ..monitor import RunError
from .components import state_id
from .figures.theme import TEMPLATES, Figure, Style, message, style_of

if TYPE_CHECKING:
    from ..monitor import Run
    from .queries import Library

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scene:
    """What a plot is drawn from: the run, the screen, the values of its controls."""

    runs: Library
    name: str
    run: Run
    style: Style
    values: dict[str, Any]

    def text(self, key: str, default: str = "") -> str:
        """The value of a control as text."""
        value = self.values.get(key)
        return default if value is None or value == "" else str(value)


@dataclass(frozen=True)
class Plot:
    """A plot's id, the controls it depends on (their keys) and the function that draws it."""

    id: str
    controls: tuple[str, ...]
    draw: Callable[[Scene], Figure]
    keep: tuple[str, ...] = ()  # controls that reset the zoom when they change
    judged: bool = False  # shows findings, so new ones are a reason to draw again


def draw(
    plot: Plot, library: Library, page: dict[str, Any], screen: dict[str, Any], values: list[Any]
) -> Figure:
    """One figure with its theme. What goes wrong is written where the plot would be."""
    style = style_of(screen)
    controls = dict(zip(plot.controls, values, strict=True))
    try:
        figure = plot.draw(Scene(library, page["run"], library.run(page["run"]), style, controls))
    except (RunError, OSError) as error:
        figure = message(f"This run cannot be read. {error}", style)
    except Exception as error:  # any other fault is ours; the page must say so and stay usable
        log.exception("drawing %s failed", plot.id)
        figure = message(f"This plot could not be drawn ({type(error).__name__}: {error}).", style)
    layout = figure["layout"]
    layout["template"] = TEMPLATES[style.palette.name]
    layout["uirevision"] = "|".join([page["run"], *(str(controls.get(key)) for key in plot.keep)])
    return figure


def register(app: Dash, library: Library, plots: tuple[Plot, ...]) -> None:
    """A callback per plot. It returns the figure only: returned children would be built anew every time."""
    for plot in plots:
        _register(app, library, plot)


def _register(app: Dash, library: Library, plot: Plot) -> None:
    inputs = [Input(state_id(key), "value") for key in plot.controls]
    count = len(inputs)
    if plot.judged:
        inputs.append(Input("verdict", "data"))

    @app.callback(
        Output(plot.id, "figure"),
        Input("pulse", "data"),
        Input("screen", "data"),
        *inputs,
        State("page", "data"),
    )
    def update(_pulse: Any, screen: dict[str, Any], *rest: Any) -> Figure:
        return draw(plot, library, rest[-1], screen, list(rest[:count]))
