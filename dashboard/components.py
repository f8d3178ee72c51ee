"""The pieces of pages: cards with a plot, controls whose values are in the URL, badges, lists of findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import dash_mantine_components as dmc
import numpy as np
from dash import dcc, html

from .figures.base import wide
from .figures.theme import TEMPLATES, Style
from .figures.times import AXES
from .text import integer, number, words
from .urls import View, href

if TYPE_CHECKING:
    from ..monitor.findings import Finding

TWO_DIGITS: Any = {"function": "twoDigits"}  # in assets/grid.js
#: Plotly's own upload button is off, and so is everything that is noise on a dashboard.
GRAPH_CONFIG: Any = {
    "displaylogo": False,
    "responsive": True,
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "doubleClick": "autosize",
    "modeBarButtonsToRemove": [
        "select2d",
        "lasso2d",
        "zoomIn2d",
        "zoomOut2d",
        "resetScale2d",
        "toggleSpikelines",
    ],
    "toImageButtonOptions": {"format": "png", "scale": 2},
}


def aria(value: str, attribute: str = "label") -> dict[str, Any]:
    """A word for screen readers, as a component's `aria-...` argument."""
    return {f"aria-{attribute}": value}


def graph(name: str, title: str, height: int, style: Style) -> html.Div:
    """An empty plot of fixed height; its callback fills it."""
    hidden = {"visible": False}
    empty = {
        "data": [],
        "layout": {"template": TEMPLATES[style.palette.name], "xaxis": hidden, "yaxis": hidden},
    }
    plot = dcc.Graph(id=name, figure=empty, config=GRAPH_CONFIG, style={"height": height}, className="plot")
    return html.Div(plot, role="group", **aria(title))  # pyright: ignore[reportArgumentType]


def toolbar(view: View, *controls: Any) -> html.Div:
    """The controls of a page of plots over steps, with what runs across and the zoomed step range."""
    zoomed = html.Button(
        "", id="range-chip", className="pill hidden", title="Back to the whole run (or double-click a plot)"
    )
    across = select(view, "axis", list(AXES.items()), "step", "X axis", 126)
    return html.Div([*controls, across, zoomed, hidden(view, "range")], className="toolbar")


def card(title: str, explain: str, *children: Any, tools: Sequence[Any] = ()) -> html.Section:
    """A titled box. `explain` says in one line how to read what is in it."""
    head = html.Div(
        [
            html.Div([html.H2(title), html.P(explain, className="explain")], className="card-title"),
            html.Div(list(tools), className="tools") if tools else None,
        ],
        className="card-head",
    )
    return html.Section([head, *children], className="card")


def state_id(key: str) -> dict[str, str]:
    """The id of a control whose value is a part of the URL."""
    return {"state": key}


def choice(view: View, key: str, options: dict[str, str], default: str, label: str) -> html.Div:
    """A row of buttons, one of them chosen. `options`: value -> word."""
    value = view.params.get(key, default)
    control = dmc.SegmentedControl(
        id=state_id(key),
        data=[{"value": v, "label": word} for v, word in options.items()],  # pyright: ignore[reportArgumentType]
        value=value if value in options else default,
        size="xs",
    )
    return _labelled(control, label)


def select(
    view: View,
    key: str,
    options: Sequence[tuple[str, str]],
    default: str,
    label: str,
    width: int = 190,
    **more: Any,
) -> html.Div:
    """A drop-down list that can be searched. `options`: (value, word)."""
    value = view.params.get(key, default)
    control = dmc.Select(
        id=state_id(key),
        data=[{"value": v, "label": word} for v, word in options],  # pyright: ignore[reportArgumentType]
        value=value if value in {v for v, _ in options} else default,
        size="xs",
        w=width,
        allowDeselect=False,
        searchable=len(options) > 8,
        nothingFoundMessage="nothing of that name",
        maxDropdownHeight=360,
        **aria(label),
        **more,
    )
    return _labelled(control, label)


def pattern(view: View, key: str = "filter") -> html.Div:
    """A text field for a regular expression over names."""
    control = dmc.TextInput(
        id=state_id(key),
        value=view.params.get(key, ""),
        placeholder="regular expression",
        debounce=350,
        size="xs",
        w=170,
        spellCheck=False,
        **aria("filter layers"),
    )
    return _labelled(control, "Filter layers")


def smoothing(view: View) -> html.Div:
    """How strongly curves are smoothed, 0 to 0.99."""
    from .urls import fraction

    control = dmc.Slider(
        id=state_id("smoothing"),
        value=fraction(view.params.get("smoothing", "0")),
        min=0,
        max=0.99,
        step=0.01,
        size="sm",
        w=120,
        updatemode="mouseup",
        thumbLabel="smoothing",
        label=TWO_DIGITS,
    )
    return _labelled(html.Div(control, className="slider"), "Smoothing")


def step_slider(view: View, steps: Sequence[int], key: str = "at") -> html.Div:
    """The captured step that a profile or a bar chart shows; the last one until it is moved."""
    from .urls import fraction

    low, high = (int(steps[0]), int(steps[-1])) if len(steps) else (0, 1)
    value = fraction(view.params.get(key), default=high, limit=high)
    control = dmc.Slider(
        id=state_id(key),
        value=max(int(value), low),
        min=low,
        max=max(high, low + 1),
        step=1,
        size="sm",
        w=190,
        updatemode="mouseup",
        thumbLabel="step",
    )
    return _labelled(html.Div(control, className="slider"), "Profile at step")


def scale(view: View, *values: np.ndarray) -> html.Div:
    """Linear or logarithmic value axis; logarithmic at first when positive values span three decades."""
    default = "log" if values and wide(np.concatenate(values)) else "linear"
    return choice(view, "scale", {"linear": "Linear", "log": "Log"}, default, "Value axis")


def hidden(view: View, key: str) -> html.Div:
    """A part of the URL without a control of its own, such as the zoomed step range."""
    return html.Div(dmc.TextInput(id=state_id(key), value=view.params.get(key, "")), className="hidden")


def _labelled(control: Any, label: str) -> html.Div:
    return html.Div([html.Span(label, className="label"), control], className="control")


def badge(severity: str, text: str | None = None) -> html.Span:
    """A severity in its colour."""
    return html.Span(text or severity, className=f"badge {severity}")


def key_figure(label: str, value: str, note: str = "", tone: str = "") -> html.Div:
    """One number of the strip at the top of a page."""
    return html.Div(
        [
            html.Div(label, className="kpi-label"),
            html.Div(value, className=f"kpi-value {tone}".strip()),
            html.Div(note, className="kpi-note"),
        ],
        className="kpi",
    )


def layer_link(run: str, layer: str) -> html.A:
    """A tensor or module name that opens its page."""
    return html.A(layer, href=href("layer", run, tensor=layer), className="layer-link", title=layer)


def finding_item(run: str, finding: Finding, shown: int = 4) -> html.Article:
    """What, where, since when, the evidence, what to try."""
    layers: list[Any] = [layer_link(run, layer) for layer in finding.layers[:shown]]
    if len(finding.layers) > shown:
        layers.append(html.Span(f"and {len(finding.layers) - shown} more", className="dim"))
    span = f"step {integer(finding.first_step)}"
    if finding.last_step > finding.first_step:
        span += f" – {integer(finding.last_step)}"
    evidence = [
        html.Span(
            [html.Span(words(key).lower(), className="dim"), " ", html.B(number(value))], className="fact"
        )
        for key, value in finding.evidence.items()
        if not isinstance(value, str) or len(value) <= 24  # longer ones repeat the summary
    ]
    return html.Article(
        [
            html.Div(
                [
                    badge(finding.severity),
                    html.H3(words(finding.problem)),
                    html.Span(span, className="since"),
                ],
                className="finding-head",
            ),
            html.P(finding.summary, className="finding-summary"),
            html.Div(layers, className="finding-layers") if layers else None,
            html.Div(evidence, className="facts") if evidence else None,
            html.P([html.B("Try: "), finding.advice], className="finding-advice") if finding.advice else None,
        ],
        className=f"finding {finding.severity}",
    )


def notice(title: str, text: Any, tone: str = "") -> html.Div:
    """A card that says one thing: nothing here yet, all is well, this went wrong."""
    return html.Div([html.H2(title), html.Div(text)], className=f"card notice {tone}".strip(), role="status")


def code(text: str) -> html.Pre:
    """Lines to copy."""
    return html.Pre(html.Code(text))
