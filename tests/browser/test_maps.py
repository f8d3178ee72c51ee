"""Gradient flow and Drift by real clicks: quantity, rows, order, colours, profiles, layer, zoom, address."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import numpy as np
from playwright.sync_api import FloatRect, Page, expect

from layerwatch import Run
from layerwatch.dashboard.figures.cells import LOW, values_of
from tests.browser.reading import address, settled, traces, until

Open = Callable[..., Page]


def heat(page: Page, plot: str = "flow-map") -> dict[str, Any]:
    return traces(page, plot)[0]


def box(page: Page, plot: str = "flow-map") -> FloatRect:
    """Where the map is, once it can be clicked."""
    settled(page, plot)
    found = page.locator(f"#{plot} .nsewdrag").first.bounding_box()
    assert found
    return found


def click_row(page: Page, row: int, rows: int, plot: str = "flow-map", **keys: Any) -> None:
    area = box(page, plot)
    page.mouse.move(area["x"] + area["width"] / 2, area["y"] + area["height"] * (row + 0.5) / rows)
    page.wait_for_timeout(250)
    if keys:
        page.keyboard.down(keys["held"])
    page.mouse.down()
    page.mouse.up()
    if keys:
        page.keyboard.up(keys["held"])


def test_every_control_changes_the_map_and_the_address(open_page: Open, runs_root: object) -> None:
    run = Run(f"{runs_root}/vanishing")
    page = open_page("/run/vanishing/gradient-flow")
    assert len(heat(page)["y"]) == 20
    expect(page.locator("#flow-slope")).to_contain_text("gradient norm shrinks from output to input")
    page.get_by_text("Matrices", exact=True).click()
    until(lambda: len(heat(page)["y"]) == 10, "the matrices")
    expect(page.locator("#flow-note")).to_contain_text("10 of 20 layers")
    page.get_by_text("Worst first").click()
    until(lambda: heat(page)["y"][0] != "0.weight" or "order=badness" in address(page), "the worst first")
    page.get_by_text("Per layer").click()
    until(lambda: heat(page)["zmin"] == LOW, "colours per layer")
    page.get_by_role("textbox", name="Quantity").click()
    absent = page.get_by_role("option", name="Attention entropy: no attention was seen")
    expect(absent).to_have_attribute("data-combobox-disabled", "true")
    page.get_by_role("option", name="Update ratio").click()
    until(lambda: heat(page)["name"] == "update ratio", "the update ratio")
    assert any(trace["name"] == "10⁻³" for trace in traces(page, "flow-map"))
    page.get_by_role("textbox", name="filter layers").fill(r"^(14|16)\.")
    until(lambda: sorted(heat(page)["y"]) == ["14.weight", "16.weight"], "two layers")
    ratio = run.stats("update", ["16.weight"])["ratio"].to_numpy()
    first = heat(page)
    np.testing.assert_allclose(values_of(first)[first["y"].index("16.weight")], ratio, rtol=1e-3)
    wanted = ("role=matrix", "order=badness", "colors=layer", "metric=update_ratio", "filter=")
    until(lambda: all(part in address(page) for part in wanted), "the address")
    again = heat(open_page(address(page)))
    assert all(again[key] == first[key] for key in ("name", "x", "y", "z", "meta", "zmin"))


def test_profiles_follow_the_sliders_and_shift_clicks(open_page: Open, healthy: Run) -> None:
    norms = healthy.stats("gradient").pivot_table(index="tensor", columns="step", values="norm", sort=False)
    page = open_page("/run/healthy/gradient-flow?at=20&against=5")
    named = {trace["name"]: trace["x"] for trace in traces(page, "flow-map")}
    np.testing.assert_allclose(named["at step 20"], norms[20], rtol=1e-3)
    np.testing.assert_allclose(named["at step 5"], norms[5], rtol=1e-3)
    slider = page.get_by_role("slider", name="profile at step")
    slider.focus()
    page.keyboard.press("ArrowRight")
    until(lambda: "at step 21" in [trace["name"] for trace in traces(page, "flow-map")], "step 21")
    assert "at=21" in address(page)
    click_row(page, 2, 6, held="Shift")
    until(lambda: "at=21" not in address(page) and "at=" in address(page), "the clicked step")
    expect(page.locator(".nav-link.active")).to_have_text("Gradient flow")
    slider.focus()
    page.keyboard.press("End")
    until(lambda: "&at=" not in address(page) and "?at=" not in address(page), "the end is no choice")
    until(lambda: traces(page, "flow-map")[-1]["name"] == "at step 59", "the profile of the last step")


def test_a_drag_reads_again_and_a_click_opens_the_layer(open_page: Open) -> None:
    page = open_page("/run/vanishing/gradient-flow")
    area, names = box(page), heat(page)["y"]
    page.mouse.move(area["x"] + area["width"] * 0.3, area["y"] + 30)
    page.mouse.down()
    page.mouse.move(area["x"] + area["width"] * 0.6, area["y"] + 33, steps=5)
    page.mouse.up()
    steps = until(lambda: (x := heat(page)["x"]) and len(x) < 40 and x, "fewer columns")
    assert min(steps) >= 15
    low, high = unquote(address(page)).split("range=")[1].split("&")[0].split(":")
    assert int(low) - 1 <= min(steps) < max(steps) <= int(high) + 1
    click_row(page, 4, len(names))
    expect(page.get_by_role("textbox", name="layer", exact=True)).to_have_value(names[4])


def test_drift_by_block_measure_and_rank(open_page: Open, runs_root: object) -> None:
    run = Run(f"{runs_root}/vanishing")
    page = open_page("/run/vanishing/drift")
    assert len(heat(page, "drift-map")["y"]) == 20
    expect(page.locator("#drift-blocks")).to_contain_text("the last blocks")
    first = page.locator("#ranks .layer-link").first
    expect(first).to_have_text(run_rank(run))
    page.get_by_text("Sign flips").click()
    until(lambda: heat(page, "drift-map")["name"] == "sign flips", "sign flips")
    flips = run.drift().assign(share=lambda f: f["sign_flips"] / f["count"])
    table = flips.pivot_table(index="tensor", columns="step", values="share", sort=False)
    np.testing.assert_allclose(values_of(heat(page, "drift-map")), table.to_numpy(), atol=1e-4)
    page.get_by_text("Blocks", exact=True).click()
    until(lambda: heat(page, "drift-map")["y"][:2] == ["0", "2"], "blocks")
    click_row(page, 1, 10, "drift-map")
    until(lambda: heat(page, "drift-map")["y"] == ["2.weight", "2.bias"], "the layers of the block")
    until(lambda: "group=" not in address(page) and "metric=flipped" in address(page), "the address")
    first.click()
    expect(page.get_by_role("textbox", name="layer", exact=True)).to_have_value(run_rank(run))


def run_rank(run: Run) -> str:
    """The layer that moved most against the median of its role, by the plain definition."""
    last = run.drift().groupby("tensor", sort=False)["relative_l2"].last()
    roles = run.tensors().set_index("tensor")["role"]
    scores = {}
    for role in ("matrix", "bias"):
        like = [name for name in last.index if roles[name] == role and last[name] > 0]
        x = np.log10(last[like])
        spread = max(float(np.median(np.abs(x - np.median(x)))), 0.02)
        scores |= dict(zip(like, (x - np.median(x)) / spread, strict=True))
    return max(scores, key=lambda name: scores[name])
