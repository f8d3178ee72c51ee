"""The Fleet page in a browser: a click narrows everything, the address says so, a run is a click away."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from layerwatch.monitor.fleet import TABLE, ScanTable, scan, write_table
from tests.browser.conftest import serving, stands
from tests.browser.reading import address, settled, until

RUNS = ("healthy", "vanishing", "nested/blow-up", "finetune")


@pytest.fixture(scope="module")
def lab(runs_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a dashboard over scanned runs, one of which got worse."""
    root = tmp_path_factory.mktemp("lab")
    for name in RUNS:  # other tests of the same process put theirs beside these
        shutil.copytree(runs_root / name, root / name)
    table = scan(root)
    owners = {"healthy": "ana", "finetune": "ana"}
    for row in table.rows:
        row.update(owner=owners.get(row["run"], "bo"), tags=["base"] if row["run"] == "finetune" else [])
        if row["run"] == "vanishing":
            row.update(health_before="healthy", worse=table.scanned, note="kept for the talk")
        for finding in row["findings"]:
            finding["noticed"] = table.scanned - 90 * 86400
    write_table(ScanTable(table.root, table.rows, table.scanned, table.scanned - 3600), root / TABLE)
    with serving(root) as address:
        yield address


@pytest.fixture
def open_lab(lab: str, browser: Browser) -> Iterator[Callable[..., Page]]:
    contexts, wrong = [], []

    def open_path(path: str, width: int = 1440) -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("request", lambda asked: None if asked.url.startswith(lab) else wrong.append(asked.url))
        page.goto(lab + path)
        stands(page)
        return page

    yield open_path
    for context in contexts:
        context.close()
    assert [text for text in wrong if not text.startswith(("data:", "blob:"))] == []


def accessible(page: Page) -> None:
    """axe has nothing to say, and the page is as wide as the screen."""
    settled(page)
    found = Axe().run(page).response["violations"]
    assert [(v["id"], [node["target"] for node in v["nodes"]]) for v in found] == []
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def test_a_click_narrows_the_page_and_its_address(open_lab: Callable[..., Page]) -> None:
    page = open_lab("/fleet")
    rows = page.locator(".fleet-table tbody tr")
    expect(rows).to_have_count(4)
    expect(page.locator("#fleet-scan")).to_contain_text("compared with the scan of 1 h ago")
    expect(page.locator("#fleet-news .run-link")).to_have_text(["vanishing"])
    expect(page.locator("#fleet-news")).to_contain_text("was healthy")
    accessible(page)
    ana = page.locator("#fleet-owner .fleet-count", has_text="ana")
    ana.focus()
    page.keyboard.press("Enter")
    expect(rows).to_have_count(2)
    expect(page.get_by_role("textbox", name="filter runs")).to_have_value("owner:ana")
    until(lambda: "filter=owner:ana" in address(page), "the filter in the address")
    expect(page.locator("#fleet-owner .chosen")).to_be_focused()
    page.get_by_role("textbox", name="filter runs").fill("owner:ana taag:base")
    expect(page.locator("#filter-wrong")).to_contain_text("did you mean tag?")
    expect(rows).to_have_count(2)  # what was there stays
    page.get_by_role("textbox", name="filter runs").fill("owner:ana tag:base lr>0.01")
    expect(rows).to_have_count(1)
    expect(page.locator("#filter-wrong")).to_be_empty()
    page.locator("button[data-sort=steps]").click()
    until(lambda: "sort=steps" in address(page), "the order in the address")
    again = open_lab(address(page).partition("/fleet")[1] + address(page).partition("/fleet")[2], width=390)
    expect(again.locator(".fleet-table .run-link")).to_have_text(["finetune"])
    expect(again.locator("#fleet-owner .chosen")).to_have_count(1)
    accessible(again)
    page.locator(".fleet-table .run-link").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("finetune")


def test_the_table_of_runs_speaks_the_same_language(open_lab: Callable[..., Page]) -> None:
    page = open_lab("/?filter=health:critical,warning")
    expect(page.locator("#runs-count")).to_contain_text("of 4 runs")
    expect(page.locator("[row-id='vanishing'] .fleet-note")).to_have_text("kept for the talk")
    expect(page.locator("[row-id='vanishing'] [col-id='owner']")).to_have_text("bo")
    field = page.get_by_role("textbox", name="filter runs")
    field.fill("owner:ana -tag:base")
    expect(page.locator(".run-link")).to_have_text(["healthy"])
    field.fill("lr>fast")
    expect(page.locator("#filter-wrong")).to_have_text("expected a number after lr>, got fast")
    expect(page.locator(".run-link")).to_have_text(["healthy"])
    accessible(page)
    field.fill("")
    expect(page.locator("#runs-count")).to_have_text("4 runs")
