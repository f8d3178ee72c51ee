"""Time and logarithmic axes: the clock of a run, and the conversion of a finished figure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plotly import graph_objects as go

from layerwatch.dashboard.figures.base import Panel, line, stack, step_axis
from layerwatch.dashboard.figures.theme import LIGHT, Style, message
from layerwatch.dashboard.figures.times import AXES, KNOTS, LEAST, UNITS, Clock, shown

START = 1.7e9
EVEN = Clock.of(np.arange(0, 1000), START + 2.0 * np.arange(0, 1000))


def figure(steps: Any, window: tuple[float, float] | None = None) -> dict[str, Any]:
    steps = np.asarray(steps)
    made = stack([Panel([line(steps, np.sqrt(steps + 1), "loss", LIGHT.accent)], "loss")], Style(), window)
    mark = {"type": "line", "xref": "x", "yref": "paper", "x0": 10, "x1": 20, "y0": 0, "y1": 1}
    across = mark | {"xref": "paper", "x0": 0, "x1": 1}
    made["layout"] |= {"shapes": [mark, across], "annotations": [{"text": "a", "xref": "x", "x": 10, "y": 1}]}
    return made


def test_a_step_axis_stays_as_it_is_and_is_named_for_the_browser() -> None:
    made = shown(figure([1, 10, 20]), "step", EVEN)
    assert made["data"][0]["x"] == [1, 10, 20]
    assert made["layout"]["meta"] == {"axis": "step", "steps": ["xaxis"]}
    assert "uirevision" not in made["layout"]["xaxis"]
    assert shown(message("nothing", Style()), "wall", EVEN)["layout"]["meta"] == {
        "said": "nothing",
        "tone": "empty",
    }


def test_relative_time_takes_everything_on_the_axis_along() -> None:
    made = shown(figure([0, 10, 20], (0, 30)), "relative", EVEN, (0, 30))
    assert made["data"][0]["x"] == [0, 20, 40]
    axis = made["layout"]["xaxis"]
    assert axis["range"] == [0, 60]
    assert (axis["ticksuffix"], axis["title"]["text"]) == (" s", "time since the start")
    mark, across = made["layout"]["shapes"]
    assert (mark["x0"], mark["x1"]) == (20, 40)
    assert (across["x0"], across["x1"]) == (0, 1)
    assert made["layout"]["annotations"][0]["x"] == 20


@pytest.mark.parametrize(("seconds", "unit"), [(100, "s"), (3000, "min"), (50_000, "h"), (500_000, "d")])
def test_the_unit_fits_what_is_on_screen(seconds: float, unit: str) -> None:
    clock = Clock.of(np.array([0, 100]), np.array([START, START + seconds]))
    made = shown(figure([0, 50, 100]), "relative", clock)
    assert made["layout"]["xaxis"]["ticksuffix"].strip() == unit
    size = next(size for size, sign, _ in UNITS if sign == unit)
    np.testing.assert_allclose(made["data"][0]["x"], np.array([0, 0.5, 1]) * seconds / size, atol=1e-6)
    zoomed = shown(figure([0, 50, 100], (0, 1e-3)), "relative", clock, (0, 1e-3))
    assert zoomed["layout"]["xaxis"]["ticksuffix"] == " s"


def test_wall_time_is_in_milliseconds_on_a_date_axis() -> None:
    made = shown(figure([0, 10]), "wall", EVEN)
    assert made["data"][0]["x"] == [START * 1000, (START + 20) * 1000]
    assert made["layout"]["xaxis"]["type"] == "date"


def test_a_logarithmic_axis_has_a_place_for_step_zero() -> None:
    made = shown(figure([0, 10, 100], (1, 100)), "log", Clock())
    assert made["data"][0]["x"] == [LEAST, 10, 100]
    assert made["layout"]["xaxis"]["type"] == "log"
    assert made["layout"]["xaxis"]["range"] == [0, 2]
    assert made["layout"]["annotations"][0]["x"] == 1  # Plotly takes logarithms here,
    assert made["layout"]["shapes"][0]["x0"] == 10  # and plain values there


def test_without_a_clock_steps_are_shown() -> None:
    for clock in (
        Clock(),
        Clock.of(np.array([3]), np.array([START])),
        Clock.of(np.arange(3), np.full(3, START)),
    ):
        assert shown(figure([0, 1]), "wall", clock)["layout"]["meta"]["axis"] == "step"


def test_a_heat_map_keeps_its_steps_and_traces_of_other_runs_have_their_own_clock() -> None:
    heat = {"type": "heatmap", "x": [0, 10], "z": [[1, 2]], "meta": {"what": "norm"}}
    heat["hovertemplate"] = "step %{x:,d}<br>%{z}"  # pyright: ignore[reportArgumentType]
    other = {"type": "scatter", "x": [0, 10], "y": [1, 2], "meta": {"run": "slow"}}
    beside = {"type": "bar", "x": [5, 6], "y": [1, 2], "xaxis": "x2"}
    made = {"data": [heat, other, beside], "layout": {"xaxis": step_axis(), "xaxis2": {}}}
    slow = Clock.of(np.array([0, 10]), np.array([START + 5000, START + 5100]))
    converted = shown(made, "relative", EVEN, (0, 20), {"slow": slow})["data"]
    assert converted[0]["meta"] == {"what": "norm", "steps": [0, 10]}
    assert converted[0]["hovertemplate"] == "%{x}<br>%{z}"
    assert converted[0]["x"] == [0, 20]
    assert converted[1]["x"] == [0, 100]
    assert converted[2] == beside


def test_steps_taken_again_after_a_restart_count_when_they_came_last() -> None:
    clock = Clock.of(np.array([0, 1, 2, 3, 2, 3]), START + np.array([0, 1, 2, 3, 100, 101]))
    np.testing.assert_array_equal(clock.at(np.array([0, 1, 2, 3])) - START, [0, 1, 100, 101])


PAIRS = st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1e6)), min_size=2, max_size=500)


@given(PAIRS, st.lists(st.floats(-1e6, 2e6), min_size=2, max_size=50))
def test_a_clock_never_goes_back(pairs: list[tuple[int, float]], steps: list[float]) -> None:
    clock = Clock.of(*np.array(pairs, dtype=float).T)
    if clock.runs:
        assert (np.diff(clock.at(np.sort(steps))) >= -1e-6).all()


@given(st.integers(2, 5000), st.integers(0, 4000), st.integers(1, 4000))
def test_few_knots_describe_a_clock_and_stay_while_it_grows(count: int, low: int, width: int) -> None:
    steps = np.arange(count, dtype=float)
    clock = Clock.of(steps, START + np.cumsum(1 + steps % 7))
    window = (float(low), float(low + width))
    knots = clock.knots(window)
    assert len(knots) <= 2 * KNOTS + 6
    assert {0.0, float(count - 1)} <= set(knots)
    longer = Clock.of(np.arange(count + 1.0), START + np.arange(count + 1.0))
    if count not in (2**power * KNOTS for power in range(12)):
        whole = clock.knots(None)
        assert set(whole[:-1]) - {float(count - 1)} <= set(longer.knots(None))


@pytest.mark.parametrize("axis", AXES)
def test_plotly_accepts_every_axis(axis: str) -> None:
    made = shown(figure(np.arange(0, 100, 10), (0, 50)), axis, EVEN, (0, 50))
    assert go.Figure(made).to_dict()["layout"]["meta"]["axis"] == axis
