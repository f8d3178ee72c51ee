"""Patches between two states of a figure: applied to the old one they give the new one; they are small."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from layerwatch.dashboard.figures.base import line, packed, thin
from layerwatch.dashboard.figures.cells import cells
from layerwatch.dashboard.figures.diff import SHORT, difference
from layerwatch.dashboard.figures.theme import LIGHT
from tests.dashboard.patches import apply


def size(patch: Any) -> int:
    return len(json.dumps(patch, separators=(",", ":")))


SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=3)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from("abcxyz"), inner, max_size=4),
    max_leaves=25,
)


@given(JSON, JSON)
def test_any_two_values(old: Any, new: Any) -> None:
    patch = difference(old, new)
    assert json.dumps(apply(old, patch)) == json.dumps(new) or apply(old, patch) == new
    assert (patch is None) == (json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True))


@given(st.lists(SCALARS, max_size=20), st.lists(SCALARS, max_size=5), st.integers(0, 3))
def test_a_longer_list_brings_its_tail_only(old: list[Any], tail: list[Any], back: int) -> None:
    new = old[: max(len(old) - back, 0)] + tail
    patch = difference({"x": old}, {"x": new})
    assert apply({"x": old}, patch) == {"x": new}
    if back == 0 and len(old) >= SHORT and tail and not any(isinstance(v, dict | list) for v in new):
        assert patch == {"in": {"x": {"from": len(old), "tail": tail}}}


MATRICES = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 4), st.integers(0, 2**32 - 1))


@given(MATRICES, st.sampled_from([np.int16, np.float32]), st.integers(0, 4), st.integers(0, 3))
def test_a_matrix_that_grows(
    shape: tuple[int, int, int, int], kind: type[Any], rows_changed: int, columns_changed: int
) -> None:
    rows, columns, more, seed = shape
    rng = np.random.default_rng(seed)
    old = rng.integers(-9, 9, (rows, columns)).astype(kind)
    if kind is np.float32:
        old[rng.random(old.shape) < 0.1] = np.nan
    new = np.concatenate([old, rng.integers(-9, 9, (rows, more)).astype(kind)], axis=1)
    new[:rows_changed] = 7
    new[:, max(columns - columns_changed, 0) : columns] = -5
    first, second = _matrix(old), _matrix(new)
    assert apply(first, difference(first, second)) == second
    assert difference(second, json.loads(json.dumps(second))) is None


def _matrix(values: np.ndarray) -> dict[str, Any]:
    text = base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
    return {"dtype": values.dtype.str[1:], "bdata": text, "shape": f"{values.shape[0]}, {values.shape[1]}"}


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_a_vector_of_bytes(same: int, before: int, after: int) -> None:
    rng = np.random.default_rng(before)
    head = rng.random(same)
    old, new = (packed(np.concatenate([head, rng.random(n)])) for n in (before, after))
    assert apply(old, difference(old, new)) == new


def test_a_new_capture_of_200_layers_is_one_column() -> None:
    values = 10 ** np.random.default_rng(0).uniform(-5, 1, (200, 501))
    values[0, 0], values[1, 0] = 1e-6, 1e2
    old, new = (cells(part, log=True, what="norm") for part in (values[:, :500], values))
    patch = difference(old, new)
    assert apply(old, patch) == new
    assert size(patch) < 200 * 2 * 4 / 3 + 200


def test_colours_per_layer_resend_the_layers_whose_range_changed() -> None:
    values = np.random.default_rng(0).uniform(1, 2, (50, 101))
    values[:, :2] = (0, 3)
    values[7, 100] = 5
    old, new = (cells(part, log=False, what="norm", each=True) for part in (values[:, :100], values))
    patch = difference(old, new)
    assert apply(old, patch) == new
    assert patch is not None
    assert patch["in"]["z"]["rows"] == [7]


def test_a_long_curve_that_grows_by_one_point_is_a_few_bytes() -> None:
    values = np.random.default_rng(0).normal(size=100_001)
    old, new = (line(np.arange(n), values[:n], "loss", LIGHT.accent) for n in (100_000, 100_001))
    patch = difference(old, new)
    assert apply(old, patch) == new
    assert size(patch) < 200


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=3000), st.integers(10, 200))
def test_thinning_is_stable_while_a_curve_grows(values: list[float], limit: int) -> None:
    data = np.array(values)
    less = thin(np.arange(len(data) - 1), data[:-1], limit)
    more = thin(np.arange(len(data)), data, limit)
    new = set(more) - set(less)
    doubled = len(less) > 1.3 * len(more)  # bins became twice as wide
    assert doubled or len(new) <= 3
