"""The data of a plot as a table: what is downloaded is what is shown."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from werkzeug.test import Client

from layerwatch import __version__
from layerwatch.dashboard.downloads import file_name
from layerwatch.dashboard.figures import histogram
from layerwatch.dashboard.figures.cells import cells
from layerwatch.dashboard.figures.escape import escaped
from layerwatch.dashboard.figures.table import table_of
from layerwatch.dashboard.figures.theme import Style
from layerwatch.dashboard.pages import PAGES
from layerwatch.dashboard.queries import Library

LOCAL = {"Host": "localhost"}


def ask(client: Client, plot: str, form: str = "csv", run: str = "healthy", **state: Any) -> Any:
    asked = {"plot": plot, "format": form, "run": run, "state": state, "screen": {"theme": "dark"}}
    return client.post("/api/data", json=asked, headers=LOCAL)


def table(answer: Any) -> pd.DataFrame:
    assert answer.status_code == 200, answer.text
    if answer.content_type.startswith("text/csv"):
        return pd.read_csv(io.BytesIO(answer.data), keep_default_na=True)
    return pq.read_table(io.BytesIO(answer.data)).to_pandas()


# ---- figures as tables


def test_lines_become_series_step_value() -> None:
    axis = {"title": {"text": "optimizer step"}}
    data = [
        {"type": "scatter", "name": "train", "x": [0, 1, 2], "y": [3.0, None, 1.0]},
        {"type": "scatter", "name": "band", "x": [0], "y": [9.0], "meta": {"skip": True}},
    ]
    made = table_of({"data": data, "layout": {"xaxis": axis}})
    assert list(made.columns) == ["series", "step", "value"]
    assert made["series"].tolist() == ["train"] * 3
    assert made["step"].tolist() == [0, 1, 2]
    assert made["step"].dtype == np.int64
    np.testing.assert_array_equal(made["value"], [3.0, np.nan, 1.0])


def test_several_panels_are_told_apart() -> None:
    data = [
        {"type": "scatter", "name": "a", "x": [1], "y": [2.0], "yaxis": "y"},
        {"type": "scatter", "name": "a", "x": [1], "y": [4.0], "yaxis": "y2"},
    ]
    layout = {"xaxis": {"title": {"text": "time"}}, "yaxis": {"title": {"text": "loss"}},
              "yaxis2": {"title": "<b>gap</b>"}}  # fmt: skip
    made = table_of({"data": data, "layout": layout})
    assert list(made.columns) == ["panel", "series", "time", "value"]
    assert made["panel"].tolist() == ["loss", "gap"]


def test_heat_maps_become_one_row_a_cell() -> None:
    values = np.array([[1.0, 10.0, np.nan], [100.0, np.nan, 1e-3]])
    heat = {
        "type": "heatmap",
        "name": "m",
        "x": [0, 5, 10],
        "y": ["a", "b"],
        **cells(values, log=True, what="norm"),
    }
    red = cells(np.array([[np.nan] * 3, [np.nan, 1.0, np.nan]]), log=False, what="")
    marks = {"type": "heatmap", "x": [0, 5, 10], "y": ["a", "b"], "z": red["z"],
             "meta": {"skip": True, "says": "not finite"}}  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "optimizer step"}},
        "yaxis": {"title": {"text": "layer, first on top"}},
    }
    made = table_of({"data": [heat, marks], "layout": layout})
    assert list(made.columns) == ["layer", "step", "value", "not_finite"]
    shown = made.set_index(["layer", "step"])
    assert len(made) == 5
    np.testing.assert_allclose(shown.loc[("a", 5), "value"], 10.0, rtol=1e-6)
    np.testing.assert_allclose(shown.loc[("b", 10), "value"], 1e-3, rtol=1e-6)
    assert bool(shown.loc[("b", 5), "not_finite"]) is True
    assert np.isnan(shown.loc[("b", 5), "value"])
    assert ("a", 10) not in shown.index  # never captured


def test_a_signed_logarithmic_axis_gives_values() -> None:
    line = {"type": "scatter", "name": "a", "x": [-2.0, 0.0, 3.0], "y": [1.0, 2.0, 3.0]}
    layout = {"xaxis": {"title": {"text": "weight value"}}, "meta": {"floor": {"xaxis": -5}}}
    made = table_of({"data": [line], "layout": layout})
    np.testing.assert_allclose(made["weight value"], [-1e-3, 0.0, 1e-2])


@pytest.mark.parametrize("log", [False, True])
def test_ridges_are_shares_of_values(log: bool) -> None:
    """They are drawn one above the other, on positions: the table has neither."""
    edges = np.array([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0])
    frame = pd.DataFrame({"low": edges[:-1], "high": edges[1:], "count": [1, 2, 10, 2, 1]})
    frame = pd.concat([frame.assign(step=step) for step in (0, 10)])
    made = table_of(histogram.ridgeline(frame, "weight", Style(), log=log))
    assert list(made.columns) == ["series", "weight value", "value"]
    assert made["series"].unique().tolist() == ["step 0", "step 10"]
    assert made["weight value"].abs().max() == pytest.approx(2.0, rel=0.25)
    np.testing.assert_allclose(made.groupby("series")["value"].sum(), 1.0, atol=0.02)


def test_bars_beside_names_are_values_of_names() -> None:
    bars = {"type": "bar", "orientation": "h", "name": "drift", "x": [1.0, 2.0], "y": ["a", "b"]}
    made = table_of({"data": [bars], "layout": {"yaxis": {"title": {"text": "layer"}, "type": "category"}}})
    assert made.to_dict("list") == {"series": ["drift"] * 2, "layer": ["a", "b"], "value": [1.0, 2.0]}


def test_names_in_a_table_are_those_of_the_log() -> None:
    name = "<a href='https://x'>" + "n" * 200
    figure = escaped({"data": [{"type": "scatter", "name": name, "x": [1], "y": [name]}], "layout": {}})
    (trace,) = figure["data"]
    assert "<" not in trace["name"]
    assert len(trace["name"]) < 120
    (alias,) = figure["layout"]["yaxis"]["labelalias"].values()
    assert "<" not in alias
    assert table_of({"data": [{**trace, "y": [1.0]}], "layout": {}})["series"].tolist() == [name]


# ---- the route


def test_csv_and_parquet_hold_what_the_log_holds(client: Client, library: Library) -> None:
    of_csv, of_parquet = table(ask(client, "loss-plot")), table(ask(client, "loss-plot", "parquet"))
    pd.testing.assert_frame_equal(of_csv, of_parquet, check_dtype=False)
    train = of_csv[of_csv["series"] == "train"]
    logged = library.run("healthy").scalars("train_loss")
    assert train["step"].tolist() == logged["step"].tolist()
    np.testing.assert_allclose(train["value"], logged["value"], rtol=1e-6)


def test_controls_count(client: Client) -> None:
    plain, smooth = table(ask(client, "loss-plot")), table(ask(client, "loss-plot", smoothing=0.9))
    assert set(smooth["series"]) > set(plain["series"])
    part = table(ask(client, "flow-map", range="10:20"))
    cells = part[part["step"].notna()]
    assert cells["step"].between(9, 21).all()
    assert 10 < cells["step"].nunique() <= 13


def test_a_map_holds_the_norms_of_the_log(client: Client, library: Library) -> None:
    made = table(ask(client, "flow-map", "parquet"))
    logged = library.run("healthy").stats("gradient", columns=["tensor", "step", "norm"])
    cells = made[made["step"].notna()].astype({"step": "int64"})
    both = cells.merge(logged, left_on=["layer", "step"], right_on=["tensor", "step"])
    assert len(both) == len(cells) == len(logged)
    np.testing.assert_allclose(both["value"], both["norm"], rtol=2e-3)  # as exact as the colours


def test_another_step_axis_comes_beside_the_steps(client: Client) -> None:
    made = table(ask(client, "loss-plot", axis="relative"))
    assert "time since the start" in made
    train = made[made["series"] == "train"]
    assert train["step"].tolist() == list(range(60))
    assert train["time since the start"].is_monotonic_increasing


def test_parquet_says_where_it_comes_from(client: Client) -> None:
    answer = ask(client, "loss-plot", "parquet", smoothing=0.5)
    metadata = pq.read_schema(io.BytesIO(answer.data)).metadata or {}
    assert metadata[b"run"] == b"healthy"
    assert metadata[b"plot"] == b"loss-plot"
    assert json.loads(metadata[b"state"]) == {"smoothing": 0.5}
    assert metadata[b"layerwatch"] == __version__.encode()


@pytest.mark.parametrize("plot", sorted({plot.id for page in PAGES.values() for plot in page.PLOTS}))
def test_every_plot_can_be_downloaded_or_says_why_not(client: Client, plot: str) -> None:
    run = "healthy"
    answer = ask(client, plot, tensor="0.weight", **{"with": "vanishing"})
    assert answer.status_code in (200, 422), answer.text
    if answer.status_code == 422:
        assert len(answer.json["error"]) > 10
        return
    made = table(answer)
    assert len(made)
    assert made["value"].notna().any()
    assert answer.headers["Content-Disposition"] == f"attachment; filename={run}-{plot}.csv"


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"plot": "loss-plot", "format": "exe", "run": "healthy"}, 400), ([], 400), (3, 400),
        ({"plot": "nothing", "format": "csv", "run": "healthy"}, 404),
        ({"plot": "loss-plot", "format": "csv", "run": "../healthy"}, 404),
        ({"plot": ["x"], "format": "csv", "run": {}}, 404),
        ({"plot": "scalars-plot", "format": "csv", "run": "healthy", "state": 3, "screen": "x"}, 200),
    ],
)  # fmt: skip
def test_odd_questions(client: Client, asked: Any, status: int) -> None:
    answer = client.post("/api/data", json=asked, headers=LOCAL)
    assert answer.status_code in ((200, 422) if status == 200 else (status,))


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("group/exp 1", "group-exp-1-p"), ("../../etc/passwd", "etc-passwd-p"),
        ("a\r\nSet-Cookie: x", "a-Set-Cookie-x-p"),
        ("“ü”", "p"), ("x" * 500, "x" * 118 + "-p"), ('a"; filename=b', "a-filename-b-p"),
    ],
)  # fmt: skip
def test_file_names_are_safe(run: str, expected: str) -> None:
    assert file_name(run, "p") == expected
