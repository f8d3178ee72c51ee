"""Every page opens for every run, and every plot of it draws, without a browser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from dash.development.base_component import Component

from layerwatch.dashboard.components import state_id
from layerwatch.dashboard.drifting import grouped
from layerwatch.dashboard.figures.cells import values_of
from layerwatch.dashboard.figures.grid import matching
from layerwatch.dashboard.figures.theme import LIGHT, Style
from layerwatch.dashboard.pages import PAGES, drift, overview
from layerwatch.dashboard.plots import draw
from layerwatch.dashboard.quantities import QUANTITIES, absent
from layerwatch.dashboard.queries import Library
from layerwatch.dashboard.shell import open_page
from layerwatch.dashboard.urls import RUN_PAGES, View
from tests.dashboard.test_figures import unpack

RUNS = ["healthy", "vanishing", "nested/blow-up", "finetune"]
SCREENS = [{"theme": "light", "narrow": False}, {"theme": "dark", "narrow": True}]


def walk(item: Any) -> Iterator[Any]:
    """Every component and text of a layout."""
    if isinstance(item, list | tuple):
        for part in item:
            yield from walk(part)
    elif item is not None:
        yield item
        yield from walk(getattr(item, "children", None))


def parts(body: list[Any]) -> list[Component]:
    return [item for item in walk(body) if isinstance(item, Component)]


def controls(body: list[Any]) -> dict[str, Any]:
    found = {}
    for item in parts(body):
        key = getattr(item, "id", None)
        if isinstance(key, dict) and "state" in key:
            found[key["state"]] = getattr(item, "value", None)
    return found


def text(body: list[Any]) -> str:
    return " ".join(item for item in walk(body) if isinstance(item, str))


def figures(library: Library, page: str, run: str, screen: dict[str, Any], **params: str) -> dict[str, Any]:
    _, _, body = open_page(library, View(page, run, params), screen)
    values = controls(body)
    drawn = {}
    for plot in PAGES[page].PLOTS:
        drawn[plot.id] = draw(plot, library, {"run": run}, screen, [values[key] for key in plot.controls])
    return drawn


@pytest.mark.parametrize("screen", SCREENS, ids=["light", "dark-narrow"])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("page", RUN_PAGES)
def test_every_page_opens_and_draws(library: Library, page: str, run: str, screen: dict[str, Any]) -> None:
    _, title, body = open_page(library, View(page, run), screen)
    assert run in text(title)
    assert "cannot be shown" not in text(title)
    assert "Something went wrong" not in text(title)
    assert body
    for name, figure in figures(library, page, run, screen).items():
        assert "could not be drawn" not in str(figure["layout"].get("meta")), name
        assert go.Figure(figure).layout.template.layout.font.color


def test_every_word_of_the_navigation_is_a_link(library: Library) -> None:
    for view in (View(), View("drift", "nested/blow-up")):
        nav, _, _ = open_page(library, view, {})
        links = {
            getattr(item, "children", ""): getattr(item, "href", "")
            for item in parts(nav)
            if type(item).__name__ == "A"
        }
        assert list(links) == ["Runs", "Fleet", *RUN_PAGES.values(), "Problems"]
    assert links["Gradient flow"] == "/run/nested/blow-up/gradient-flow"


def test_a_run_folder_itself_can_be_the_root(runs_root: Path) -> None:
    assert list(Library(runs_root / "healthy").runs()) == ["healthy"]


@pytest.mark.parametrize("name", ["../healthy", "..", "/etc", "healthy/../../x", "nested", ""])
def test_only_names_that_were_found_open(library: Library, name: str) -> None:
    _, title, body = open_page(library, View("overview", name), {})
    assert "cannot be shown" in text(title)
    assert "no run named" in text(body) or "no page" in text(body)


def test_a_damaged_run_is_reported_and_does_not_hide_the_others(runs_root: Path, tmp_path: Path) -> None:
    (tmp_path / "good").symlink_to(runs_root / "healthy")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "run.json").write_text("{not json")
    library = Library(tmp_path)
    _, _, body = open_page(library, View(), {})
    assert "Folders that cannot be read" in text(body)
    _, _, body = open_page(library, View("overview", "bad"), {})
    assert "damaged" in text(body)


def test_a_fault_of_a_page_becomes_a_card(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> list[Any]:
        raise ZeroDivisionError("by design")

    monkeypatch.setattr(overview, "layout", broken)
    nav, title, body = open_page(library, View("overview", "healthy"), {})
    assert "Something went wrong" in text(title)
    assert "ZeroDivisionError" in text(body)
    assert "by design" not in text(body)  # that is for the server's log
    assert "Overview" in text(nav)


def test_gradient_norms_on_screen_are_those_of_the_run(library: Library) -> None:
    figure = figures(library, "gradient-flow", "healthy", SCREENS[0])["flow-map"]
    stats = library.run("healthy").stats("gradient")
    table = stats.pivot_table(index="tensor", columns="step", values="norm", sort=False)
    assert figure["data"][0]["y"] == list(table.index)
    assert figure["data"][0]["x"] == list(table.columns)
    np.testing.assert_allclose(values_of(figure["data"][0]), table.to_numpy(), rtol=1e-3)


@pytest.mark.parametrize("metric", QUANTITIES)
def test_every_quantity_has_a_map_or_the_reason_why_not(library: Library, metric: str) -> None:
    figure = figures(library, "gradient-flow", "healthy", SCREENS[0], metric=metric)["flow-map"]
    if absent(library.run("healthy"), metric):
        assert "There is no" in figure["layout"]["meta"]["said"]
    else:
        assert np.isfinite(values_of(figure["data"][0])).any()


def test_the_dead_unit_share_is_the_share_of_silent_units(library: Library) -> None:
    figure = figures(library, "gradient-flow", "healthy", SCREENS[0], metric="dead_units")["flow-map"]
    names, values = figure["data"][0]["y"], values_of(figure["data"][0])
    _, active = library.run("healthy").activity("activation", "1")
    np.testing.assert_allclose(values[names.index("1")], 1 - active.mean(axis=1), atol=1e-3)


def test_nan_gradients_are_red(library: Library) -> None:
    figure = figures(library, "gradient-flow", "nested/blow-up", SCREENS[0])["flow-map"]
    red = next(trace for trace in figure["data"] if trace["name"] == "NaN or infinite")
    stats = library.run("nested/blow-up").stats("gradient")
    bad = int(((stats["nans"] + stats["infs"]) > 0).sum())
    assert bad > 0
    assert int(np.nansum(unpack(red["z"]))) == bad


def test_a_pattern_chooses_layers_and_a_bad_one_is_explained(library: Library) -> None:
    figure = figures(library, "gradient-flow", "healthy", SCREENS[0], filter=r"^2\.")["flow-map"]
    assert figure["data"][0]["y"] == ["2.weight", "2.bias"]
    found, wrong = matching(["a", "b"], "(")
    assert len(found) == 2
    assert "not a regular expression" in wrong


def test_a_pattern_that_hangs_backtracking_engines_returns_at_once() -> None:
    found, wrong = matching(["a" * 5000 + "!"], "(a+)+$")
    assert (found, wrong) == ([], "")


def test_a_step_range_reads_only_that_range(library: Library) -> None:
    figure = figures(library, "gradient-flow", "healthy", SCREENS[0], range="20:30")["flow-map"]
    steps = figure["data"][0]["x"]
    assert min(steps) >= 19
    assert max(steps) <= 31
    assert figure["layout"]["xaxis"]["range"] == [20.0, 30.0]


def test_drift_bars_are_the_last_relative_l2(library: Library) -> None:
    figure = figures(library, "drift", "healthy", SCREENS[0])["drift-map"]
    bars = next(trace for trace in figure["data"] if trace["type"] == "bar")
    last = library.run("healthy").drift().groupby("tensor", sort=False)["relative_l2"].last()
    assert bars["y"] == list(last.index)
    assert bars["x"] == pytest.approx(last.tolist(), rel=1e-3)


def test_drift_of_a_block_adds_squares(library: Library) -> None:
    rows = library.run("healthy").drift()
    rows = rows[rows["step"] == rows["step"].max()]
    block = rows[rows["tensor"].str.startswith("0.")]
    expected = np.sqrt((block["distance"] ** 2).sum() / (block["reference_norm"] ** 2).sum())
    found = grouped(rows.assign(turned=0.0, flipped=0.0), {"0.weight": "0", "0.bias": "0"})
    assert found.loc[found["tensor"] == "0", "relative_l2"].item() == pytest.approx(expected)


def test_frozen_layers_are_named(library: Library) -> None:
    card = text(drift.still_card(drift.still_layers(library.run("finetune")), "finetune"))
    assert "Frozen" in card
    assert "0.weight" in card
    assert "2.weight" not in card


def test_controls_take_their_value_from_the_address_and_ignore_nonsense(library: Library) -> None:
    params = {"metric": "update_ratio", "order": "badness", "colors": "nonsense", "at": "12", "range": "a:b"}
    _, _, body = open_page(library, View("gradient-flow", "healthy", params), {})
    values = controls(body)
    assert (values["metric"], values["order"], values["colors"], values["at"]) == (
        "update_ratio",
        "badness",
        "robust",
        "12",
    )
    assert figures(library, "gradient-flow", "healthy", SCREENS[0], **params)["flow-map"]["data"]


def test_a_plot_that_fails_says_so_in_its_place(library: Library) -> None:
    plot = replace(overview.LOSS, draw=lambda scene: 1 / 0)  # pyright: ignore[reportArgumentType]
    figure = draw(plot, library, {"run": "healthy"}, {}, ["" for _ in plot.controls])
    assert "could not be drawn" in figure["layout"]["meta"]["said"]
    assert figure["layout"]["meta"]["tone"] == "failed"
    figure = draw(overview.SCALARS, library, {"run": "gone"}, {}, ["" for _ in overview.SCALARS.controls])
    assert "cannot be read" in figure["layout"]["meta"]["said"]


def test_state_ids_are_what_the_browser_code_expects() -> None:
    assert state_id("tensor") == {"state": "tensor"}
    assert Style(LIGHT).palette.name == "light"
