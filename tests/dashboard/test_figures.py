"""Figures as pure functions: the numbers in them are the numbers that went in."""

from __future__ import annotations

import base64
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwatch.dashboard.figures import (
    cells,
    compare,
    curves,
    grid,
    histogram,
    layer,
    layermap,
    loss,
    norms,
    overfitting,
)
from layerwatch.dashboard.figures.base import line, log_axis, packed, smooth, thin
from layerwatch.dashboard.figures.cells import values_of
from layerwatch.dashboard.figures.theme import DARK, LIGHT, Style, message, template, wrap

STYLES = [Style(LIGHT), Style(DARK), Style(LIGHT, narrow=True)]


def frame(values: list[float], every: int = 1) -> pd.DataFrame:
    return pd.DataFrame(
        {"step": np.arange(len(values)) * every, "time": 0.0, "value": np.array(values, dtype=float)}
    )


def unpack(spec: dict[str, Any]) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(spec["bdata"]), dtype=np.float32)
    return flat.reshape([int(n) for n in spec["shape"].split(",")]) if "shape" in spec else flat


@pytest.mark.parametrize("style", STYLES, ids=["light", "dark", "narrow"])
def test_plotly_accepts_every_figure(style: Style) -> None:
    """go.Figure refuses an unknown property, which the browser would ignore without a word."""
    rows = pd.DataFrame({"tensor": ["a", "a", "b", "b"], "step": [0, 1, 0, 1]})
    whole = grid.build(rows, np.array([1.0, 2.0, 3.0, np.nan]), np.array([False, False, False, True]))
    buckets = pd.DataFrame(
        {"step": [0, 0, 1], "low": [-1.0, 0.0, 0.5], "high": [-0.5, 0.0, 1.0], "count": [3, 1, 4]}
    )
    bands = pd.DataFrame(
        {
            "step": [0, 1],
            **{q: [0.0, 1.0] for q in ("min", "p01", "p05", "p25", "p50", "p75", "p95", "p99", "max")},
        }
    )
    ratio = pd.DataFrame({"step": [0, 1], "ratio": [1e-3, 1e-2]})
    figures = [
        loss.loss(frame([3, 2, np.nan, 1]), frame([3, 2], 2), [], style, 0.5, True, (0, 2)),
        overfitting.overfitting(frame([3, 2, 1]), frame([3, 4], 2), style),
        overfitting.growth({"all layers": frame([1, 2])}, {"all layers": frame([0, 1])}, style),
        layermap.layer_map(whole, "gradient norm", style, colors="robust", at=0),
        layermap.layer_map(whole, "drift", style, log=False, colors="layer", bars=True, steps=(0, 1)),
        histogram.histogram_map(buckets, "weight", style),
        histogram.histogram_map(buckets, "weight", style, log=True, steps=(0, 1)),
        histogram.ridgeline(buckets, "weight", style, log=True),
        histogram.ridgeline(buckets, "weight", style),
        layer.quantiles(bands, "weight", style),
        layer.vector(np.arange(3), np.ones((3, 2)), "b", style),
        layer.vector(np.arange(3), np.random.randn(3, 20), "b", style),
        layer.activity(np.arange(3), np.ones((3, 300), dtype=bool), style),
        norms.history([norms.Series(ratio, "ratio", "update ratio", "third", log=True)], style),
        curves.small_multiples(
            {"lr": frame([1, 1]), "grad_norm": frame([1e-4, 10])}, style, curves.Look(0.3)
        ),
        compare.overlay({"a": frame([1, 2]), "b": frame([2, 1])}, "train_loss", style, 0.3, True),
        message("nothing <b>here</b>", style),
    ]
    for figure in figures:
        layout = figure["layout"] | {"template": template(style.palette)}
        assert go.Figure({"data": figure["data"], "layout": layout}).to_dict()["layout"]


def test_the_loss_is_drawn_as_it_was_logged() -> None:
    values = [2.5, 1.25, 0.1234567891]
    figure = loss.loss(frame(values), frame([], 1), [], Style())
    assert figure["data"][0]["x"] == [0, 1, 2]
    assert figure["data"][0]["y"] == [2.5, 1.25, 0.1234568]


def test_the_gap_takes_the_mean_training_loss_since_the_last_validation() -> None:
    found = loss.gap(frame([4, 2, 1, 3]), pd.DataFrame({"step": [1, 3], "value": [5.0, 6.0]}))
    assert found["train"].tolist() == [3.0, 2.0]
    assert found["gap"].tolist() == [2.0, 4.0]


def test_a_gap_without_training_loss_in_between_is_interpolated() -> None:
    train = pd.DataFrame({"step": [0, 10], "value": [4.0, 2.0]})
    val = pd.DataFrame({"step": [0, 5], "value": [4.0, 4.0]})
    assert loss.gap(train, val)["gap"].tolist() == [0.0, 1.0]


def test_steps_without_a_finite_loss_are_marked() -> None:
    figure = loss.loss(frame([1, np.nan, np.inf, 2]), frame([]), [], Style())
    marks = next(trace for trace in figure["data"] if trace["name"] == "train not finite")
    assert [x for x, y in zip(marks["x"], marks["y"], strict=True) if y is not None] == [1, 2]


def test_findings_get_a_lane_and_a_line_where_they_begin() -> None:
    class Found:
        problem, severity, first_step, last_step, summary = "dead_units", "critical", 3, 9, "why"

    figure = loss.loss(frame([1] * 10), frame([]), [Found()], Style())
    lane = next(trace for trace in figure["data"] if trace["name"] == "Dead units")
    assert lane["x"] == [3, 9]
    assert lane["line"]["color"] == LIGHT.critical
    assert [shape["x0"] for shape in figure["layout"]["shapes"]] == [3]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5000), st.integers(10, 200))
def test_thinning_keeps_ends_and_extremes(values: list[float], limit: int) -> None:
    data = np.array(values)
    index = thin(np.arange(len(data)), data, limit)
    assert index[0] == 0
    assert index[-1] == len(data) - 1
    assert data[index].max() == data.max()
    assert data[index].min() == data.min()
    assert len(index) <= max(limit + 2, min(len(data), limit))


def test_a_spike_survives_in_a_line_of_a_hundred_thousand_points() -> None:
    values = np.zeros(100_000)
    values[54_321] = 7.0
    trace = line(np.arange(100_000), values, "x", LIGHT.accent)
    assert len(trace["x"]) <= 1002
    assert trace["y"][trace["x"].index(54_321)] == 7.0


def test_a_zoom_into_a_long_loss_shows_every_point_of_it() -> None:
    values = np.random.rand(50_000).tolist()
    figure = loss.loss(frame(values), frame([]), [], Style(), steps=(1000, 1500))
    trace = figure["data"][0]
    assert trace["x"] == list(range(999, 1502))
    np.testing.assert_allclose(trace["y"], values[999:1502], rtol=1e-6)


def test_smoothing_has_no_bias_at_the_start() -> None:
    assert smooth(np.array([5.0, 5.0, 5.0]), 0.9).tolist() == pytest.approx([5, 5, 5])
    # by hand: weights 1 and 0.5 on the values 1 and 4
    assert smooth(np.array([4.0, 1.0]), 0.5)[1] == pytest.approx((1 + 0.5 * 4) / 1.5)


def test_pooling_keeps_every_spike_and_every_bad_cell() -> None:
    values = np.random.rand(1000, 3000)
    values[777, 2345] = 50.0
    bad = np.zeros(values.shape, dtype=bool)
    bad[12, 34] = True
    whole = grid.Grid([f"layer.{i}" for i in range(1000)], np.arange(3000), values, bad)
    small = grid.pool(whole)
    assert small.values.shape == (334, 375)  # 3 layers and 8 captures each
    assert small.values.max() == 50.0
    assert small.bad.sum() == 1


def test_a_cell_never_captured_stays_empty() -> None:
    rows = pd.DataFrame({"tensor": ["a", "b"], "step": [0, 1]})
    built = grid.build(rows, np.array([1.0, 2.0]))
    assert np.isnan(built.values).tolist() == [[False, True], [True, False]]
    assert np.isnan(grid.pool(built, 1, 1).values).tolist() == [[False]]


def test_the_map_holds_the_numbers_and_red_where_they_are_not_finite() -> None:
    rows = pd.DataFrame({"tensor": ["a", "a", "b", "b"], "step": [0, 5, 0, 5]})
    whole = grid.build(rows, np.array([1.0, 10.0, 100.0, 1000.0]), np.array([False, True, False, False]))
    figure = layermap.layer_map(whole, "gradient norm", Style(), colors="full")
    heat, red, profile = figure["data"]
    np.testing.assert_allclose(cells.values_of(heat), [[1.0, 10.0], [100.0, 1000.0]], rtol=1e-3)
    assert [heat["meta"]["offset"] + heat["meta"]["factor"] * heat[end] for end in ("zmin", "zmax")] == [0, 3]
    assert np.nan_to_num(unpack(red["z"])).tolist() == [[0, 1], [0, 0]]
    assert profile["x"] == [10.0, 1000.0]
    assert figure["layout"]["yaxis"]["categoryarray"] == ["b", "a"]  # from the bottom up


def test_robust_colours_ignore_one_outlier() -> None:
    values = np.concatenate([np.linspace(0, 1, 1000), [1e6]])
    assert grid.limits(values, "robust")[1] < 2
    assert grid.limits(values, "full")[1] == 1e6


def test_order_by_name_counts_numbers_and_by_badness_puts_nan_first() -> None:
    names = ["layer.10", "layer.9", "layer.2"]
    bad = np.array([[False], [False], [True]])
    whole = grid.Grid(names, np.array([0]), np.array([[1.0], [1e-9], [1.0]]), bad)
    assert grid.order(whole, "name", True).names == ["layer.2", "layer.9", "layer.10"]
    assert grid.order(whole, "badness", True).names == ["layer.2", "layer.9", "layer.10"]
    assert grid.order(whole, "depth", True).names == names


def test_densities_add_to_one_and_do_not_depend_on_the_buckets() -> None:
    """A uniform distribution stays flat on a linear axis although its log buckets get ever wider."""
    edges = 2.0 ** np.arange(-8, 1)
    buckets = pd.DataFrame({"step": 0, "low": edges[:-1], "high": edges[1:], "count": np.diff(edges) * 1e6})
    _, bins, shares = histogram.density(buckets)
    assert shares.sum() == pytest.approx(1, abs=0.002)
    inside = shares[(bins[:-1] > 0.02) & (bins[1:] < 0.98), 0]
    assert inside.max() / inside.min() == pytest.approx(1, abs=0.01)


def test_the_log_axis_is_symmetric_and_gathers_zero_and_dust_in_the_middle() -> None:
    buckets = pd.DataFrame(
        {
            "step": [0] * 4,
            "low": [-1.0, 0.0, 1e-12, 0.5],
            "high": [-0.5, 0.0, 2e-12, 1.0],
            "count": [3, 2, 1, 4],
        }
    )
    _, rows, shares, _ = histogram.log_density(buckets)
    assert rows[0] == -rows[-1]
    assert shares[rows == 0].sum() == pytest.approx(0.3)
    assert shares[rows > 0].sum() == pytest.approx(0.4)
    assert shares.sum() == pytest.approx(1)


@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=20))
def test_a_log_axis_has_at_least_two_and_at_most_nine_labels_inside_its_range(values: list[float]) -> None:
    axis = log_axis(np.array(values))
    assert 2 <= len(axis["tickvals"]) <= 9
    assert all(
        axis["range"][0] - 0.3 <= np.log10(tick) <= axis["range"][1] + 0.3 for tick in axis["tickvals"]
    )


def test_a_small_bias_is_lines_and_a_large_one_a_map() -> None:
    few = layer.vector(np.arange(2), np.array([[1.0, 2.0], [3.0, 4.0]]), "b", Style())
    assert [trace["y"] for trace in few["data"]] == [[1.0, 3.0], [2.0, 4.0]]
    many = layer.vector(np.arange(2), np.arange(20.0).reshape(2, 10), "b", Style())
    np.testing.assert_allclose(values_of(many["data"][0]), np.arange(20.0).reshape(2, 10).T, atol=1e-3)


def test_an_empty_frame_says_why_there_is_nothing() -> None:
    empty = pd.DataFrame({"step": [], "low": [], "high": [], "count": []})
    figure = histogram.histogram_map(empty, "update", Style())
    assert "No update histogram" in figure["layout"]["meta"]["said"]


def test_texts_from_a_log_cannot_bring_markup() -> None:
    assert wrap("<a href='x'>layer</a>", 80).startswith("&lt;a")


def test_stacked_panels_share_one_step_axis() -> None:
    figure = overfitting.growth({"a": frame([2, 1])}, {"a": frame([1, 2])}, Style())
    assert {trace["xaxis"] for trace in figure["data"]} == {"x"}
    assert "xaxis2" not in figure["layout"]
    domains = sorted(figure["layout"][key]["domain"] for key in figure["layout"] if key.startswith("yaxis"))
    assert all(low[1] < high[0] for low, high in pairwise(domains))


def test_packed_arrays_round_trip() -> None:
    values = np.array([[1.5, np.nan], [-2.25, 1e-20]])
    assert np.array_equal(unpack(packed(values)), values.astype(np.float32), equal_nan=True)
