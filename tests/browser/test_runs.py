"""The table of runs, the findings with their evidence, and the list of alerts, with real clicks and keys."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import serving, stands
from tests.browser.reading import address, layout, settled, traces, until

Open = Callable[..., Page]
SHOWN = """() => [...document.querySelectorAll(".ag-center-cols-container .ag-row")]
  .sort((a, b) => a.getAttribute("row-index") - b.getAttribute("row-index"))
  .map((row) => row.getAttribute("row-id"))"""
RUNS = [f"sweep/{letter}" for letter in "abcdefghij"]


def query(page: Page) -> dict[str, str]:
    """What the address says."""
    return {key: values[0] for key, values in parse_qs(urlparse(address(page)).query).items()}


def names(page: Page) -> list[str]:
    """The runs in the order in which they are shown."""
    return page.evaluate(SHOWN)


def tick(page: Page, run: str) -> None:
    page.locator(f"[row-id='{run}'] .ag-selection-checkbox input").click()


@pytest.fixture(scope="module")
def many(runs_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten copies of a run, with configurations and tags."""
    from layerwatch.monitor.description import write_json

    root = tmp_path_factory.mktemp("many")
    for place, name in enumerate(RUNS):
        shutil.copytree(runs_root / "healthy", root / name)
        info = json.loads((root / name / "run.json").read_text())
        info.pop("checksum")
        info["config"] = {"lr": 10.0 ** -(place % 4), "max_steps": 120, "optimizer": {"name": "sgd"}}
        info["tags"] = ["good"] if place == 3 else []
        write_json(root / name / "run.json", info | {"created": info["created"] - place})
    return root


@pytest.fixture(scope="module")
def sweep(many: Path) -> Iterator[str]:
    """The address of a dashboard over them."""
    with serving(many) as address:
        yield address


@pytest.fixture
def open_sweep(sweep: str, browser: Browser) -> Iterator[Open]:
    contexts, wrong = [], []

    def open_path(path: str) -> Page:
        contexts.append(browser.new_context(viewport={"width": 1440, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.goto(sweep + path)
        stands(page)
        return page

    yield open_path
    for context in contexts:
        context.close()
    assert wrong == []


def test_a_link_restores_sort_filter_columns_and_pins(open_page: Open, server: str) -> None:
    page = open_page("/")
    expect(page.locator(".run-link").first).to_be_visible()
    grid = page.locator("#runs-grid")
    grid.get_by_text("Step", exact=True).click()
    until(lambda: query(page).get("sort") == "step:asc", "the order in the address")
    until(lambda: set(names(page)[:2]) == {"finetune", "nested/blow-up"}, "sorted rows")
    page.locator("[row-id='vanishing'] .star").click()
    until(lambda: names(page)[0] == "vanishing", "the pinned run at the top")
    until(lambda: query(page).get("pins") == "vanishing", "the pin in the address")
    page.locator("summary", has_text="Columns").click()
    page.get_by_label("lr", exact=True).check()
    page.get_by_label("Gap", exact=True).uncheck()
    page.keyboard.press("Escape")
    expect(grid.get_by_text("lr", exact=True)).to_be_visible()
    expect(grid.get_by_text("Gap", exact=True)).to_have_count(0)
    page.get_by_role("textbox", name="filter runs").fill("vanish")
    until(lambda: "healthy" not in names(page), "filtered rows")
    until(lambda: query(page).get("filter") == "vanish", "the filter in the address")
    shown = names(page)
    again = open_page(address(page))
    expect(again.locator(".run-link").first).to_be_visible()
    until(lambda: names(again) == shown, "the same rows in the same order")
    expect(again.locator("#runs-grid").get_by_text("lr", exact=True)).to_be_visible()
    expect(again.locator("#runs-grid").get_by_text("Gap", exact=True)).to_have_count(0)
    expect(again.locator("[row-id='vanishing'] .star")).to_have_attribute("aria-pressed", "true")
    page.goto(f"{server}/")  # the same profile remembers its pins
    until(lambda: query(page).get("pins") == "vanishing", "the remembered pin")


def test_two_to_eight_runs_are_ticked_and_compared(open_sweep: Open) -> None:
    page = open_sweep("/")
    expect(page.locator(".run-link").first).to_be_visible()
    expect(page.locator("[row-id='sweep/d'] .tag")).to_have_text("good")
    expect(page.locator("[row-id='sweep/a'] .progress")).to_have_text("59 of 120")
    link, said = page.locator("#compare-link"), page.locator("#compare-said")
    tick(page, "sweep/c")
    expect(said).to_have_text("Tick one more run to compare.")
    expect(link).to_be_hidden()
    tick(page, "sweep/a")
    tick(page, "sweep/b")
    expect(link).to_have_text("Compare 3 runs")
    assert (link.get_attribute("href") or "").endswith("/run/sweep/c/compare?with=sweep%2Fa,sweep%2Fb")
    for letter in "defgh":
        tick(page, f"sweep/{letter}")
    expect(link).to_have_text("Compare 8 runs")
    tick(page, "sweep/i")
    expect(said).to_contain_text("At most 8 runs")
    expect(link).to_have_text("Compare 8 runs")
    expect(page.locator(".ag-row-selected")).to_have_count(8)
    link.click()
    expect(page.get_by_role("heading", level=1)).to_have_text("sweep/c")
    assert "/run/sweep/c/compare" in address(page)


def test_a_run_that_arrives_is_added_and_ticks_stay(open_sweep: Open, many: Path) -> None:
    page = open_sweep("/")
    expect(page.locator(".run-link").first).to_be_visible()
    tick(page, "sweep/b")
    page.evaluate("document.querySelector(\"[row-id='sweep/b']\").dataset.mark = 'same'")
    shutil.copytree(many / "sweep" / "a", many / "new")
    try:
        expect(page.locator("[row-id='new']")).to_be_visible(timeout=120_000)
        expect(page.locator("#runs-count")).to_have_text("11 runs")
        assert page.locator("[row-id='sweep/b']").get_attribute("data-mark") == "same"
        expect(page.locator(".ag-row-selected")).to_have_count(1)
    finally:
        shutil.rmtree(many / "new")
    expect(page.locator("[row-id='new']")).to_have_count(0, timeout=120_000)


def test_the_table_is_used_with_the_keyboard(open_sweep: Open) -> None:
    page = open_sweep("/")
    expect(page.locator(".run-link").first).to_be_visible()
    page.locator("[row-id='sweep/b'] [col-id='run']").click(position={"x": 150, "y": 20})
    page.keyboard.press("Space")
    expect(page.locator("[row-id='sweep/b']")).to_have_attribute("aria-selected", "true")
    page.keyboard.press("p")
    until(lambda: names(page)[0] == "sweep/b", "the pinned run at the top")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("sweep/b")


def test_a_finding_shows_its_evidence(open_page: Open) -> None:
    page = open_page("/run/vanishing/overview")
    button = page.locator("button[data-finding]").first
    expect(button).to_be_visible(timeout=120_000)
    expect(page.locator("#evidence")).to_be_hidden()
    button.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#evidence")).to_be_visible()
    expect(button).to_have_attribute("aria-pressed", "true")
    problem, layer = button.get_attribute("data-finding"), button.get_attribute("data-tensor")
    until(
        lambda: "range" in query(page) and query(page).get("finding") == problem, "the choice in the address"
    )
    low, high = (float(end) for end in query(page)["range"].split(":"))
    assert query(page).get("tensor", "") == layer
    assert traces(page, "evidence-plot")
    for plot in ("evidence-plot", "loss-plot"):
        until(
            lambda plot=plot: (layout(page, plot, "shapes") or [{}])[0].get("name") == "region",
            "the shaded steps",
        )
    region = layout(page, "evidence-plot", "shapes")[0]
    assert low <= region["x0"] <= high
    until(lambda: layout(page, "evidence-plot", "xaxis.range")[0] == pytest.approx(low, abs=1), "the range")
    expect(page.locator("#evidence-rule")).not_to_be_empty()
    expect(page.locator("#evidence-advice")).not_to_be_empty()
    again = open_page(address(page))
    expect(again.locator("#evidence-rule")).to_have_text(page.locator("#evidence-rule").inner_text())
    assert traces(again, "evidence-plot")[0]["name"] == traces(page, "evidence-plot")[0]["name"]
    again.locator("#evidence-flow").click()
    again.wait_for_url("**/gradient-flow*")
    until(lambda: query(again).get("range") == f"{int(low)}:{int(high)}", "the same steps there")
    page.locator("#evidence-close").click()
    expect(page.locator("#evidence")).to_be_hidden()
    until(lambda: "finding" not in query(page), "nothing chosen in the address")


def test_small_plots_are_pinned_filtered_and_zoomed_together(open_page: Open) -> None:
    page = open_page("/run/healthy/overview")
    before = [trace["name"] for trace in traces(page, "scalars-plot")]
    last = before[-1]
    page.get_by_role("button", name=f"Pin {last}").click()
    until(lambda: traces(page, "scalars-plot")[0]["name"] == last, "the pinned scalar first")
    until(lambda: query(page).get("pins") == last, "the pin in the address")
    expect(page.get_by_role("button", name=f"Unpin {last}")).to_be_focused()
    settled(page, "scalars-plot")
    page.locator("#scalars-plot .nsewdrag").nth(1).scroll_into_view_if_needed()
    box = page.locator("#scalars-plot .nsewdrag").nth(1).bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 42, steps=5)
    page.mouse.up()
    until(lambda: "range" in query(page), "the steps in the address")
    low = float(query(page)["range"].split(":")[0])
    for plot in ("loss-plot", "scalars-plot"):
        until(
            lambda plot=plot: layout(page, plot, "xaxis.range")[0] == pytest.approx(low, abs=1),
            f"{plot} follows",
        )


def test_an_alert_leads_to_its_evidence_and_the_list_is_searched(open_page: Open) -> None:
    page = open_page("/run/vanishing/alerts")
    alarm = page.locator(".happening.critical, .happening.warning").first
    expect(alarm).to_be_visible(timeout=120_000)
    assert traces(page, "timeline-plot")
    page.get_by_role("textbox", name="search the list").fill("process")
    expect(page.locator(".happening")).to_have_count(1)
    until(lambda: query(page).get("filter") == "process", "the search in the address")
    page.get_by_role("textbox", name="search the list").fill("")
    expect(alarm).to_be_visible()
    alarm.get_by_role("link", name="Evidence").click()
    expect(page.locator("#evidence")).to_be_visible()
    assert traces(page, "evidence-plot")


def test_patience_changes_the_sentence_and_the_address(open_page: Open) -> None:
    page = open_page("/run/healthy/overfitting?patience=2")
    expect(page.locator("#stop-said")).to_contain_text("Patience 2")
    page.get_by_role("textbox", name="patience, in validations").fill("5")
    expect(page.locator("#stop-said")).to_contain_text("Patience 5")
    until(lambda: query(page).get("patience") == "5", "the patience in the address")
