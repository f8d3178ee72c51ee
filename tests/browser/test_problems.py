"""Pages about problems: from a finding to its page, on to related ones, and back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from layerwatch.monitor.problems import SECTIONS, problems
from tests.browser.reading import address

Open = Callable[..., Page]


def test_a_finding_leads_to_its_page_in_place_and_back(open_page: Open) -> None:
    page = open_page("/run/vanishing/overview")
    head = page.locator("button[data-finding]").first
    expect(head).to_be_visible(timeout=120_000)
    problem = head.get_attribute("data-finding")
    assert problem
    page.evaluate("window.here = true")  # gone after a load
    page.locator(".finding").first.get_by_role("link", name="About this problem").click()
    expect(page.locator("h1")).to_have_text(problems()[problem].title)
    assert address(page).endswith(f"/problems/{problem}")
    headings = page.locator(".prose h2")
    expect(headings.first).to_be_visible()
    assert headings.all_inner_texts() == list(SECTIONS)
    related = problems()[problem].related[0]
    page.locator(".prose").get_by_role("link", name=related, exact=True).first.click()
    expect(page.locator("h1")).to_have_text(problems()[related].title)
    page.get_by_role("link", name="All problems").click()
    expect(page.locator(".problems dt")).to_have_count(len(problems()))
    assert page.evaluate("window.here")
    page.go_back()
    page.go_back()
    expect(page.locator("h1")).to_have_text(problems()[problem].title)


@pytest.mark.parametrize("width", [390, 1440])
def test_the_longest_page_fits_and_lists_are_lists(open_page: Open, width: int) -> None:
    page = open_page("/problems/exploding_gradients", width=width)
    expect(page.locator(".prose ol").first.locator("li")).to_have_count(3)
    expect(page.locator(".prose table tbody tr").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#theme-button").click()  # a page without controls: nothing to draw again, and no error
    expect(page.locator("html")).to_have_attribute("data-mantine-color-scheme", "dark")


def test_an_unknown_problem_says_so(open_page: Open) -> None:
    page = open_page("/problems/%3Cscript%3Ealert(1)%3C%2Fscript%3E")
    expect(page.get_by_text("This page cannot be shown").first).to_be_visible()
    assert page.locator("#body script").count() == 0
