"""What a page declares of a plot, the card around it, and how any of them is drawn."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dash import html

from ..monitor import RunError
from .clocks import clock_of
from .components import graph
from .figures.escape import escaped
from .figures.margins import framed
from .figures.theme import TEMPLATES, Figure, Style, message, style_of
from .figures.times import Clock, shown
from .sent import Sent
from .urls import step_range

if TYPE_CHECKING:
    from ..monitor import Run
    from .queries import Library

log = logging.getLogger(__name__)
#: What every plot over steps follows besides its own controls.
ON_STEPS = ("range", "axis")


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
    """A plot of a page."""

    id: str
    title: str
    explain: str  # how to read it, in a line under the title
    draw: Callable[[Scene], Figure]
    own: tuple[str, ...] = ()  # the controls it follows (their keys), without those of every plot over steps
    good: str = ""  # what a healthy run looks like here, shown on hover
    bad: str = ""  # what trouble looks like
    height: int = 300
    keep: tuple[str, ...] = ()  # controls that reset the zoom when they change
    judged: bool = False  # shows findings, so new ones are a reason to draw again
    on_steps: bool = True  # steps run across: a drag in it zooms all such plots of the page

    @property
    def controls(self) -> tuple[str, ...]:
        """The keys of all controls it follows."""
        return self.own + tuple(key for key in ON_STEPS if self.on_steps and key not in self.own)


def plot_card(
    plot: Plot, style: Style, *, tools: Sequence[Any] = (), explain: Any = None, height: int | None = None
) -> html.Section:
    """The card of a plot: title with what good and bad look like, its tools, downloads, the plot itself."""
    read = "".join(f" {word}: {text}" for word, text in (("Good", plot.good), ("Bad", plot.bad)) if text)
    guide = {
        "aria-label": f"How to read {plot.title}.{read}",
        "data-good": plot.good,
        "data-bad": plot.bad,
    }
    title = html.Div(
        [html.H2(plot.title), html.Button("?", className="guide-button", **guide)],  # pyright: ignore[reportArgumentType]
        className="guided",
    )
    head = html.Div(
        [
            html.Div(
                [title, html.P(plot.explain if explain is None else explain, className="explain")],
                className="card-title",
            ),
            html.Div([*tools, _files(plot)], className="tools"),
        ],
        className="card-head",
    )
    said = html.Div([html.Div(id=f"{plot.id}-said"), _retry(plot)], className="plot-said", role="status")
    tall = plot.height if height is None else height
    frame = html.Div(
        [graph(plot.id, plot.title, tall, style), said],
        id=f"{plot.id}-frame",
        className="plot-frame waiting",
        style={"minHeight": tall},
        **{"data-controls": json.dumps(plot.controls)},  # pyright: ignore[reportArgumentType]
    )
    return html.Section([head, frame], className="card")


def _retry(plot: Plot) -> html.Button:
    return html.Button("Try again", className="pill retry", **{"data-plot": plot.id})  # pyright: ignore[reportArgumentType]


def _files(plot: Plot) -> html.Button:
    """Opens the menu of downloads: pictures by Plotly, data by the server (see `downloads`)."""
    known = {"aria-label": f"Download {plot.title}", "aria-haspopup": "menu", "aria-expanded": "false"}
    return html.Button("⤓", className="menu-button", title="Download", **known, **{"data-plot": plot.id})  # pyright: ignore[reportArgumentType]


def draw(
    plot: Plot, library: Library, page: dict[str, Any], screen: dict[str, Any], values: list[Any]
) -> Figure:
    """One figure with its theme. What goes wrong is said in its place: see `theme.message`."""
    style = style_of(screen)
    controls = dict(zip(plot.controls, values, strict=True))
    try:
        figure = plot.draw(Scene(library, page["run"], library.run(page["run"]), style, controls))
    except (RunError, OSError) as error:
        figure = message(f"This run cannot be read. {library.explain(error)}", style, failed=True)
    except Exception as error:  # any other fault is ours; the page must say so and stay usable
        log.exception("drawing %s failed", plot.id)
        figure = message(f"This plot could not be drawn ({type(error).__name__}).", style, failed=True)
    figure = _laid_out(figure, library, page["run"], controls)
    layout = figure["layout"]
    layout["template"] = TEMPLATES[style.palette.name]
    layout["uirevision"] = "|".join([page["run"], *(str(controls.get(key)) for key in ("axis", *plot.keep))])
    return framed(escaped(figure))


def _laid_out(figure: Figure, library: Library, name: str, controls: dict[str, Any]) -> Figure:
    """The figure on the step axis that the reader chose: see `times`."""
    axis = str(controls.get("axis") or "step")
    try:
        clock = clock_of(library, library.run(name)) if axis in ("relative", "wall") else Clock()
        others = {trace["meta"]["run"] for trace in figure["data"] if "run" in (trace.get("meta") or {})}
        clocks = {run: clock_of(library, library.run(run)) for run in others} if clock.runs else {}
    except (RunError, OSError):
        clock, clocks = Clock(), {}
    return shown(figure, axis, clock, step_range(controls.get("range")), clocks)


def stamp(plot: Plot, cursors: tuple[str, str]) -> str:
    """What changes when there is a reason to draw the plot again."""
    return "-".join(cursors) if plot.judged else cursors[0]


def current(
    plot: Plot, library: Library, sent: Sent, page: dict[str, Any], screen: dict[str, Any], values: list[Any]
) -> Figure:
    """The figure with a tag, by which a live update knows what the browser holds."""
    try:
        now, live = stamp(plot, library.cursor(page["run"])), library.run(page["run"]).live
    except (RunError, OSError):
        now, live = "", False
    return sent.tag(draw(plot, library, page, screen, values), now, live)


def outcome(figure: Figure) -> tuple[Figure, str, str]:
    """A figure, the class of its frame, and what is said where it would be."""
    said = figure["layout"].get("meta", {}).get("said", "")
    tone = figure["layout"].get("meta", {}).get("tone", "") if said else ""
    return figure, f"plot-frame {tone}".strip(), said
