"""Overfitting: pairs of metrics, early stopping against a slow twin, growth, the figure."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwatch.dashboard.figures.overfitting import overfitting, signed_gap
from layerwatch.dashboard.figures.theme import Style
from layerwatch.dashboard.pages import overfitting as page
from layerwatch.dashboard.pairs import Pair, metric_of, pairs
from layerwatch.dashboard.queries import Library
from layerwatch.dashboard.shell import open_page
from layerwatch.dashboard.stopping import advice
from layerwatch.dashboard.urls import View
from layerwatch.monitor.detectors.validation import Stop, early_stop
from layerwatch.monitor.growth import ALL, drift_growth, weight_growth
from tests.dashboard.test_figures import frame
from tests.dashboard.test_pages import controls, figures, text

WIDE = {"theme": "light", "narrow": False}


def replay(
    val: pd.DataFrame, patience: int, delta: float = 0.0, *, falls: bool = True, end: int
) -> Stop | None:
    """`early_stop` on a frame."""
    steps, values = val["step"].to_numpy(np.int64), val["value"].to_numpy(np.float64)
    return early_stop(steps, values, patience, delta, falls=falls, end=end)


def slow_stop(values: list[float], patience: int, delta: float, falls: bool) -> tuple[int, int | None]:
    """The rule as one would write it in a training loop: the place that is kept, the place of the stop."""
    best, kept, bad = None, None, 0
    for place, value in enumerate(values):
        gain = None if best is None else (best - value if falls else value - best)
        if math.isfinite(value) and (best is None or (gain is not None and gain > delta * abs(best))):
            best, kept, bad = value, place, 0
        elif best is not None:
            bad += 1
        if bad >= patience:
            assert kept is not None
            return kept, place
    assert kept is not None
    return kept, None


@given(
    st.lists(st.one_of(st.floats(0.1, 10), st.just(float("nan"))), min_size=1, max_size=40),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.01, 0.2]),
    st.booleans(),
)
def test_early_stopping_does_what_a_training_loop_would(
    values: list[float], patience: int, delta: float, falls: bool
) -> None:
    val = frame(values, 10)
    stop = replay(val, patience, delta, falls=falls, end=len(values) * 10)
    if not np.isfinite(values).any():
        assert stop is None
        return
    assert stop is not None
    kept, at = slow_stop(values, patience, delta, falls)
    assert (stop.kept, stop.at) == (kept * 10, None if at is None else at * 10)
    extreme = np.nanmin(values) if falls else np.nanmax(values)
    assert stop.best_value == extreme
    assert stop.saved == (0 if at is None else len(values) * 10 - at * 10)


def test_the_advice_names_patience_what_it_kept_and_what_it_saved() -> None:
    val = pd.DataFrame({"step": [9, 19, 29, 39, 49], "value": [2.0, 1.0, 1.5, 3.0, 0.9]})
    said = advice(replay(val, 2, 0.01, end=99), 2, 0.01, 0.9)
    assert "Patience 2, improvements of at least 1 %" in said
    assert "stopped at step 39, kept step 19 (1) and saved 60 of 99 steps" in said
    assert "missed the best one at step 49" in said
    falling = pd.DataFrame({"step": [9, 19], "value": [2.0, 1.0]})
    assert "no reason to stop" in advice(replay(falling, 3, end=19), 3, 0.0, 1.0)
    turned = val.iloc[:3]
    assert "would not have stopped" in advice(replay(turned, 5, end=99), 5, 0.0, 1.5)
    assert "nothing to stop by" in advice(None, 3, 0.0, math.nan)


def test_pairs_are_found_by_name_losses_first() -> None:
    names = ["lr", "train_accuracy", "train_loss", "val/f1", "val_accuracy", "val_loss", "eval_perplexity"]
    found = pairs(names)
    assert found[0] == Pair("loss", "train_loss", "val_loss")
    assert Pair("accuracy", "train_accuracy", "val_accuracy") in found
    assert Pair("f1", "", "val/f1") in found
    assert Pair("perplexity", "", "eval_perplexity") in found
    assert [pair.falls for pair in found] == [True, False, False, True]
    assert pairs(["loss", "eval_loss"]) == [Pair("loss", "loss", "eval_loss")]
    assert pairs(["lr"]) == []


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("train_loss", ("loss", "train")),
        ("validation/top.1", ("top.1", "val")),
        ("value_loss", ("value_loss", "")),
        ("trainer", ("trainer", "")),
        ("", ("", "")),
    ],
)
def test_a_name_says_its_metric_and_its_half(name: str, metric: tuple[str, str]) -> None:
    assert metric_of(name) == metric


def test_the_gap_of_an_accuracy_is_positive_when_validation_is_worse() -> None:
    found = signed_gap(frame([0.9, 0.9]), frame([0.5, 0.6]), falls=False)
    assert found["gap"].tolist() == pytest.approx([0.4, 0.3])
    assert found["train"].tolist() == pytest.approx([0.9, 0.9])


def test_weight_growth_is_the_norm_over_all_layers(library: Library) -> None:
    run = library.run("healthy")
    by_step = run.stats("weight").groupby("step")["norm"].apply(lambda norms: np.sqrt((norms**2).sum()))
    found = weight_growth(run)
    np.testing.assert_allclose(found[ALL]["value"], by_step / by_step.iloc[0])
    ratios = run.stats("weight").groupby("tensor")["norm"].agg(lambda norms: norms.iloc[-1] / norms.iloc[0])
    matrices = [name for name in ratios.index if name.endswith(".weight")]
    assert list(found)[1] == ratios[matrices].idxmax()


def test_drift_growth_is_the_distance_over_all_layers(library: Library) -> None:
    run = library.run("healthy")
    drift = run.drift()
    squares = drift.assign(moved=drift["distance"] ** 2, size=drift["reference_norm"] ** 2)
    sums = squares.groupby("step")[["moved", "size"]].sum()
    by_step = np.sqrt(sums["moved"] / sums["size"])
    np.testing.assert_allclose(drift_growth(run)[ALL]["value"], by_step, rtol=1e-5)


def test_the_figure_marks_the_best_step_the_stop_and_the_noise() -> None:
    train, val = frame([3.0, 2.0, 1.5, 1.0, 0.9, 0.8, 0.7, 0.6]), frame([3.0, 2.0, 2.5, 2.6], 2)
    stop = replay(val, 2, end=7)
    figure = overfitting(train, val, Style(), stop=stop, relative=True)
    assert go.Figure(figure)
    best = next(trace for trace in figure["data"] if trace["name"].startswith("best validation"))
    assert (best["x"], best["y"]) == ([2], [2.0])
    assert [shape["x0"] for shape in figure["layout"]["shapes"]] == [2, 6]
    assert figure["layout"]["annotations"][0]["text"] == "early stop"
    band = [trace for trace in figure["data"] if trace["name"] == "noise"]
    assert len(band) == 2
    relative = next(trace for trace in figure["data"] if trace["name"] == "gap ÷ training")
    gaps = signed_gap(train, val, True)
    np.testing.assert_allclose(relative["y"], gaps["gap"] / gaps["train"], rtol=1e-6)


def test_a_link_chooses_metric_patience_and_gap(library: Library) -> None:
    params = {"patience": "2", "delta": "0.05", "gap": "relative", "pair": "nonsense"}
    _, _, body = open_page(library, View("overfitting", "vanishing", params), {})
    values = controls(body)
    assert (values["patience"], values["delta"], values["gap"], values["pair"]) == (
        2,
        "0.05",
        "relative",
        "loss",
    )
    assert "Patience 2" in text(body)
    drawn = figures(library, "overfitting", "vanishing", WIDE, **params)
    assert drawn["overfitting-plot"]["data"]
    assert drawn["growth-plot"]["data"]


@pytest.mark.parametrize(
    ("said", "meant"), [("7", 7), ("", 3), (None, 3), ("-4", 1), ("1e9", 100), ("nan", 3), (5, 5)]
)
def test_a_patience_that_makes_no_sense_is_mended(said: Any, meant: int) -> None:
    assert page.patience_of(said) == meant


def test_overfitting_says_how_to_log_a_validation_loss(library: Library) -> None:
    _, _, body = open_page(library, View("overfitting", "finetune"), {})
    assert "watcher.log(val_loss=" in text(body)
