"""The maps of Gradient flow and Drift: cells, pooling, quantities against a slow twin."""

from __future__ import annotations

import numpy as np
import pytest

from layerwatch.dashboard.figures import cells

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("log", [False, True])
def test_cells_give_back_what_they_were_made_of(log: bool, each: bool) -> None:
    values = 10 ** RANDOM.normal(-4, 2, (7, 30))
    trace = cells.cells(values, log=log, what="gradient norm", unit=" %", each=each)
    got = cells.values_of(trace)
    close = np.allclose(got, values, rtol=2e-3) if log else np.abs(got - values).max() < values.max() / 1e4
    assert close
    with_gap = values.copy()
    with_gap[2, 3], with_gap[4, 4] = np.nan, np.inf
    trace = cells.cells(with_gap, log=log, what="x", each=each)
    assert trace["z"]["dtype"] == "f4"  # int16 has no empty cell
    assert np.argwhere(np.isnan(cells.values_of(trace))).tolist() == [[2, 3], [4, 4]]
    assert trace["meta"]["log"] is log


def test_cells_take_two_bytes_unless_an_outlier_would_hide_the_others() -> None:
    values = RANDOM.random((5, 40))
    assert cells.cells(values, log=False, what="x")["z"]["dtype"] == "i2"
    values[0, 0] = 1e6
    spiked = cells.cells(values, log=False, what="x")
    assert spiked["z"]["dtype"] == "f4"
    assert np.allclose(cells.values_of(spiked), values, rtol=1e-6)


def test_cells_of_one_value_and_of_zeros() -> None:
    for value in (0.0, 0.3, -7.0, 1e-30):
        trace = cells.cells(np.full((2, 3), value), log=False, what="x")
        assert trace["z"]["dtype"] == "i2"
        assert np.allclose(cells.values_of(trace), value, rtol=1e-3, atol=0)
    trace = cells.cells(np.array([[0.0, 0.7, 0.1], [0.0, 0.2, 0.9]]), log=False, what="x")
    assert (cells.values_of(trace)[:, 0] == 0).all()  # zero stays exactly zero


def test_old_cells_stay_when_a_run_grows() -> None:
    values = 10 ** RANDOM.normal(-3, 1, (5, 60))
    before, after = (cells.cells(values[:, :n], log=True, what="x") for n in (50, 51))
    assert before["meta"] == after["meta"]


def test_limits_in_cells() -> None:
    values = 10 ** RANDOM.normal(-3, 1, (5, 60))
    trace = cells.cells(values, log=True, what="x")
    z = cells.to_z(trace["meta"], -3.0)
    assert trace["meta"]["offset"] + trace["meta"]["factor"] * z == pytest.approx(-3)
