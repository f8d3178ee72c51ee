"""Pages about problems: at their addresses, linked from findings, safe, the only source of their texts."""

from __future__ import annotations

import re
from typing import Any

import pytest
from dash import dcc, html

from layerwatch.dashboard.app import create_app
from layerwatch.dashboard.pages import evidence as panel
from layerwatch.dashboard.pages import problems as page
from layerwatch.dashboard.queries import Library
from layerwatch.dashboard.rules import RULES
from layerwatch.dashboard.shell import open_page
from layerwatch.dashboard.urls import View, parse, problem_href
from layerwatch.monitor.detectors.history import History
from layerwatch.monitor.problems import Problem, problems
from tests.dashboard.test_pages import text


def parts(body: Any) -> list[Any]:
    return [item for part in body if part is not None for item in (part, *part._traverse())]


def links(body: Any) -> list[str]:
    return [getattr(p, "href", "") for p in parts(body) if isinstance(p, html.A)]


def markdown(body: Any) -> str:
    """The text of the only Markdown, which must not let HTML through."""
    (shown,) = [p for p in parts(body) if isinstance(p, dcc.Markdown)]
    assert not getattr(shown, "dangerously_allow_html", False)
    return str(getattr(shown, "children", ""))


@pytest.mark.parametrize(
    ("path", "view"),
    [
        ("/problems", View("problems")),
        ("/problems/dead_units", View("problems", "", {"code": "dead_units"})),
        ("/problems/a/b", View("missing", "/problems/a/b")),
        ("/run/problems/overview", View("overview", "problems")),
    ],
)
def test_an_address_opens_a_page(path: str, view: View) -> None:
    assert parse(path) == view


@pytest.mark.parametrize("code", problems())
def test_the_page_of_a_problem_shows_the_text_and_links_in_place(library: Library, code: str) -> None:
    about = problems()[code]
    nav, title, body = open_page(library, View("problems", "", {"code": code}), {})
    assert about.title in text(title)
    assert "nav-link nav-problems active" in [getattr(p, "className", "") for p in parts(nav)]
    shown = markdown(body)
    assert about.rule in shown
    assert all(f"## {section}" in shown for section in about.sections)
    assert ".md)" not in shown  # links lead to pages of ours, or are words
    for related in about.related:
        assert f"({problem_href(related)})" in shown


def test_html_in_a_page_would_be_shown_as_text(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own pages hold none; a changed one would still run nothing."""
    bad = Problem("bad", "Bad", "<script>alert(1)</script>", {"What it is": '<img src=x onerror="alert(1)">'})
    monkeypatch.setattr(page, "problems", lambda: {"bad": bad})
    (article,) = page.layout(View("problems", "", {"code": "bad"}), library, None)  # pyright: ignore[reportArgumentType]
    assert "<script>" in markdown([article])  # as a text for the Markdown of the browser, which escapes HTML


def test_the_list_names_every_problem_with_its_rule(library: Library) -> None:
    _, title, body = open_page(library, View("problems"), {})
    assert "Problems" in text(title)
    assert links(body) == [problem_href(code) for code in problems()]
    assert all(about.rule in text(body) and about.title in text(body) for about in problems().values())


def test_an_unknown_problem_names_the_closest(library: Library) -> None:
    _, title, body = open_page(library, View("problems", "", {"code": "vanishing"}), {})
    assert "cannot be shown" in text(title)
    assert "Did you mean vanishing_gradients?" in text(body)


def test_a_finding_leads_to_its_page(library: Library) -> None:
    judged = library.judgement("vanishing", wait=150)
    assert judged is not None
    problem = judged.alarms[0].problem
    assert problem_href(problem) in links(panel.finding_list("vanishing", judged, 59))
    said = panel.words_of(library, "vanishing", problem)
    assert (said["rule"], said["about"]) == (problems()[problem].rule, problem_href(problem))
    own = History(library.run("vanishing")).finding("my_own", "warning", "Mine.", first=0)
    assert not [link for link in links([panel.finding_item("vanishing", own, 59)]) if "problems" in link]


def test_every_code_with_a_plot_has_its_words_on_a_page() -> None:
    assert set(RULES) <= set(problems())


@pytest.mark.parametrize(("path", "status"), [("/problems", 200), ("/problems/dead_units", 200)])
@pytest.mark.parametrize("prefix", ["", "/x/"])
def test_the_server_answers_at_these_addresses(library: Library, path: str, status: int, prefix: str) -> None:
    client = create_app(library.root, prefix=prefix).server.test_client()
    answer = client.get(prefix.rstrip("/") + path, headers={"Host": "127.0.0.1"})
    assert answer.status_code == status
    assert re.search(r"<title>.*layerwatch.*</title>", answer.text)
