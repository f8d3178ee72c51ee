"""What readers of other dashboards do without thinking: hover, zoom, go back, switch to time, type a key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import FloatRect, Page, Route, expect

from layerwatch import Run
from tests.browser.reading import address, array, layout, settled, traces, until

Open = Callable[..., Page]
LINES = """() => Object.fromEntries([...document.querySelectorAll('.dash-graph')].map(graph => [graph.id,
  [...graph.querySelectorAll('.cursor-line')].filter(line => !line.hidden).map(line => {
    const axis = graph.querySelector('.js-plotly-plot')._fullLayout[line.dataset.axis];
    const left = line.getBoundingClientRect().left - graph.getBoundingClientRect().left - axis._offset;
    return axis.p2c(left);
  })]))"""
RANGE = """name => {
  const plot = document.querySelector(`[id="${name}"] .js-plotly-plot`);
  return plot._fullLayout.xaxis.range.map(Number);
}"""


def area(page: Page, name: str, subplot: int = 0) -> FloatRect:
    """Where the data of a plot is, scrolled to."""
    drag = page.locator(f"#{name} .nsewdrag").nth(subplot)
    drag.scroll_into_view_if_needed()
    page.wait_for_timeout(100)
    box = drag.bounding_box()
    assert box
    return box


def drag(page: Page, name: str, low: float, high: float) -> None:
    box = area(page, name)
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * low, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * high, y, steps=6)
    page.mouse.up()


def shown(page: Page, name: str) -> list[float]:
    return page.evaluate(RANGE, name)


def step_range(page: Page) -> tuple[int, int]:
    text = until(lambda: "range=" in address(page) and address(page), "the range in the address")
    low, high = text.split("range=")[1].split("&")[0].split(":")
    return int(low), int(high)


def test_the_cursor_is_at_the_same_step_in_every_plot(open_page: Open) -> None:
    page = open_page("/run/healthy/layer?tensor=2.weight")
    settled(page, "histogram-weight", "history-plot", "bias-plot")
    box = area(page, "histogram-weight")
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.5)
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    lines = until(
        lambda: (found := page.evaluate(LINES))["history-plot"] and found, "a line in the other plots"
    )
    steps = [step for found in lines.values() for step in found]
    assert len(steps) >= 4
    assert max(steps) - min(steps) < 2
    assert 25 < steps[0] < 35
    page.mouse.move(5, 5)
    until(lambda: not any(page.evaluate(LINES).values()), "no line when the mouse is elsewhere")


def test_a_cell_says_its_layer_step_and_value(open_page: Open, healthy: Run) -> None:
    page = open_page("/run/healthy/gradient-flow")
    settled(page, "flow-map")
    names = traces(page, "flow-map")[0]["y"]
    box = area(page, "flow-map")
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 5)
    page.mouse.move(box["x"] + box["width"] * (20.5 / 60), box["y"] + box["height"] * 1.5 / len(names))
    tip = page.locator(".cell-text")
    expect(tip).to_be_visible()
    row, step, value = tip.locator("> *").all_inner_texts()
    assert row == names[1]
    at = int(step.removeprefix("step ").split()[0])
    frame = healthy.stats("gradient", names[1])
    norm = float(frame.loc[frame["step"] == at, "norm"].iloc[0])
    assert value.startswith("gradient norm ")
    assert float(value.split()[-1].replace("−", "-")) == pytest.approx(norm, rel=2e-3)
    expect(page.locator(".cursor-row:visible")).to_have_count(1)
    assert page.locator("#flow-map .hoverlayer text").count() == 0


def zoomed(page: Page, name: str, expected: Sequence[float]) -> None:
    """Wait until a plot, scrolled to, shows these steps."""
    page.locator(f"#{name}").scroll_into_view_if_needed()
    until(lambda: np.abs(np.subtract(shown(page, name), expected)).max() < 1, f"{expected} in {name}")


def test_a_drag_zooms_every_plot_and_back_undoes_it(open_page: Open) -> None:
    page = open_page("/run/healthy/layer?tensor=2.weight")
    settled(page, "histogram-weight", "history-plot", "quantile-plot")
    whole = shown(page, "history-plot")
    page.evaluate("document.querySelector('#history-plot').mark = 1")
    drag(page, "histogram-weight", 0.3, 0.6)
    low, high = step_range(page)
    assert 15 < low < 20
    assert 33 < high < 38
    for name in ("history-plot", "quantile-plot", "histogram-weight"):
        zoomed(page, name, (low, high))
    settled(page, "history-plot")
    drag(page, "history-plot", 0.2, 0.8)
    until(lambda: step_range(page) != (low, high), "a second zoom")
    zoomed(page, "history-plot", step_range(page))
    settled(page, "history-plot")
    page.go_back()
    until(lambda: step_range(page) == (low, high), "the first zoom again")
    zoomed(page, "history-plot", (low, high))
    page.go_back()
    until(lambda: "range=" not in address(page), "the whole run in the address")
    zoomed(page, "history-plot", whole)
    page.go_forward()
    until(lambda: step_range(page) == (low, high), "the zoom after going forward")
    assert page.evaluate("document.querySelector('#history-plot').mark") == 1  # the page was not built anew
    page.locator("#range-chip").click()
    zoomed(page, "history-plot", whole)


def choose_axis(page: Page, word: str) -> None:
    page.get_by_role("textbox", name="X axis").click()
    page.get_by_role("option", name=word, exact=True).click()


def ticks(page: Page, name: str) -> list[str]:
    return page.locator(f"#{name} .xaxislayer-above .xtick text").all_text_contents()


def test_the_axis_can_be_steps_logarithms_or_time(open_page: Open, healthy: Run) -> None:
    page = open_page("/run/healthy/overview")
    settled(page, "loss-plot")
    frame = healthy.scalars("train_loss")
    seconds = (frame["time"] - frame["time"].iloc[0]).to_numpy()
    choose_axis(page, "Relative time")
    until(lambda: layout(page, "loss-plot", "meta.axis") == "relative", "the time axis")
    until(lambda: any(tick.endswith(" s") for tick in ticks(page, "loss-plot")), "ticks in seconds")
    drawn = array(next(t for t in traces(page, "loss-plot") if t["name"] == "train")["x"])
    assert abs((drawn - drawn[0]) - seconds).max() < 0.05
    settled(page, "loss-plot")
    drag(page, "loss-plot", 0.25, 0.75)
    low, high = step_range(page)
    assert 0 < low < high < 60  # the address speaks in steps on every axis
    page.get_by_role("link", name="Gradient flow", exact=True).click()
    settled(page, "flow-map")
    assert layout(page, "flow-map", "meta.axis") == "relative"
    assert step_range(page) == (low, high)
    assert "axis=relative" in address(page)
    choose_axis(page, "Wall time")
    until(lambda: layout(page, "flow-map", "xaxis.type") == "date", "dates")
    assert any(":" in tick for tick in ticks(page, "flow-map"))
    settled(page, "flow-map")
    drag(page, "flow-map", 0.3, 0.7)
    until(lambda: step_range(page) != (low, high), "a zoom among dates")
    inner = step_range(page)
    assert low <= inner[0] < inner[1] <= high
    page.get_by_role("link", name="Overview", exact=True).click()
    settled(page, "loss-plot")
    choose_axis(page, "Log step")
    until(lambda: layout(page, "loss-plot", "xaxis.type") == "log", "a logarithmic axis")


def test_keys_and_the_search_lead_everywhere(open_page: Open, healthy: Run) -> None:
    page = open_page("/run/healthy/overview")
    settled(page, "loss-plot")
    page.keyboard.press("g")
    page.keyboard.press("f")
    expect(page.locator(".nav-link.active")).to_have_text("Gradient flow")
    page.keyboard.press("t")
    expect(page.locator("html")).to_have_attribute("data-mantine-color-scheme", "dark")
    page.keyboard.press("p")
    expect(page.locator("#live-button")).to_have_text("Paused")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Keys")).to_have_count(0)

    page.keyboard.press("Control+k")
    box = page.get_by_role("combobox", name="Search pages")
    expect(box).to_be_focused()
    layer = healthy.tensors()["tensor"].tolist()[2]
    box.press_sequentially(layer)
    option = page.get_by_role("option", selected=True)
    expect(option).to_contain_text(layer)
    assert box.get_attribute("aria-activedescendant") == option.get_attribute("id")
    page.keyboard.press("Enter")
    expect(page.locator(".nav-link.active")).to_have_text("Layer")
    until(lambda: f"tensor={layer}" in address(page), "the layer in the address")
    page.keyboard.press("/")
    box.fill("vnshng")
    expect(page.get_by_role("option", selected=True)).to_contain_text("vanishing")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("vanishing")
    expect(page.locator(".nav-link.active")).to_have_text("Layer")

    held: list[Route] = []
    page.route("**/api/names*", lambda route: held.append(route))
    page.locator("#palette-button").click()
    expect(page.get_by_role("option", selected=True)).to_be_visible()
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    expect(page.get_by_role("option", selected=True)).to_contain_text("Drift")
    until(lambda: page.wait_for_timeout(50) or held, "the request for the names")
    with page.expect_response("**/api/names*"):
        held.pop().continue_()
    settled(page)  # what comes later leaves the line that the reader has gone to
    expect(page.get_by_role("option", selected=True)).to_contain_text("Drift")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Search")).to_be_hidden()


def test_letters_in_a_field_are_text(open_page: Open) -> None:
    page = open_page("/run/healthy/gradient-flow")
    settled(page, "flow-map")
    field = page.get_by_role("textbox", name="filter layers")
    field.press_sequentially("gdt/?p0")
    expect(field).to_have_value("gdt/?p0")
    expect(page.locator(".nav-link.active")).to_have_text("Gradient flow")
    expect(page.locator("html")).to_have_attribute("data-mantine-color-scheme", "light")
    assert page.locator("dialog[open]").count() == 0


def test_a_choice_goes_along_through_the_navigation(open_page: Open, healthy: Run) -> None:
    layer = healthy.tensors()["tensor"].tolist()[2]
    page = open_page(f"/run/healthy/layer?tensor={layer}&range=10:40")
    settled(page, "history-plot")
    page.get_by_role("link", name="Drift", exact=True).click()
    settled(page, "drift-map")
    assert step_range(page) == (10, 40)
    page.get_by_role("link", name="Layer", exact=True).click()
    settled(page, "history-plot")
    assert f"tensor={layer}" in address(page)
    assert step_range(page) == (10, 40)


def test_touch_shows_the_cursor_too(open_page: Open) -> None:
    page = open_page("/run/healthy/gradient-flow", width=390)
    settled(page, "flow-map")
    box = area(page, "flow-map")
    spot: dict[str, Any] = {"clientX": box["x"] + box["width"] / 2, "clientY": box["y"] + box["height"] / 2}
    page.locator("#flow-map .nsewdrag").first.dispatch_event(
        "pointerdown", {**spot, "pointerType": "touch", "bubbles": True}
    )
    expect(page.locator(".cell-text")).to_be_visible()
