"""The compiled sweep against the plain definition, for every storage type and size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwatch.hooks.sweeper import Copies, Job, Sweeper, plain
from layerwatch.monitor import sweep
from layerwatch.monitor.summary import Summary, summarise

SIZES = [0, 1, 2, 15, 16, 17, 2047, 2048, 2049, 5000, sweep.PAIRED, sweep.PAIRED + 2048 + 7]
KINDS = [
    "normal", "wide", "wider than the pairs", "sparse", "zero", "positive", "negative", "late", "special"
]  # fmt: skip
SPECIAL = [0.0, -0.0, 1e-45, -1e-39, 1.17549435e-38, 3e38, -3e38, 1.0, -1.0]

sweeper = Sweeper()


def made(size: int, kind: str, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=g)
    if kind == "wide":
        x = x * torch.exp2(torch.randint(-60, 60, (size,), generator=g))
    elif kind == "wider than the pairs":
        x = x * torch.exp2(torch.randint(-120, 100, (size,), generator=g))
    elif kind == "sparse":
        x = x * (torch.rand(size, generator=g) < 0.1)
    elif kind == "zero":
        x = x * 0
    elif kind in ("positive", "negative"):
        x = x.abs() * (1 if kind == "positive" else -1)
    elif kind == "late":  # the first block says nothing about the others
        x[: min(size, 2048)] *= 1e-20
    elif kind == "special":
        x[torch.randint(0, max(size, 1), (9,), generator=g)[:size]] = torch.tensor(SPECIAL)[:size]
    elif kind == "broken":
        x[torch.randint(0, max(size, 1), (5,), generator=g)[:size]] = torch.tensor(
            [torch.nan, torch.inf, -torch.inf, torch.nan, 0.0]
        )[:size]
    return x.to(dtype)


def wide(x: Tensor) -> np.ndarray:
    return x.float().numpy()


def assert_row(block: Any, job: int, kind: int, x: np.ndarray) -> None:
    truth, row = summarise(x), block.rows[job, kind]
    start = block.counters[row - 1, sweep.END] if row else 0
    end = block.counters[row, sweep.END]
    assert np.array_equal(block.buckets[start:end], truth.buckets)
    assert np.array_equal(block.bucket_counts[start:end], truth.counts)
    numbers, counters = block.numbers[row], block.counters[row]
    assert counters[: sweep.FLIPS].tolist() == [
        truth.zeros, truth.subnormals, truth.nans, truth.pos_infs, truth.neg_infs
    ]  # fmt: skip
    assert (numbers[sweep.MIN], numbers[sweep.MAX]) == (truth.min, truth.max)
    assert numbers[sweep.SUM_SQ] == pytest.approx(truth.sum_sq, rel=1e-12)
    finite = x[np.isfinite(x)].astype(np.float64)
    assert numbers[sweep.SUM] == pytest.approx(truth.sum, abs=1e-13 * np.abs(finite).sum())


def assert_pairs(block: Any, job: int, before: np.ndarray, after: np.ndarray, gradient: np.ndarray) -> None:
    b, a = before.astype(np.float64), after.astype(np.float64)
    u = (after - before).astype(np.float64)
    numbers = block.numbers[block.rows[job, 2]]
    assert numbers[sweep.DOT] == pytest.approx((b * u).sum(), abs=1e-13 * np.abs(b * u).sum())
    assert numbers[sweep.REF_SUM_SQ] == pytest.approx((b * b).sum(), rel=1e-12)
    lost = (before.view(np.int32) == after.view(np.int32)) & (gradient != 0)
    assert block.counters[block.rows[job, 2], sweep.LOST] == lost.sum()
    numbers = block.numbers[block.rows[job, 3]]
    assert numbers[sweep.SUM_SQ] == pytest.approx(((a - b) ** 2).sum(), rel=1e-12)
    assert numbers[sweep.DOT] == pytest.approx((a * b).sum(), abs=1e-13 * np.abs(a * b).sum())
    assert block.counters[block.rows[job, 3], sweep.FLIPS] == (np.sign(a) * np.sign(b) < 0).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_of_all_sizes(kind: str, dtype: torch.dtype) -> None:
    jobs, truth = [], []
    for i, size in enumerate(SIZES):
        before, gradient = made(size, kind, 2 * i, dtype), made(size, kind, 2 * i + 1, dtype)
        after = before.clone()
        after[::2] *= 0.75
        after[1::7] *= -1
        truth.append((wide(gradient), wide(after), wide(before)))
        jobs.append(
            Job(str(i), size, gradient, after, before.data_ptr() if size else 0, before, gradient_row=True)
        )
    block = sweeper.run(jobs)
    for i, (gradient, after, before) in enumerate(truth):
        assert_row(block, i, 0, gradient)
        assert_row(block, i, 1, after)
        if after.size:
            with np.errstate(all="ignore"):  # float16 and differences of the largest numbers overflow
                change = after - before
            assert_row(block, i, 2, change)
            if np.isfinite(after).all() and np.isfinite(change).all():
                assert_pairs(block, i, before, after, gradient)


@pytest.mark.parametrize("size", SIZES[5:])
def test_what_is_not_finite_is_counted_apart(size: int) -> None:
    """Also when the first block, which says where the pairs' buckets begin, has it."""
    x, y = made(size, "broken", 1), made(size, "normal", 2)
    y[0] = torch.nan
    block = sweeper.run([Job("x", size, x, gradient_row=True), Job("y", size, y, gradient_row=True)])
    assert_row(block, 0, 0, wide(x))
    assert_row(block, 1, 0, wide(y))
    assert np.isnan(block.squares[0])
    assert not block.zero[0]
    assert not sweeper._buffers.histograms.any()
    assert not sweeper._buffers.pairs.any()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), max_size=40),
    st.integers(0, 3),
)
def test_any_values(values: list[float], repeat: int) -> None:
    x = torch.tensor(values * (1 + 600 * repeat), dtype=torch.float32)
    assert_row(sweeper.run([Job("x", x.numel(), x, gradient_row=True)]), 0, 0, wide(x))


@pytest.mark.parametrize(("units", "inner"), [(1, 5000), (7, 1), (13, 700), (300, 33), (5000, 3)])
def test_rows_with_any_gradient(units: int, inner: int) -> None:
    gradient = torch.randn(units, inner) * (torch.rand(units, 1) < 0.5)
    gradient[0, :-1] = 0
    block = sweeper.run([Job("x", gradient.numel(), gradient, gradient_row=True, units=units)])
    active = np.unpackbits(np.frombuffer(block.active[0] or b"", np.uint8), count=units).astype(bool)
    assert np.array_equal(active, (gradient != 0).any(1).numpy())


def test_a_capture_with_more_buckets_than_there_is_room_for() -> None:
    few = Sweeper()
    few._room = 3 * 2040 + 1
    tensors = [made(5000, "wider than the pairs", i) for i in range(40)]
    block = few.run([Job(str(i), 5000, t, gradient_row=True) for i, t in enumerate(tensors)])
    for i, tensor in enumerate(tensors):
        assert_row(block, i, 0, wide(tensor))


def test_the_rows_are_those_of_the_summary() -> None:
    """`Block.batch` against the same numbers written as summaries."""
    x = made(3000, "normal", 0)
    block = sweeper.run([Job("x", 3000, x, gradient_row=True, units=30)])
    block.decide(0, "trainable", stage="at_step")
    row = block.batch(4, 5.0).to_pylist()[0]
    truth: Summary = summarise(x.numpy())
    for name in ("count", "min", "max", "zeros", "subnormals", "nans", "pos_infs", "neg_infs"):
        assert row[name] == getattr(truth, name)
    assert row["buckets"] == truth.buckets.tolist()
    assert row["counts"] == truth.counts.tolist()
    assert (row["step"], row["time"], row["tensor"], row["kind"]) == (4, 5.0, "x", "gradient")
    assert (row["stage"], row["state"], row["units"], row["lost"]) == ("at_step", "trainable", 30, None)
    assert not block.left


def test_rows_wait_until_they_are_decided() -> None:
    x = [made(100, "normal", i) for i in range(3)]
    block = sweeper.run([Job(str(i), 100, t, gradient_row=True) for i, t in enumerate(x)])
    block.decide(2, None)
    assert block.batch(0, 0.0)["tensor"].to_pylist() == ["2"]
    block.drop(1)
    block.decide(0, None)
    late = block.batch(0, 0.0)
    assert late["tensor"].to_pylist() == ["0"]
    assert not block.left
    assert late["buckets"].to_pylist()[0] == summarise(x[0].numpy()).buckets.tolist()


def test_copies_stay_while_the_step_lasts() -> None:
    copies, weights = Copies(), [torch.randn(n) for n in (1, 1000, 70_000)]
    kept = [w.clone() for w in weights]
    copies.take(["a", "b"], weights[:2], 0)
    copies.take(["c"], weights[2:], 0)
    for weight in weights:
        weight.zero_()
    jobs = [
        Job(n, w.numel(), weight=w, before=copies.address(n)) for n, w in zip("abc", weights, strict=True)
    ]
    block = sweeper.run(jobs)
    for i, before in enumerate(kept):
        assert_row(block, i, 2, -before.numpy())
    copies.clear()
    assert copies.address("a") == 0
    copies.release()
    copies.take(["a"], kept[:1], 10)
    assert copies.address("a")


def test_what_is_plain() -> None:
    assert plain(torch.zeros(3, 4))
    assert plain(torch.zeros(0))
    assert plain(torch.zeros(()))
    assert plain(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    assert plain(torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)))
    assert not plain(torch.zeros(3, 4).T[::2])
    assert not plain(torch.zeros(1).expand(5))
    assert not plain(torch.zeros(3, dtype=torch.float64))
    assert not plain(torch.zeros(3, dtype=torch.cfloat))
    assert not plain(torch.zeros(3).to_sparse())
    assert not plain(torch.zeros(3, device="meta"))
    assert not plain(torch.zeros(2, 2).as_subclass(type("Own", (Tensor,), {})))
