"""What a problem is: its page of docs/problems, and the list of all of them."""

from __future__ import annotations

from typing import Any

from dash import Dash, dcc, html

from ...monitor import RunError
from ...monitor.problems import Problem, closest, problems
from ..figures.theme import Style
from ..plots import Plot
from ..queries import Library
from ..urls import View, problem_href

PLOTS: tuple[Plot, ...] = ()


def about(view: View) -> Problem | None:
    """The page that an address asks for; None: the list."""
    code = view.params.get("code", "")
    if code and code not in problems():
        near = closest(code)
        meant = f" Did you mean {near}?" if near else ""
        raise RunError(f"There is no problem called {code}.{meant} All of them: {problem_href()}")
    return problems()[code] if code else None


def layout(view: View, _library: Library, _style: Style) -> list[Any]:
    """One page as written, or every title with its rule."""
    page = about(view)
    return [_page(page)] if page else [_list()]


def _page(page: Problem) -> html.Article:
    """The pages are our own files. HTML in them would be shown as text all the same."""
    text = dcc.Markdown(page.markdown(problem_href() + "/{}"), className="prose")
    back = html.P(html.A("All problems", href=problem_href()), className="dim")
    return html.Article([text, back], className="card about")


def _list() -> html.Section:
    rows = []
    for code, page in problems().items():
        link = html.A(page.title, href=problem_href(code))
        rows += [html.Dt([link, html.Code(code)]), html.Dd(page.rule)]
    lead = "What the detectors look for. Each page: how it shows, the rule with its sources, what to do."
    return html.Section(
        [html.P(lead, className="dim"), html.Dl(rows, className="problems")], className="card"
    )


def register(_app: Dash, _library: Library) -> None:
    """Nothing here changes while it is looked at."""
