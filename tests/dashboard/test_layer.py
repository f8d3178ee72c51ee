"""The Layer page without a browser: its numbers are those of the log, by slow and obvious twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwatch import Run
from layerwatch.dashboard.figures import histogram, norms
from layerwatch.dashboard.figures.cells import values_of
from layerwatch.dashboard.figures.theme import DARK, LIGHT, Style, blend
from layerwatch.dashboard.pages import layer, layer_cards, layer_facts, layer_plots
from layerwatch.dashboard.plots import Scene
from layerwatch.dashboard.queries import Judgement, Library
from layerwatch.dashboard.shell import open_page
from layerwatch.dashboard.urls import View
from layerwatch.monitor import Finding, LogWriter, summarise
from layerwatch.monitor.schema import STATS
from tests.dashboard.test_pages import SCREENS, controls, figures
from tests.monitor.made_logs import info, row

STEPS = 40


def buckets(values: np.ndarray, step: int = 0) -> pd.DataFrame:
    """A histogram with one bucket for each value."""
    return pd.DataFrame({"step": step, "low": values, "high": values, "count": 1})


def drawn(library: Library, run: str = "healthy", **params: str) -> dict[str, Any]:
    return figures(library, "layer", run, SCREENS[0], **params)


# What is chosen and what is shown ---------------------------------------------------------------------------


def test_the_page_starts_with_the_worst_layer(library: Library) -> None:
    judged = library.judgement("vanishing", wait=150)
    assert judged is not None
    named = [name for finding in judged.alarms for name in finding.layers]
    assert named, "the vanishing run should raise an alarm that names a layer"
    _, _, body = open_page(library, View("layer", "vanishing"), {})
    assert controls(body)["tensor"] == named[0]


def test_without_findings_the_page_starts_with_the_first_matrix(library: Library) -> None:
    assert layer.worst(library.run("healthy"), None) == "0.weight"


def test_only_the_cards_that_have_something_to_show(library: Library) -> None:
    healthy, finetune = library.run("healthy"), library.run("finetune")

    def shown(run: Run, name: str) -> set[str]:
        found = zip(layer.SHOWN, layer.available(run, name), strict=True)
        return {card for card, style in found if not style}

    assert shown(healthy, "1") >= {"activation", "activity", "steps", "quantile", "history"}
    assert shown(healthy, "1").isdisjoint({"weight", "gradient", "update", "bias", "attention", "optimizer"})
    assert shown(healthy, "0.weight") >= {"weight", "gradient", "update", "activation", "bias", "history"}
    frozen = shown(finetune, "0.weight")
    assert "weight" in frozen
    assert frozen.isdisjoint({"gradient", "update"})


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1"])
def test_what_is_shown_is_not_empty(library: Library, name: str) -> None:
    shown = zip(layer.SHOWN, layer.available(library.run("healthy"), name), strict=True)
    plots = {**layer_cards.HISTOGRAMS, **layer_cards.CARDS}
    figure = drawn(library, tensor=name)
    for card, style in shown:
        assert bool(figure[plots[card].id]["data"]) == (style == ""), card


def test_the_tree_gets_every_name_once_and_a_hint_where_there_is_a_gradient(library: Library) -> None:
    run = library.run("vanishing")
    names = layer_facts.selectable(run)
    found = layer.tree(run, names)
    assert found["names"] == names
    assert len(set(names)) == len(names)
    hints = dict(zip(names, found["hints"], strict=True))
    last = run.stats("gradient").drop_duplicates("tensor", keep="last").set_index("tensor")["norm"]
    assert hints[last.idxmax()] == layer.LEVELS
    assert hints[last.idxmin()] == 1
    assert hints["1"] == 0  # a module has no gradient


def test_marks_are_the_worst_severity_of_each_layer() -> None:
    found = [
        Finding("run", "dead_units", "info", ("a", "b"), 0, 1, ""),
        Finding("run", "nonfinite", "critical", ("b",), 0, 1, ""),
        Finding("run", "bad_init_scale", "warning", ("a", "b"), 0, 1, ""),
    ]
    assert layer_facts.marks(Judgement("", found)) == {"a": "warning", "b": "critical"}
    assert layer_facts.marks(None) == {}


# Facts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "kind", "expected"),
    [
        ([16, 12], "Linear", (12, 16)),
        ([8, 3, 5, 5], "Conv2d", (75, 200)),
        ([768, 2304], "Conv1D", (768, 2304)),
    ],
)
def test_fans_are_those_of_torch(shape: list[int], kind: str, expected: tuple[int, int]) -> None:
    import torch

    assert layer_facts.fans(shape, kind) == expected
    if kind != "Conv1D":
        assert torch.nn.init._calculate_fan_in_and_fan_out(torch.empty(shape)) == expected
    weight = torch.nn.init.xavier_normal_(torch.empty(400, 300))
    xavier, he = layer_facts.expectations(300, 400)
    assert weight.std().item() == pytest.approx(xavier, rel=0.02)
    assert torch.nn.init.kaiming_normal_(weight).std().item() == pytest.approx(he, rel=0.02)


def test_the_facts_of_a_tensor_and_of_a_module(library: Library) -> None:
    run = library.run("healthy")
    known = layer_facts.facts(run, "2.weight")
    assert known["shape"] == "16 × 16"
    assert known["fan"] == "16 / 16"
    assert known["role"] == "matrix"
    start = run.stats("initial_weight", "2.weight")["std"].iloc[0]
    assert known["start"].startswith(f"{start:.3g} (Xavier 0.25, He 0.354)")
    assert known["norm"] == f"{run.stats('weight', '2.weight')['norm'].iloc[-1]:.3g}"
    assert "bad" not in known
    assert int(layer_facts.facts(library.run("nested/blow-up"), "0.weight")["bad"]) > 0
    assert layer_facts.facts(run, "1") == {"role": "ReLU", "depth": "2 of 5"}
    assert layer_facts.facts(run, "nothing") == {"role": "module"}


# Figures ----------------------------------------------------------------------------------------------------


def test_a_weight_comes_with_the_bias_of_its_module(library: Library) -> None:
    figure = drawn(library, tensor="2.weight")["bias-plot"]
    _, values = library.run("healthy").values("2.bias")
    np.testing.assert_allclose(values_of(figure["data"][0]), values.T, atol=np.abs(values).max() / 500)


def test_the_units_on_screen_are_those_that_fired(library: Library) -> None:
    figure = drawn(library, tensor="1")["activity-plot"]
    _, active = library.run("healthy").activity("activation", "1")
    np.testing.assert_allclose(values_of(figure["data"][0]), active.T, atol=1e-3)


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_histograms_on_screen_hold_every_element(library: Library, scale: str) -> None:
    figure = drawn(library, tensor="0.weight", scale=scale)["histogram-weight"]
    shares = values_of(figure["data"][0])
    np.testing.assert_allclose(shares.sum(axis=0), 1, atol=0.01)
    assert figure["data"][0]["x"] == library.run("healthy").stats("weight", "0.weight")["step"].tolist()


def test_the_history_is_that_of_the_log(library: Library) -> None:
    run = library.run("healthy")
    lines = {trace["name"]: trace for trace in drawn(library, tensor="2.weight")["history-plot"]["data"]}
    for name, frame, column in (
        ("weight norm", run.stats("weight", "2.weight"), "norm"),
        ("gradient norm", run.stats("gradient", "2.weight"), "norm"),
        ("update ratio", run.stats("update", "2.weight"), "ratio"),
        ("drift", run.drift("2.weight"), "relative_l2"),
    ):
        assert lines[name]["x"] == frame["step"].tolist()
        np.testing.assert_allclose(lines[name]["y"], frame[column], rtol=1e-6)


def test_a_panel_of_rolled_up_rows_has_the_range_of_single_captures() -> None:
    frame = pd.DataFrame({"step": [0, 16], "norm": [2.0, 3.0], "low": [1.0, 2.0], "high": [9.0, 4.0]})
    one = norms.Series(frame, "norm", "gradient norm", "accent", log=True, low="low", high="high")
    traces = norms.history([one], Style())["data"]
    assert [trace["y"] for trace in traces] == [[1.0, 2.0], [9.0, 4.0], [2.0, 3.0]]
    single = norms.Series(
        frame.assign(low=frame["norm"], high=frame["norm"]), "norm", "n", "accent", low="low", high="high"
    )
    assert len(norms.history([single], Style())["data"]) == 1
    assert "Nothing" in norms.history([], Style())["layout"]["meta"]["said"]


@given(st.integers(1, 700), st.integers(1, 64))
def test_pooled_histograms_lose_no_element_and_begin_at_multiples(steps: int, columns: int) -> None:
    frame = pd.concat([buckets(np.array([1.0, 2.0 + step % 3]), step) for step in range(steps)])
    pooled = histogram.pool(frame, columns)
    found = np.unique(pooled["step"])
    assert len(found) <= columns
    assert pooled["count"].sum() == 2 * steps
    width = found[1] - found[0] if len(found) > 1 else 1
    assert (found % width == 0).all()
    for step in found.tolist():
        rows = pooled[pooled["step"] == step]
        inside = frame[frame["step"].between(step, step + width - 1)] if len(found) > 1 else frame
        twin = inside.groupby(["low", "high"])["count"].sum()
        assert rows.set_index(["low", "high"])["count"].to_dict() == twin.to_dict()


def test_the_axis_of_a_growing_run_rests() -> None:
    rng = np.random.default_rng(0)
    frames = [buckets(rng.normal(size=2000), step) for step in range(12)]
    first = histogram.density(pd.concat(frames[:8]))[1]
    assert np.array_equal(histogram.density(pd.concat(frames))[1], first)


@pytest.mark.parametrize("log", [False, True])
def test_two_steps_are_the_histograms_of_those_steps(library: Library, log: bool) -> None:
    run = library.run("healthy")
    params = {"tensor": "0.weight", "first": "7", "second": "31", "scale": "log" if log else "linear"}
    figure = drawn(library, **params)["steps-plot"]
    assert [trace["name"] for trace in figure["data"]] == ["step 7", "step 31"]
    frame = pd.concat([run.histogram("weight", "0.weight", step).assign(step=step) for step in (7, 31)])
    if log:
        _, rows, shares, _ = histogram.log_density(frame)
    else:
        _, edges, shares = histogram.density(frame)
        rows = (edges[1:] + edges[:-1]) / 2
    for trace, column in zip(figure["data"], shares.T, strict=True):
        np.testing.assert_allclose(trace["x"], rows, rtol=1e-6)
        np.testing.assert_allclose(trace["y"], column, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "names"), [("", "", [0, 59]), ("-4", "1e9", [0, 59]), ("x", "12.7", [0, 12])]
)
def test_steps_that_make_no_sense_become_the_ends(
    library: Library, first: str, second: str, names: list[int]
) -> None:
    scene_values = {
        "tensor": "0.weight",
        "first": first,
        "second": second,
        "kind": "weight",
        "scale": "linear",
    }
    figure = layer_plots.draw_steps(Scene(library, "healthy", library.run("healthy"), Style(), scene_values))
    assert [trace["name"] for trace in figure["data"]] == [f"step {step}" for step in names]


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_ridges_get_stronger_with_time_and_the_latest_is_in_front(palette: Any) -> None:
    frame = pd.concat([buckets(np.linspace(0, 1, 50), step) for step in range(40)])
    figure = histogram.ridgeline(frame, "weight", Style(palette))
    ridges = figure["data"][1::2]
    assert [ridges[0]["name"], ridges[-1]["name"]] == ["step 0", "step 39"]
    assert len(ridges) == histogram.RIDGES
    assert min(ridges[0]["y"]) > min(ridges[-1]["y"]) == 0
    assert len({trace["line"]["color"] for trace in ridges}) == histogram.RIDGES
    shown = np.array(ridges[-1]["text"], dtype=float)
    assert shown.sum() == pytest.approx(1, abs=0.01)
    assert figure["layout"]["xaxis"]["fixedrange"]


def test_a_blend_is_between_its_colours() -> None:
    assert [blend("#000000", "#ff8040", share) for share in (0, 0.5, 1)] == ["#000000", "#804020", "#ff8040"]


# Long runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """A run of 5,000 captures of one tensor, with a spike in one of them."""
    root = tmp_path_factory.mktemp("long")
    log, x = LogWriter(root / "run", info()), np.linspace(-1, 1, 16)
    rows = [
        row(step, "0.weight", "weight", summarise(x * (1000 if step == 3333 else 1 + step / 5000)))
        for step in range(5000)
    ]
    log.stats(pa.RecordBatch.from_pylist(rows, STATS))
    log.close()
    return Library(root)


def test_a_long_run_is_pooled_and_a_zoom_reads_single_captures(long_library: Library) -> None:
    whole = drawn(long_library, "run", tensor="0.weight")
    near = drawn(long_library, "run", tensor="0.weight", range="3320:3350")
    assert len(whole["histogram-weight"]["data"][0]["x"]) <= histogram.COLUMNS
    assert set(range(3320, 3351)) <= set(near["histogram-weight"]["data"][0]["x"])
    high = {trace["name"]: trace for trace in whole["history-plot"]["data"]}["weight norm, range"]
    spike = np.linalg.norm(np.linspace(-1, 1, 16) * 1000)
    assert np.nanmax(np.array(high["y"], dtype=float)) == pytest.approx(spike, rel=1e-5)
    line = {trace["name"]: trace for trace in near["history-plot"]["data"]}["weight norm"]
    assert line["y"][line["x"].index(3333)] == pytest.approx(spike, rel=1e-5)
    assert line["y"][line["x"].index(3334)] == pytest.approx(spike / 1000 * (1 + 3334 / 5000), rel=1e-5)


def test_two_steps_of_a_long_run_are_single_captures_once_picked(long_library: Library) -> None:
    ends = drawn(long_library, "run", tensor="0.weight")["steps-plot"]["data"]
    assert [trace["name"] for trace in ends] == ["steps 0 – 15", "steps 4,992 – 4,999"]
    picked = drawn(long_library, "run", tensor="0.weight", first="3333", second="3334")["steps-plot"]["data"]
    assert [trace["name"] for trace in picked] == ["step 3,333", "step 3,334"]
    frame = pd.concat(
        [long_library.run("run").histogram("weight", "0.weight", 3333 + i).assign(step=i) for i in (0, 1)]
    )
    _, _, shares = histogram.density(frame)
    for trace, column in zip(picked, shares.T, strict=True):
        np.testing.assert_allclose(trace["y"], column, rtol=1e-5, atol=1e-12)
