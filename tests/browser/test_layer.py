"""The Layer and Compare pages by real clicks and keys: the tree, two steps, ridges, several runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from playwright.sync_api import Page, expect
from torch import nn

from layerwatch.dashboard.figures.cells import values_of
from tests.browser.conftest import serving
from tests.browser.reading import address, layout, settled, traces, until
from tests.dashboard.made_runs import HOSTILE, LAYERS, NASTY, PARTS_AT, write_run, write_runs
from tests.dashboard.tiny import mlp, train

Open = Callable[..., Page]
SELECTED = "#layer-rows [aria-selected=true]"
TOPS = "[...document.querySelectorAll('.plot-frame')].map(one => Math.round(one.getBoundingClientRect().top))"
DEEP = tuple(f"encoder.layer.{i}.{part}.weight" for i in range(24) for part in ("query", "key", "dense"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_runs(tmp_path_factory.mktemp("made"))
    write_run(folder, "deep", layers=DEEP)
    torch.manual_seed(0)
    train(folder / "vanishing", mlp(nn.Sigmoid, 10), 0.05, 60)
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[str]:
    with serving(root) as address:
        yield address


def chosen(page: Page) -> str:
    return page.get_by_role("textbox", name="layer", exact=True).input_value()


def go(page: Page, path: str) -> None:
    """Open another page in place, as a link does: no scripts are loaded again, no request is cut off."""
    page.evaluate("path => window.layerwatch.go(path)", path)


def test_the_tree_by_mouse_and_by_keyboard_and_nothing_moves(open_page: Open) -> None:
    page = open_page(f"/run/deep/layer?tensor={DEEP[0]}")
    rows = page.get_by_role("treeitem")
    expect(page.get_by_role("tree", name="Layers")).to_be_visible()
    expect(page.locator(SELECTED)).to_have_text("query.weight")
    expect(rows).to_have_count(1 + 24 + 3)  # encoder.layer, its blocks, and the block of the chosen one
    rows.get_by_text("7", exact=True).click()
    page.locator("[aria-level='3']").get_by_text("dense.weight").nth(1).click()
    until(lambda: chosen(page) == "encoder.layer.7.dense.weight", "the layer of the click")
    until(lambda: "tensor=encoder.layer.7.dense.weight" in address(page), "the layer in the address")
    expect(page.locator("#layer-name")).to_have_text("encoder.layer.7.dense.weight")
    for key in ("ArrowUp", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    until(lambda: chosen(page) == "encoder.layer.7.query.weight", "the layer of the Enter key")
    page.keyboard.press("ArrowLeft")  # to the block
    page.keyboard.press("ArrowLeft")  # closes it
    expect(rows).to_have_count(1 + 24 + 3)
    expect(page.locator("[aria-level='2'][aria-expanded=true]")).to_have_count(1)
    page.keyboard.press("j")
    until(lambda: chosen(page) == "encoder.layer.7.key.weight", "the next layer")
    expect(page.locator(SELECTED)).to_have_text("key.weight")
    expect(rows).to_have_count(1 + 24 + 6)
    page.keyboard.press("k")
    until(lambda: chosen(page) == "encoder.layer.7.query.weight", "the layer before")
    assert page.evaluate("scrollY") == 0
    page.locator("#history-plot").scroll_into_view_if_needed()
    settled(page, "history-plot")
    before = page.evaluate(TOPS)
    page.keyboard.press("j")  # moves nothing
    expect(page.locator("#layer-name")).to_have_text("encoder.layer.7.key.weight")
    settled(page, "history-plot")
    assert page.evaluate(TOPS) == before


def test_the_tree_marks_layers_and_names_the_finding(open_page: Open) -> None:
    page = open_page("/run/vanishing/layer")
    marked = page.locator(".tree-row:has(.tree-mark.critical)")
    expect(marked.first).to_be_visible(timeout=120_000)
    expect(page.locator(SELECTED)).to_contain_text("critical finding")
    line = page.locator(".finding-line").first
    expect(line.locator(".finding")).to_be_hidden()
    line.locator("summary").click()
    expect(line.locator(".finding-advice")).to_be_visible()


def test_two_steps_by_clicks_and_by_typing_and_ridges(open_page: Open) -> None:
    page = open_page(f"/run/base/layer?tensor={LAYERS[0]}")
    names = lambda: [trace["name"] for trace in traces(page, "steps-plot")]  # noqa: E731
    assert names() == ["step 0", "step 190"]
    settled(page, "histogram-weight", "steps-plot")
    drag = page.locator("#histogram-weight .nsewdrag").first
    box = drag.bounding_box()
    assert box
    page.mouse.click(box["x"] + 0.3 * box["width"], box["y"] + box["height"] / 2)
    until(lambda: names()[1] != "step 190", "the first pick")
    picked = names()[1]
    assert names()[0] == "step 0"
    settled(page, "histogram-weight")
    page.mouse.click(box["x"] + 0.7 * box["width"], box["y"] + box["height"] / 2)
    until(lambda: names()[0] == picked and names()[1] not in ("step 190", picked), "both picks")
    until(lambda: "first=" in address(page) and "second=" in address(page), "the picks in the address")
    page.get_by_role("textbox", name="first step").fill("55")
    until(lambda: names()[0] == "step 50", "the typed step")
    page.get_by_text("Log", exact=True).first.click()
    until(lambda: layout(page, "steps-plot", "xaxis.ticktext"), "powers of ten")
    shares = values_of(traces(page, "histogram-weight")[0])
    np.testing.assert_allclose(shares.sum(axis=0), 1, atol=0.01)
    page.get_by_text("Ridges", exact=True).click()
    until(lambda: len(traces(page, "histogram-weight")) > 1, "ridges")
    ridges = [
        trace for trace in traces(page, "histogram-weight") if not (trace.get("meta") or {}).get("skip")
    ]
    assert [ridges[0]["name"], ridges[-1]["name"]] == ["step 0", "step 190"]
    assert layout(page, "histogram-weight", "xaxis.fixedrange")  # a drag there is none over steps


def test_three_runs_of_an_address_where_two_part_and_what_cannot_be_compared(open_page: Open) -> None:
    page = open_page(f"/run/base/compare?with=twin,{quote(HOSTILE)}")
    shown = traces(page, "compare-plot")
    assert [trace["meta"]["run"] for trace in shown] == ["base", "twin", HOSTILE]
    parting = page.locator("#compare-parting")
    expect(parting).to_contain_text(f"identical until step 120. They part at step {PARTS_AT}, in {LAYERS[1]}")
    np.testing.assert_allclose(values_of(traces(page, "compare-gradient")[0])[1, -1], -np.log10(3), atol=2e-3)
    expect(page.get_by_role("row", name="config.lr 0.1 0.2 –")).to_be_visible()
    page.get_by_role("textbox", name="B", exact=True).click()
    page.get_by_role("option", name=HOSTILE).click()
    expect(parting).to_contain_text("are identical: every weight norm")
    until(lambda: "two=" in address(page), "B in the address")
    page.get_by_text("All", exact=True).click()
    expect(page.locator("#compare-plot")).to_be_hidden()
    assert len(traces(page, "compare-scalars")) == 6
    assert len(traces(page, "compare-histogram")) == 3
    go(page, "/run/base/compare?with=other,gone")
    expect(page.get_by_text("There is no run named gone")).to_be_visible()
    expect(page.locator("#compare-parting")).to_contain_text("cannot be said")
    expect(page.locator("#compare-gradient-frame .plot-said")).to_contain_text("no layer of one name")


def test_names_that_bite_are_shown_as_text(open_page: Open) -> None:
    page = open_page(f"/run/{quote(HOSTILE)}/layer?tensor={quote(NASTY)}")
    expect(page.locator("#layer-name")).to_have_text(NASTY)
    expect(page.locator(SELECTED)).to_contain_text(NASTY)
    traces(page, "history-plot")
    go(page, f"/run/{quote(HOSTILE)}/compare?with=other")
    traces(page, "compare-gradient")
    traces(page, "compare-histogram")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x]").count() == 0


def test_on_a_phone_the_tree_is_a_drawer_and_nothing_is_cut(open_page: Open) -> None:
    page = open_page(f"/run/deep/layer?tensor={DEEP[0]}", width=390)
    traces(page, "history-plot")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(page.get_by_role("tree", name="Layers")).to_be_hidden()
    page.locator(".tree-drawer > summary").click()
    expect(page.get_by_role("tree", name="Layers")).to_be_visible()
    go(page, "/run/base/compare?with=twin,other,shifted")
    traces(page, "compare-gradient")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
