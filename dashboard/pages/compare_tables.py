"""The tables of the Compare page: settings that differ, how scalars ended; every run in its colour."""

from __future__ import annotations

from typing import Any

from dash import dcc, html

from ...monitor.comparing import differences, settings
from ...monitor.results import Ending, direction, ending
from ..queries import Library
from ..text import integer, number
from ..urls import href
from .compare_facts import scalar_names

LONG = 12  # rows: above so many a field to search them
Filled = tuple[Any, str, str]  # the table, a note, the class of its search field


def legend(names: list[str]) -> list[Any]:
    """The runs with their colours, each a link."""
    return [
        html.A(
            [_dot(place), html.Span(name, dir="auto")], href=href("overview", name), className="compare-run"
        )
        for place, name in enumerate(names)
    ]


def _dot(place: int) -> html.Span:
    return html.Span(className=f"run-dot run-{place + 1}")


def table_card(name: str, title: str) -> html.Section:
    """A card whose table is filled later; assets/compare.js searches it."""
    words = [html.H2(title), html.P(id=f"compare-{name}-note", className="explain")]
    search = dcc.Input(
        id=f"compare-{name}-search",
        type="search",
        placeholder=f"search {title.lower()}",
        className="table-search hidden",
    )
    head = html.Div([html.Div(words, className="card-title"), search], className="card-head")
    return html.Section(
        [head, html.Div(id=f"compare-{name}", className="scroll compare-table")], className="card"
    )


def settings_table(library: Library, names: list[str]) -> Filled:
    """What differs; cells that differ from the first run's stand out."""
    rows, same = differences([settings(library.run(name)) for name in names])
    note = f"Only what differs; {integer(same)} settings are the same in all."
    if not rows:
        return html.P("No difference.", className="dim"), note, _search(0)
    body = [
        html.Tr(
            [
                html.Th(key, scope="row"),
                *[
                    html.Td(text, className="changed" if text != texts[0] else "", dir="auto")
                    for text in texts
                ],
            ]
        )
        for key, *texts in rows
    ]
    return _table(names, body), note, _search(len(rows))


def values_table(library: Library, names: list[str]) -> Filled:
    """The last value of every scalar, and the best one where it is known what that means."""
    scalars = scalar_names(library, names)
    if not scalars:
        return html.P("None of these runs has logged a scalar.", className="dim"), "", _search(0)
    body = []
    for scalar in scalars:
        ends = [ending(library.run(name), scalar) for name in names]
        won = best_of(scalar, ends)
        cells = [
            html.Td(_cell(end), className="won" if place in won else "") for place, end in enumerate(ends)
        ]
        body.append(html.Tr([html.Th(scalar, scope="row"), *cells]))
    note = "The last value, and the best one with its step; green: the best of these runs."
    return _table(names, body), note, _search(len(scalars))


def best_of(scalar: str, ends: list[Ending]) -> list[int]:
    """The places of the runs that did best; none when all did alike or nobody knows what is better."""
    sign = direction(scalar)
    known = {place: sign * end.best for place, end in enumerate(ends) if end.best is not None}
    if not sign or len(set(known.values())) < 2:
        return []
    return [place for place, value in known.items() if value == max(known.values())]


def _cell(end: Ending) -> list[Any]:
    best = [html.Small(f"{number(end.best)} at {integer(end.step)}")] if end.best is not None else []
    return [html.Span(number(end.last)), *best]


def _search(rows: int) -> str:
    return "table-search" if rows > LONG else "table-search hidden"


def _table(names: list[str], body: list[Any]) -> html.Table:
    heads = [
        html.Th(html.Span([_dot(place), html.Span(name, dir="auto")], className="run-head"), scope="col")
        for place, name in enumerate(names)
    ]
    return html.Table([html.Thead(html.Tr([html.Td(), *heads])), html.Tbody(body)], className="table")
