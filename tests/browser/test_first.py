"""What is on screen before Dash has started: the same rows, links that lead on, and then it is gone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from layerwatch.monitor.fleet import TABLE, scan, write_table
from tests.browser.conftest import serving, stands
from tests.browser.reading import traces, until
from tests.dashboard.tiny import write_runs

#: Opens a page and keeps Dash from its layout until the second result is called.
Held = Callable[..., tuple[Page, Callable[[], None]]]
#: Text of the table's head, and of its rows without the ages, which grow.
HEADS = "(heads) => heads.map((head) => head.innerText.trim()).filter(Boolean)"
GRID_HEADS = ".ag-header-cell-text:not(.unseen-head *)"
RUNS = "(links) => links.map((link) => link.innerText)"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = write_runs(tmp_path_factory.mktemp("first"))
    write_table(scan(root), root / TABLE)
    with serving(root) as address:
        yield address


@pytest.fixture
def held(lab: str, browser: Browser) -> Iterator[Held]:
    contexts, wrong = [], []

    def open_path(path: str, width: int = 1440) -> tuple[Page, Callable[[], None]]:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        for name, value in (("layerwatch_theme", "light"), ("layerwatch_narrow", str(int(width < 700)))):
            contexts[-1].add_cookies([{"name": name, "value": value, "url": lab}])
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        waiting: list[Route] = []
        on = [True]
        page.route("**/_dash-layout", lambda route: waiting.append(route) if on else route.continue_())
        page.goto(lab + path)

        def go_on() -> None:
            on.clear()
            until(lambda: [page.wait_for_timeout(50), waiting][1], "the request for the layout")
            for route in waiting:
                route.continue_()
            stands(page)

        return page, go_on

    yield open_path
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.mark.parametrize("width", [1440, 390])
def test_the_table_of_runs_is_there_and_becomes_the_grid(held: Held, width: int) -> None:
    page, go_on = held("/", width)
    expect(page.locator("#first .first-table .run-link").first).to_be_visible()
    heads = page.locator("#first .first-table th").evaluate_all(HEADS)
    runs = page.locator("#first .first-table .run-link").evaluate_all(RUNS)
    health = page.locator("#first .first-table tr", has_text="vanishing").locator(".badge").inner_text()
    assert len(runs) == 4
    go_on()
    expect(page.locator(".first-table")).to_have_count(0)
    head, links = (page.locator(f"#runs-grid {cells}") for cells in (GRID_HEADS, ".run-link"))
    until(lambda: head.evaluate_all(HEADS) == heads, "the same columns")
    until(lambda: links.evaluate_all(RUNS) == runs, "the same runs")
    expect(page.locator("#runs-grid [row-id='vanishing'] .badge").first).to_have_text(health)


def test_the_fleet_is_there_and_stays_what_it_was(held: Held) -> None:
    page, go_on = held("/fleet?filter=health:critical,warning")
    rows = page.locator("#first .fleet-table tbody tr")
    expect(rows.first).to_be_visible()
    runs = page.locator("#first .fleet-table .run-link").evaluate_all(RUNS)
    tiles = page.locator("#first .fleet-tile").evaluate_all(RUNS)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    go_on()
    assert page.locator(".fleet-table .run-link").evaluate_all(RUNS) == runs
    assert page.locator(".fleet-tile").evaluate_all(RUNS) == tiles
    expect(page.get_by_role("textbox", name="filter runs")).to_have_value("health:critical,warning")


def test_a_link_leads_on_before_dash_is_there(held: Held) -> None:
    page, _ = held("/fleet")
    page.locator("#first #fleet-problem .fleet-count").first.click()
    page.wait_for_url(re.compile(r"/fleet\?filter=problem"))
    link = page.locator("#first .fleet-table .run-link").first
    run = link.inner_text()
    link.click()
    page.wait_for_url(f"**/run/{run}/overview")


def test_pinned_runs_are_on_top_at_once(held: Held) -> None:
    page, go_on = held("/")
    go_on()
    links = page.locator("#runs-grid .run-link")
    expect(links).to_have_count(4)
    last = links.evaluate_all(RUNS)[-1]
    page.evaluate("(run) => localStorage.setItem('layerwatch_pins', encodeURIComponent(run))", last)
    page.route("**/_dash-layout", lambda route: None)
    page.goto(page.url.partition("?")[0])
    assert page.locator("#first .first-table .run-link").evaluate_all(RUNS)[0] == last


def test_without_scripts_the_page_is_still_there(lab: str, browser: Browser) -> None:
    """Navigation and facts; the rows are drawn by a script."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(lab + "/")
    expect(page.get_by_role("heading", level=1)).to_have_text("Runs")
    context.close()


def test_what_is_loaded_early_is_used_also_when_the_layout_is_late(held: Held) -> None:
    """Else the browser warns."""
    page, go_on = held("/run/healthy/overview")
    until(lambda: page.evaluate("!!window.Plotly"), "the library of plots")
    go_on()
    assert traces(page, "loss-plot")


def test_nobody_waits_for_rows_that_do_not_come(held: Held) -> None:
    page, go_on = held("/?filter=owner:nobody")
    expect(page.locator("#first h1")).to_have_text("Runs")
    assert page.locator("#first .run-link").count() == 0
    go_on()
    expect(page.locator("#runs-grid")).to_contain_text("No run fits the filter.")


def test_where_the_rows_cannot_be_drawn_the_page_comes_all_the_same(lab: str, browser: Browser) -> None:
    """A browser that keeps nothing for us, for one."""
    context = browser.new_context()
    context.add_init_script("Storage.prototype.getItem = () => { throw new Error('not allowed'); }")
    page = context.new_page()
    page.goto(lab + "/")
    stands(page)
    expect(page.locator("h1")).to_have_text("Runs")
    context.close()
