"""axe-core finds nothing to complain about on any page, contrast included, in both themes and on a phone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

from tests.browser.reading import until

PAGES = [
    "/",
    "/run/vanishing/overview",
    "/run/vanishing/gradient-flow",
    "/run/healthy/layer?tensor=0.weight",
    "/run/finetune/drift",
    "/run/healthy/overfitting",
    "/run/healthy/compare?with=vanishing",
    "/run/nested/blow-up/alerts",
]
SCREENS = {"light": ("light", 1440), "dark": ("dark", 1440), "phone": ("light", 390)}


def settled(page: Page) -> None:
    """The page is open, its plots are drawn or say why not, nothing is being judged."""
    page.locator("h1").wait_for()
    until(lambda: page.locator(".plot-frame.waiting:visible").count() == 0, "all plots", 60)
    until(lambda: page.locator(".badge.checking").count() == 0, "all judgements", 60)
    page.wait_for_timeout(300)  # fades


@pytest.mark.parametrize("screen", SCREENS)
def test_no_violation_on_any_page(open_page: Callable[..., Page], screen: str) -> None:
    scheme, width = SCREENS[screen]
    found = []
    page = open_page("/", width=width, scheme=scheme)
    for path in PAGES:
        page.goto(page.url.split("/", 3)[0] + "//" + page.url.split("/", 3)[2] + path)
        settled(page)
        for violation in Axe().run(page).response["violations"]:
            for node in violation["nodes"]:
                summary = " ".join(node["failureSummary"].split())
                found.append(f"{path}: {violation['id']} at {node['target']}: {summary}")
    assert found == []


def test_the_first_tab_stop_leads_to_the_content(open_page: Callable[..., Page]) -> None:
    page = open_page("/run/healthy/overview")
    settled(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('main').contains(document.activeElement)")
