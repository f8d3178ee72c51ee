"""Where two runs part, against searches by definition."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from layerwatch.monitor.parting import FEWEST, FOR_GOOD, TOLERANCE, difference, matched, pair, part


class Table(NamedTuple):
    tensors: list[str]
    steps: NDArray[np.int64]
    values: NDArray[np.float64]


def table(
    values: NDArray[np.float64], steps: NDArray[np.int64] | None = None, names: str = "abcdef"
) -> Table:
    count = values.shape[1]
    return Table(list(names[: len(values)]), np.arange(count) if steps is None else steps, values)


def twin(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[int, int] | None:
    """(column, row) by definition: every number looked at on its own."""
    found: list[tuple[int, float, int]] = []
    rows, count = a.shape
    for row in range(rows):
        far = [
            math.nan if math.isnan(x - y) else abs(x - y) / max(abs(x), abs(y), 1e-300)
            for x, y in zip(a[row], b[row], strict=True)
        ]
        for column in range(count):
            rest = [d for d in far[column:] if not math.isnan(d)]
            away = sum(d > TOLERANCE for d in rest)
            if far[column] > TOLERANCE and len(rest) >= min(FEWEST, count) and away >= FOR_GOOD * len(rest):
                found.append((column, -far[column], row))
                break
    return (min(found)[0], min(found)[2]) if found else None


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 12))
def test_parting_is_the_first_number_that_leaves_for_good(seed: int, rows: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.uniform(0.5, 2, (rows, count))
    b = a * np.where(rng.random((rows, count)) < 0.5, 1.0, rng.uniform(0.7, 1.4, (rows, count)))
    b[rng.random((rows, count)) < 0.1] = np.nan
    found, expected = part({"weight": (table(a), table(b))}), twin(a, b)
    assert found.compared == count
    if expected is None:
        assert found.step is None
    else:
        column, row = expected
        assert (found.step, found.tensor, found.a, found.b) == (
            column,
            "abcdef"[row],
            a[row, column],
            b[row, column],
        )


def test_equal_numbers_are_said_to_be_equal_until_the_first_that_is_not() -> None:
    steps = np.arange(0, 200, 10)
    a = np.outer([1.0, 2.0, 3.0], np.linspace(1, 2, 20))
    b = a.copy()
    b[2, 13:] *= 1 + 1e-12
    b[1, 15:] *= 1.5
    weight = (table(a, steps), table(b, steps))
    found = part({"weight": weight, "gradient": (table(a, steps), table(a.copy(), steps))})
    assert (found.identical_until, found.identical) == (120, False)
    assert (found.step, found.tensor, found.kind) == (150, "b", "weight")
    assert (found.a, found.b) == (a[1, 15], b[1, 15])
    same = part({"weight": (weight[0], weight[0])})
    assert (same.identical_until, same.identical, same.step) == (190, True, None)


def test_an_excursion_is_no_parting_and_neither_is_a_last_capture() -> None:
    a = np.ones((1, 30))
    b = a.copy()
    b[0, 7:9] = 5.0
    b[0, 29] = 5.0
    found = part({"gradient": (table(a), table(b))})
    assert (found.step, found.identical_until) == (None, 6)
    b[0, 20:] = 5.0
    assert part({"gradient": (table(a), table(b))}).step == 20


def test_runs_without_a_common_layer_or_step_are_not_compared() -> None:
    a, b = table(np.ones((2, 5))), table(np.ones((2, 5)), names="xy")
    assert part({"weight": (a, b)}).compared == 0
    assert part({"weight": (a, table(np.ones((2, 5)), np.arange(100, 105)))}).compared == 0
    assert part({}).compared == 0
    both = pair(a, table(np.ones((2, 5)), names="bx"))
    assert (both.tensors, both.only_a, both.only_b) == (["b"], ["a"], ["x"])


@given(
    st.sets(st.integers(0, 300), min_size=1, max_size=40),
    st.sets(st.integers(0, 300), min_size=1, max_size=40),
)
def test_captures_are_matched_once_and_to_the_nearest(first: set[int], second: set[int]) -> None:
    a, b = np.array(sorted(first)), np.array(sorted(second))
    here, there, exact = matched(a, b)
    assert len(set(here.tolist())) == len(here) == len(there) == len(set(there.tolist()))
    assert (np.diff(here) > 0).all()
    assert (np.diff(there) > 0).all()
    if exact:
        assert set(a[here].tolist()) == set(b[there].tolist()) == first & second
        return
    coarse, fine, one, other = (a, b, here, there) if len(a) <= len(b) else (b, a, there, here)
    for i, j in zip(one, other, strict=True):
        assert abs(fine[j] - coarse[i]) == np.abs(fine - coarse[i]).min()


def test_different_cadences_meet_at_the_nearest_captures() -> None:
    here, _, exact = matched(np.arange(0, 1000, 50), np.arange(3, 1000, 7))
    assert not exact
    assert len(here) == 20
    found = part(
        {
            "weight": (
                table(np.ones((1, 20)), np.arange(0, 1000, 50)),
                table(np.ones((1, 143)), np.arange(3, 1000, 7)),
            )
        }
    )
    assert (found.identical_until, found.identical, found.step) == (None, False, None)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [(1.0, 0.9, 0.1), (0.0, 0.0, 0.0), (-1.0, 1.0, 2.0), (0.0, 3.0, 1.0), (np.nan, 1.0, np.nan)],
)
def test_a_difference_is_a_share_of_the_larger(a: float, b: float, expected: float) -> None:
    assert difference(np.array([a]), np.array([b]))[0] == pytest.approx(expected, nan_ok=True)
