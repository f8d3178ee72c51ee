"""The field in which runs are filtered, in the language of `monitor.fleet.search`, with help and errors."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html

from .components import aria, state_id
from .urls import View

#: A term -> what it finds.
EXAMPLES = {
    "resnet": "a word in the name, model, owner, tags, note, alarms or configuration",
    "health:critical,warning": "one or the other",
    "problem:dead_units": "runs with this alarm",
    "tag:baseline -tag:old": "with the one tag and without the other",
    "owner:ana": "whose it is; owner:none has none",
    "model:ResNet": "a part of the name of the model's class",
    "lr>0.01": "a setting (also optimizer.lr), a scalar, or val, gap, drift, steps, parameters, cost …",
    "optimizer.name=adamw": "a setting that is text",
    "age<7d": "ended, or written last, less than so long ago; also created>2026-11-20, worse<24h",
    "is:live": "also closed, interrupted, copy, new, worse",
}


def field(view: View, narrow: bool) -> html.Div:
    """The text field, what is wrong with its text, and how to write one."""
    text = dmc.TextInput(
        id=state_id("filter"),
        value=view.params.get("filter", ""),
        placeholder="Filter: words, health:critical, tag:baseline, lr>0.01, age<7d …",
        debounce=200,
        size="xs",
        w="100%" if narrow else 420,
        spellCheck=False,
        **aria("filter runs"),
    )
    wrong = html.Div("", id="filter-wrong", className="filter-wrong", role="status")
    return html.Div([html.Div([text, _help()], className="filter-line"), wrong], className="filter-field")


def _help() -> html.Details:
    lines: list[Any] = []
    for term, meaning in EXAMPLES.items():
        lines += [html.Dt(html.Code(term)), html.Dd(meaning)]
    more = html.P('Every term must fit. A comma is an or, "-" in front a not, quotes keep words together.')
    return html.Details(
        [
            html.Summary("?", **aria("How to filter")),
            html.Div([more, html.Dl(lines)], className="menu-items"),
        ],  # pyright: ignore[reportArgumentType]
        className="menu words filter-help",
    )
