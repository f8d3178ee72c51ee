"""The algebra of summaries: compiled kernels against the plain definition, merging, buckets, quantiles."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from layerwatch.hooks import statistics
from layerwatch.monitor import Summary, bucket_edges, merge, quantiles, summarise
from layerwatch.monitor.summary import SMALLEST_NORMAL, bucket_of

COUNTS = ("count", "zeros", "subnormals", "nans", "pos_infs", "neg_infs")
F32 = hnp.arrays(np.float32, st.integers(0, 300), elements=st.floats(width=32))
F64 = hnp.arrays(np.float64, st.integers(0, 300), elements=st.floats(-1e100, 1e100) | st.just(math.nan))
#: Values around which a bucket scheme goes wrong.
EDGES = np.array(
    [
        *(0.0, -0.0, 1.0, -1.0, 1.25, 1.5, 1.75, 2.0, 1e30, 1e-23, 3.4028235e38, -3.4028235e38),
        *(np.nextafter(np.float32(2), np.float32(0)), np.nextafter(np.float32(2.0**-126), np.float32(0))),
        *(2.0**-126, -(2.0**-126), 1e-45, -1e-45, 1e-40, math.nan, math.inf, -math.inf),
    ],
    np.float32,
)


def assert_same(got: Summary, wanted: Summary) -> None:
    """Counts, extremes and histogram are exact; sums agree to the rounding of a double."""
    for name in COUNTS:
        assert getattr(got, name) == getattr(wanted, name), name
    assert (got.min, got.max) == (wanted.min, wanted.max)
    assert got.buckets.tolist() == wanted.buckets.tolist()
    assert got.counts.tolist() == wanted.counts.tolist()
    scale = math.sqrt(wanted.sum_sq * max(wanted.count, 1))  # bounds the sum of the magnitudes
    assert got.sum == pytest.approx(wanted.sum, rel=1e-12, abs=1e-12 * scale)
    assert got.sum_sq == pytest.approx(wanted.sum_sq, rel=1e-12)


def total(summary: Summary) -> int:
    """Every element is in the histogram or in exactly one of the special counts."""
    special = summary.zeros + summary.subnormals + summary.nans + summary.pos_infs + summary.neg_infs
    return int(summary.counts.sum()) + special


# The kernels ----------------------------------------------------------------------------------------------


@given(F32)
def test_float32_kernel_is_the_plain_definition(x: NDArray[np.float32]) -> None:
    got = statistics.summarise_array(x)
    assert_same(got, summarise(x))
    assert total(got) == x.size


@given(F64)
def test_float64_kernel_is_the_plain_definition(x: NDArray[np.float64]) -> None:
    got = statistics.summarise_array(x)
    assert_same(got, summarise(x))
    assert total(got) == x.size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(values=F32)
def test_half_precision_is_summarised_by_its_exact_values(
    dtype: torch.dtype, values: NDArray[np.float32]
) -> None:
    tensor = torch.from_numpy(values).to(dtype)
    assert_same(statistics.summarise_tensor(tensor), summarise(tensor.to(torch.float64).numpy()))


@pytest.mark.parametrize("size", [2047, 2048, 2049, 10_000, 32_767, 32_768, 40_001])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_beside_every_block_boundary_are_counted(size: int, dtype: type) -> None:
    x = np.random.default_rng(size).standard_normal(size).astype(dtype)
    x[[0, 2046, -1]] = [math.nan, math.inf, 0.0]
    assert_same(statistics.summarise_array(x), summarise(x))


@pytest.mark.parametrize("value", EDGES.tolist())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_awkward_value(value: float, dtype: type) -> None:
    x = np.array([value], dtype)
    assert_same(statistics.summarise_array(x), summarise(x))


def test_all_awkward_values_together() -> None:
    got = statistics.summarise_array(EDGES.copy())
    assert_same(got, summarise(EDGES))
    assert (got.zeros, got.subnormals, got.nans, got.pos_infs, got.neg_infs) == (2, 4, 1, 1, 1)
    assert got.max == float(np.float32(3.4028235e38))


def test_float32_sums_neither_overflow_nor_vanish() -> None:
    huge = statistics.summarise_array(np.full(1000, 1e30, np.float32))
    tiny = statistics.summarise_array(np.full(1000, 1e-23, np.float32))
    assert huge.norm == pytest.approx(math.sqrt(1000) * float(np.float32(1e30)), rel=1e-12)
    assert tiny.norm == pytest.approx(math.sqrt(1000) * float(np.float32(1e-23)), rel=1e-12)


def test_counts_beyond_float32_are_exact() -> None:
    size = (1 << 24) + 3  # a float32 counter stops at 2^24
    got = statistics.summarise_tensor(torch.ones(size, dtype=torch.bfloat16))
    assert got.counts.tolist() == [size]
    assert got.sum == size


def test_empty_and_scalar_tensors() -> None:
    empty, scalar = (statistics.summarise_tensor(t) for t in (torch.empty(0, 3), torch.tensor(-2.5)))
    assert (empty.count, empty.sum, empty.min, empty.max) == (0, 0.0, math.inf, -math.inf)
    assert math.isnan(empty.mean)
    assert math.isnan(empty.std)
    assert (scalar.count, scalar.sum, scalar.min, scalar.max) == (1, -2.5, -2.5, -2.5)


def test_nothing_finite_has_no_extremes_and_no_mean() -> None:
    got = statistics.summarise_tensor(torch.tensor([math.nan, math.inf, -math.inf]))
    assert (got.finite, got.sum, got.sum_sq, got.min, got.max) == (0, 0.0, 0.0, math.inf, -math.inf)
    assert math.isnan(got.mean)


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1),
    "strided": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(5, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(4, 6, 3, 3))
    assert_same(statistics.summarise_tensor(x), summarise(x.contiguous().numpy()))


def test_sparse_gradients_count_their_implied_zeros_and_add_what_is_repeated() -> None:
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[1, 1, 3]]),
        torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.5, 0.0]]),
        (5, 2),
        check_invariants=True,
    )
    assert_same(statistics.summarise_tensor(sparse), summarise(sparse.to_dense().numpy()))


def test_complex_tensors_count_by_modulus() -> None:
    x = torch.complex(torch.tensor([3.0, 0.0, -1.0]), torch.tensor([4.0, 0.0, 0.0]))
    assert_same(statistics.summarise_tensor(x), summarise(np.array([5.0, 0.0, 1.0])))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_other_types_count_by_value(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1.0, 1.0, 1.0]).to(dtype)
    assert_same(statistics.summarise_tensor(x), summarise(np.array([0.0, 1.0, 1.0, 1.0])))


def test_the_tensor_is_not_changed() -> None:
    x = torch.randn(100, dtype=torch.float32)
    copy = x.clone()
    statistics.summarise_tensor(x)
    assert torch.equal(x, copy)


@given(F32.filter(lambda x: x.size > 0), st.integers(0, 10_000))
def test_update_is_the_difference_and_counts_what_was_lost(before: NDArray[np.float32], seed: int) -> None:
    rng = np.random.default_rng(seed)
    after = np.where(rng.random(before.size) < 0.5, before, before * np.float32(0.75)).astype(np.float32)
    gradient = (rng.integers(0, 2, before.size) * rng.standard_normal(before.size)).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = after - before
    got = statistics.summarise_update(before, torch.from_numpy(after), torch.from_numpy(gradient))
    assert_same(got, summarise(difference))
    assert got.lost == int(((after == before) & (gradient != 0)).sum())
    b, d = before.astype(np.float64), difference.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        dot, squares = float((b * d).sum()), float((b * b).sum())
    if math.isfinite(dot) and math.isfinite(squares):
        scale = float(np.abs(b * d).sum())
        assert got.dot == pytest.approx(dot, rel=1e-9, abs=1e-12 * scale)
        assert got.ref_sum_sq == pytest.approx(squares, rel=1e-12)


@pytest.mark.parametrize("size", [2047, 2048, 2049, 32_768, 40_003])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_update_of_many_blocks(size: int, dtype: type) -> None:
    rng = np.random.default_rng(size)
    before, gradient = rng.standard_normal(size).astype(dtype), rng.integers(0, 2, size).astype(dtype)
    after = (before + rng.integers(0, 2, size) * rng.standard_normal(size)).astype(dtype)
    after[[1, -1]] = math.nan
    got = statistics.summarise_update(before, torch.from_numpy(after), torch.from_numpy(gradient))
    assert_same(got, summarise(after - before))
    assert got.lost == int(((after == before) & (gradient != 0)).sum()) > 0
    assert got.ref_sum_sq == pytest.approx(float(np.square(before.astype(np.float64)).sum()), rel=1e-12)
    after[[1, -1]] = before[[1, -1]]
    got = statistics.summarise_update(before, torch.from_numpy(after), None)
    assert got.dot == pytest.approx(float((before.astype(np.float64) * (after - before)).sum()), rel=1e-9)
    assert got.lost is None


def test_without_a_gradient_nothing_is_called_lost() -> None:
    x = np.ones(3, np.float32)
    assert statistics.summarise_update(x, torch.ones(3), None).lost is None
    assert statistics.summarise_update(x, torch.ones(3), torch.ones(3)).lost == 3


# Merging --------------------------------------------------------------------------------------------------


@given(F32, st.lists(st.integers(0, 300), max_size=6), st.randoms())
def test_parts_add_up_to_the_whole(x: NDArray[np.float32], cuts: list[int], random: object) -> None:
    order = np.random.default_rng(len(cuts)).permutation(x.size)
    parts = np.split(x[order], sorted(c % (x.size + 1) for c in cuts))
    assert_same(merge(statistics.summarise_array(p.copy()) for p in parts), summarise(x))


@given(F32, F32)
def test_addition_is_merging(x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
    assert_same(summarise(x) + summarise(y), summarise(np.concatenate([x, y])))


def test_pooled_captures_have_the_root_mean_square_norm() -> None:
    pooled = merge([summarise(np.array([3.0, 4.0])), summarise(np.array([5.0, 12.0]))], captures=True)
    assert pooled.captures == 2
    assert pooled.norm == pytest.approx(math.sqrt((5**2 + 13**2) / 2))


def test_pairs_of_parts_add() -> None:
    parts = [
        statistics.summarise_update(np.full(2, v, np.float32), torch.full((2,), v + 1), torch.ones(2))
        for v in (1.0, 2.0)
    ]
    whole = merge(parts)
    assert (whole.dot, whole.ref_sum_sq, whole.lost) == (6.0, 10.0, 0)
    assert merge([parts[0], summarise(np.ones(1))]).dot is None


def test_a_unit_is_active_when_it_was_in_any_part() -> None:
    def part(*active: int) -> Summary:
        bits = np.packbits(np.array(active, bool)).tobytes()
        return replace(summarise(np.ones(1)), samples=2, units=len(active), active=bits)

    whole = merge([part(0, 1, 0), part(0, 0, 1)])
    assert whole.active is not None
    assert np.unpackbits(np.frombuffer(whole.active, np.uint8))[:3].tolist() == [0, 1, 1]
    assert (whole.units, whole.samples) == (3, 4)
    other_width = merge([whole, part(1, 1, 1, 1)])
    assert (other_width.units, other_width.active) == (None, None)


def test_merging_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one summary"):
        merge([])


# Units ----------------------------------------------------------------------------------------------------


def test_rows_of_a_weight_that_received_gradient() -> None:
    gradient = torch.zeros(10, 3, 2, 2)
    gradient[3, 2, 1, 1], gradient[9, 0, 0, 0] = 1e-40, math.nan
    got = statistics.summarise_gradient(gradient.to(memory_format=torch.channels_last), rows=True)
    assert got.active is not None
    assert np.flatnonzero(np.unpackbits(np.frombuffer(got.active, np.uint8), count=10)).tolist() == [3, 9]
    assert statistics.summarise_gradient(gradient, rows=False).active is None


# Buckets --------------------------------------------------------------------------------------------------

NORMAL = st.floats(SMALLEST_NORMAL, 1.7e308) | st.floats(-1.7e308, -SMALLEST_NORMAL)


@given(st.lists(NORMAL, min_size=1))
def test_a_value_lies_in_its_bucket(values: list[float]) -> None:
    x = np.array(values)
    low, high = bucket_edges(bucket_of(x))
    inside = np.where(x > 0, (low <= x) & (x < high), (low < x) & (x <= high))
    assert inside.all()
    assert (np.maximum(abs(low), abs(high)) / np.minimum(abs(low), abs(high)) <= 1.25 + 1e-12).all()


def test_every_bucket_number_is_the_bucket_of_its_own_inner_edge() -> None:
    positive = np.arange(4, 4 * (1023 + 127) + 4)
    low, high = bucket_edges(positive)
    assert bucket_of(low).tolist() == positive.tolist()
    assert (high[:-1] == low[1:]).all()  # no gap and no overlap
    assert low[0] == SMALLEST_NORMAL
    negative_low, negative_high = bucket_edges(-positive)
    assert bucket_of(negative_high).tolist() == (-positive).tolist()
    assert (negative_low == -high).all()


def test_bucket_numbers_are_ordered_as_the_values_are() -> None:
    x = np.sort(np.concatenate([-np.logspace(-37, 38, 400), np.logspace(-37, 38, 400)]))
    assert (np.diff(bucket_of(x)) >= 0).all()


def test_bucket_zero_is_zero() -> None:
    assert [float(edge[0]) for edge in bucket_edges(np.array([0]))] == [0.0, 0.0]


# Quantiles ------------------------------------------------------------------------------------------------

SHARES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def histograms(arrays: list[NDArray]) -> tuple[NDArray, NDArray, NDArray, int]:
    """The flat form that `quantiles` takes; zeros and subnormals are bucket 0."""
    rows, buckets, counts = [], [], []
    for row, x in enumerate(arrays):
        s = summarise(x)
        b = np.append(s.buckets.astype(int), 0)
        n = np.append(s.counts, s.zeros + s.subnormals)
        order = np.argsort(b)
        b, n = b[order][n[order] > 0], n[order][n[order] > 0]
        rows.append(np.full(b.size, row))
        buckets.append(b)
        counts.append(n)
    return np.concatenate(rows), np.concatenate(buckets), np.concatenate(counts), len(arrays)


def assert_within_a_bucket(found: float, wanted: float) -> None:
    """The right quantile is off by at most its bucket, that is a factor of 1.25 either way."""
    if wanted == 0:
        assert found == 0
    else:
        assert 1 / 1.2501 <= found / wanted <= 1.2501


@pytest.mark.parametrize("seed", range(5))
def test_quantiles_are_numpys_to_the_width_of_a_bucket(seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = [
        rng.standard_normal(5001) * 10.0 ** rng.integers(-20, 20),
        rng.exponential(size=4001),
        np.maximum(rng.standard_normal(3001), 0) + 0.0,
        -rng.lognormal(0, 3, 2001),
        np.full(7, -3.3),
    ]
    found = quantiles(*histograms(arrays), SHARES)
    for row, x in enumerate(arrays):
        for column, share in enumerate(SHARES):
            wanted = float(np.quantile(x, share, method="inverted_cdf"))
            neighbours = np.sort(x)[
                [max(int(share * x.size) - 1, 0), min(int(share * x.size) + 1, x.size - 1)]
            ]
            close = sorted([wanted, *neighbours])
            got = found[row, column]
            if close[0] <= got <= close[-1]:
                continue
            assert_within_a_bucket(got, wanted)


def test_quantiles_of_an_empty_histogram_are_nan_and_spare_its_neighbours() -> None:
    row, bucket, count = np.array([0, 2]), np.array([508, 512]), np.array([1, 4])
    found = quantiles(row, bucket, count, 3, [0.0, 0.5, 1.0])
    assert np.isnan(found[1]).all()
    assert found[0].tolist() == [1.0, 1.125, 1.25]
    assert found[2].tolist() == [2.0, 2.25, 2.5]
    assert np.isnan(quantiles(row[:0], bucket[:0], count[:0], 2, [0.5])).all()


def test_derived_numbers_of_a_summary() -> None:
    x = np.random.default_rng(0).standard_normal(1000) + 3
    s = summarise(x)
    assert s.mean == pytest.approx(x.mean())
    assert s.std == pytest.approx(x.std())
    assert s.norm == pytest.approx(np.linalg.norm(x))
