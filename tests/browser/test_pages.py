"""Each page in a real browser: it opens, and its plots hold the numbers of the run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from layerwatch import Run
from layerwatch.dashboard.figures.cells import values_of
from layerwatch.dashboard.urls import RUN_PAGES
from tests.browser.reading import address, layout, settled, traces, until

Open = Callable[..., Page]
PLOTS = {
    "overview": ["loss-plot", "scalars-plot"],
    "gradient-flow": ["flow-map"],
    "layer": [
        "histogram-weight",
        "histogram-gradient",
        "histogram-update",
        "quantile-plot",
        "bias-plot",
        "history-plot",
    ],
    "drift": ["drift-map"],
    "overfitting": ["overfitting-plot"],
    "compare": ["compare-plot"],
    "alerts": [],
}


def test_the_navigation_leads_through_all_pages(open_page: Open) -> None:
    page = open_page("/")
    page.get_by_role("link", name="healthy", exact=True).click()
    for slug, word in RUN_PAGES.items():
        page.get_by_role("link", name=word, exact=True).click()
        page.wait_for_url(f"**/run/healthy/{slug}*")
        expect(page.locator(".nav-link.active")).to_have_text(word)
        expect(page.get_by_role("heading", level=1)).to_have_text("healthy")
        for name in PLOTS[slug]:
            assert traces(page, name), f"{name} is empty"
    page.go_back()
    expect(page.locator(".nav-link.active")).to_have_text("Compare")
    expect(page.locator("#compare-plot")).to_be_visible()


def test_navigation_comes_first_in_the_page(open_page: Open) -> None:
    page = open_page("/run/healthy/overview")
    expect(page.locator("#nav a").first).to_be_visible()
    words = page.evaluate(
        "[...document.querySelectorAll('a, button, h1')].slice(0, 10).map(e => e.textContent)"
    )
    assert [word for word in words if word in RUN_PAGES.values()] == list(RUN_PAGES.values())


def test_the_runs_page_lists_every_run(open_page: Open) -> None:
    page = open_page("/")
    for name in ("healthy", "vanishing", "nested/blow-up", "finetune"):
        expect(page.get_by_role("link", name=name, exact=True)).to_be_visible()
    expect(page.locator(".badge.checking")).to_have_count(0, timeout=120_000)
    row = page.locator("[row-id='nested/blow-up']")
    expect(row.locator(".badge").first).to_have_text("critical")
    page.locator("#runs-grid").get_by_text("Step", exact=True).click()
    until(
        lambda: (
            page.locator(".ag-row[row-index='0'] .run-link").inner_text() in ("finetune", "nested/blow-up")
        ),
        "sorted rows",
    )


def test_losses_on_screen_are_those_of_the_log(open_page: Open, healthy: Run) -> None:
    page = open_page("/run/healthy/overview")
    drawn = {trace["name"]: trace for trace in traces(page, "loss-plot")}
    for name, scalar in (("train", "train_loss"), ("validation", "val_loss")):
        frame = healthy.scalars(scalar)
        assert drawn[name]["x"] == frame["step"].tolist()
        np.testing.assert_allclose(drawn[name]["y"], frame["value"], rtol=1e-6)
    expect(page.locator(".kpi-value").first).to_have_text("60")


def test_gradient_norms_on_screen_are_those_of_the_log(open_page: Open, healthy: Run) -> None:
    page = open_page("/run/healthy/gradient-flow")
    heat = traces(page, "flow-map")[0]
    table = healthy.stats("gradient").pivot_table(index="tensor", columns="step", values="norm", sort=False)
    assert heat["y"] == list(table.index)
    np.testing.assert_allclose(values_of(heat), table.to_numpy(), rtol=1e-3)


def test_drift_on_screen_is_that_of_the_log(open_page: Open, healthy: Run) -> None:
    page = open_page("/run/healthy/drift")
    bars = next(trace for trace in traces(page, "drift-map") if trace["type"] == "bar")
    last = healthy.drift().groupby("tensor", sort=False)["relative_l2"].last()
    np.testing.assert_allclose(bars["x"], last.to_numpy(), rtol=1e-3)


def test_the_layer_page_shows_histograms_biases_and_norms_of_the_log(open_page: Open, healthy: Run) -> None:
    page = open_page("/run/healthy/layer?tensor=2.weight&scale=log")
    for kind in ("weight", "gradient", "update", "activation"):
        shares = values_of(traces(page, f"histogram-{kind}")[0])
        np.testing.assert_allclose(shares.sum(axis=0), 1, atol=1e-2)
    _, values = healthy.values("2.bias")
    np.testing.assert_allclose(values_of(traces(page, "bias-plot")[0]), values.T, atol=1e-4)
    drawn = {trace["name"]: trace["y"] for trace in traces(page, "history-plot")}
    np.testing.assert_allclose(drawn["weight norm"], healthy.stats("weight", "2.weight")["norm"], rtol=1e-6)
    np.testing.assert_allclose(drawn["update ratio"], healthy.stats("update", "2.weight")["ratio"], rtol=1e-6)


def test_nan_gradients_are_red_on_screen(open_page: Open) -> None:
    page = open_page("/run/nested/blow-up/gradient-flow")
    assert [trace["name"] for trace in traces(page, "flow-map")][1] == "NaN or infinite"


def test_j_and_k_walk_through_the_layers(open_page: Open, healthy: Run) -> None:
    names = healthy.tensors()["tensor"].tolist()
    page = open_page(f"/run/healthy/layer?tensor={names[0]}")
    box = page.get_by_role("textbox", name="layer", exact=True)
    expect(box).to_have_value(names[0])
    traces(page, "history-plot")
    for _ in range(3):
        page.keyboard.press("j")
    expect(box).to_have_value(names[3])
    page.keyboard.press("k")
    expect(box).to_have_value(names[2])
    until(lambda: f"tensor={names[2]}" in address(page), "the tensor in the address")
    expected = healthy.stats("weight", names[2])["norm"].to_numpy()

    def norms_follow() -> bool:
        drawn = {trace["name"]: trace["y"] for trace in traces(page, "history-plot")}
        return len(drawn["weight norm"]) == len(expected) and np.allclose(
            drawn["weight norm"], expected, rtol=1e-6
        )

    until(norms_follow, "the norms of the new layer")


def test_without_a_selection_the_layer_page_shows_the_worst_layer(open_page: Open, runs_root: object) -> None:
    run = Run(f"{runs_root}/vanishing")
    worst = next(f.layers[0] for f in run.findings() if f.severity != "info" and f.layers)
    page = open_page("/run/vanishing/overview")
    expect(page.locator(".finding").first).to_be_visible(timeout=120_000)
    page.get_by_role("link", name="Layer", exact=True).click()
    expect(page.get_by_role("textbox", name="layer", exact=True)).to_have_value(worst)


def test_a_click_on_a_finding_opens_its_layer(open_page: Open) -> None:
    page = open_page("/run/vanishing/overview")
    link = page.locator(".finding .layer-link").first
    expect(link).to_be_visible(timeout=120_000)
    name = link.inner_text()
    link.click()
    expect(page.get_by_role("textbox", name="layer", exact=True)).to_have_value(name)


def test_a_click_on_a_row_opens_that_layer(open_page: Open) -> None:
    page = open_page("/run/healthy/gradient-flow")
    names = traces(page, "flow-map")[0]["y"]
    settled(page, "flow-map")
    box = page.locator("#flow-map .nsewdrag").first.bounding_box()
    assert box
    page.mouse.move(box["x"] + 100, box["y"] + box["height"] * 1.5 / len(names))
    page.wait_for_timeout(300)
    page.mouse.down()
    page.mouse.up()
    expect(page.get_by_role("textbox", name="layer", exact=True)).to_have_value(names[1])


def test_a_drag_zooms_reads_again_and_is_in_the_address(open_page: Open) -> None:
    page = open_page("/run/healthy/gradient-flow")
    traces(page, "flow-map")
    settled(page, "flow-map")
    box = page.locator("#flow-map .nsewdrag").first.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 22, steps=5)
    page.mouse.up()
    until(lambda: "range=" in address(page), "the step range in the address")
    steps = until(lambda: (x := traces(page, "flow-map")[0]["x"]) and len(x) < 30 and x, "fewer columns")
    assert min(steps) > 10
    assert max(steps) < 35


def test_a_copied_address_opens_the_same_view(open_page: Open) -> None:
    page = open_page("/run/healthy/gradient-flow")
    traces(page, "flow-map")
    page.get_by_role("textbox", name="filter layers").fill("weight$")
    page.get_by_text("Worst first").click()
    page.get_by_role("textbox", name="Quantity").click()
    page.get_by_role("option", name="Update ratio").click()
    until(
        lambda: all(part in address(page) for part in ("filter=", "order=badness", "metric=update_ratio")),
        "the address",
    )
    until(lambda: len(traces(page, "flow-map")[0]["y"]) == 3, "three weights")
    until(lambda: traces(page, "flow-map")[0]["name"] == "update ratio", "the update ratio")
    first = traces(page, "flow-map")[0]
    again = open_page(address(page))
    second = traces(again, "flow-map")[0]
    assert all(second[key] == first[key] for key in ("name", "y", "z", "meta"))
    expect(again.get_by_role("textbox", name="Quantity")).to_have_value("Update ratio")
    expect(again.get_by_role("textbox", name="filter layers")).to_have_value("weight$")


def test_dark_mode_by_the_switch_and_by_the_address(open_page: Open) -> None:
    page = open_page("/run/healthy/overview")
    traces(page, "loss-plot")
    page.locator("#theme-button").click()
    until(lambda: layout(page, "loss-plot", "font.color") == "#e3e7ed", "dark text in the plot")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 18, 22)"
    until(lambda: "theme=dark" in address(page), "the theme in the address")
    again = open_page(address(page))
    traces(again, "loss-plot")
    assert layout(again, "loss-plot", "font.color") == "#e3e7ed"
    preferred = open_page("/run/healthy/overview", scheme="dark")
    traces(preferred, "loss-plot")
    assert layout(preferred, "loss-plot", "font.color") == "#e3e7ed"


@pytest.mark.parametrize("slug", RUN_PAGES)
def test_nothing_sticks_out_on_a_phone(open_page: Open, slug: str) -> None:
    page = open_page(f"/run/vanishing/{slug}", width=390, height=844)
    expect(page.locator("#body > *").first).to_be_visible()
    for name in PLOTS[slug]:
        traces(page, name)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_an_unknown_run_gets_a_card_and_a_way_back(open_page: Open) -> None:
    page = open_page("/run/..%2F..%2Fetc/overview")
    expect(page.get_by_text("There is no run named")).to_be_visible()
    page.get_by_role("link", name="Back to the list").click()
    expect(page.get_by_role("link", name="healthy", exact=True)).to_be_visible()


def test_two_runs_lie_on_top_of_each_other(open_page: Open) -> None:
    page = open_page("/run/healthy/compare?with=vanishing")
    assert [trace["name"] for trace in traces(page, "compare-plot")] == ["healthy", "vanishing"]
    expect(page.get_by_role("row", name="config.lr 0.1 0.05")).to_be_visible()
