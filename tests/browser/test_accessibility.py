"""axe-core finds nothing to complain about, on a wide screen and a phone; in the dark, of contrast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.browser.conftest import stands
from tests.browser.reading import settled, until

PAGES = [
    "/",
    "/run/vanishing/overview",
    "/run/vanishing/gradient-flow",
    "/run/healthy/layer?tensor=0.weight",
    "/run/finetune/drift",
    "/run/healthy/overfitting",
    "/run/healthy/compare?with=vanishing",
    "/run/nested/blow-up/alerts",
    "/problems",
    "/problems/overfitting",
]
CONTRAST = {"runOnly": ["color-contrast"]}  # nothing else differs between the themes
SCREENS = {"wide": (1440, ("light", "dark")), "phone": (390, ("light",))}


def complete(page: Page) -> None:
    """The page is open, its plots are drawn or say why not, nothing is being judged."""
    stands(page)
    page.locator("h1").wait_for()
    until(lambda: page.locator(".badge.checking").count() == 0, "all judgements", 120)
    settled(page)


@pytest.mark.timeout(600)  # axe reads thirty pages
@pytest.mark.parametrize("screen", SCREENS)
def test_no_violation_on_any_page(open_page: Callable[..., Page], screen: str) -> None:
    """And no page is wider than the screen."""
    width, schemes = SCREENS[screen]
    found = []
    page = open_page("/", width=width)
    start = page.url.rstrip("/")
    for path in PAGES:
        page.goto(start + path)
        for scheme in schemes:
            complete(page)
            if page.locator("html").get_attribute("data-mantine-color-scheme") != scheme:
                page.locator("#theme-button").click()
                expect(page.locator("html")).to_have_attribute("data-mantine-color-scheme", scheme)
                complete(page)
            rules = None if scheme == schemes[0] else CONTRAST
            for violation in Axe().run(page, options=rules).response["violations"]:
                for node in violation["nodes"]:
                    summary = " ".join(node["failureSummary"].split())
                    found.append(f"{path} {scheme}: {violation['id']} at {node['target']}: {summary}")
        if wide := page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        ):
            found.append(f"{path}: {wide} pixels too wide")
    assert found == []


def test_the_first_tab_stop_leads_to_the_content(open_page: Callable[..., Page]) -> None:
    page = open_page("/run/healthy/overview")
    complete(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('main').contains(document.activeElement)")
