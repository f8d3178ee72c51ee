"""Sketches: the documented hash, their sums, their errors on real trajectories, and anchors of real runs."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trainings import Weights, batch, mlp, train, watched_training, weights_of

from layerwatch import Run, watch
from layerwatch.monitor import sketch as sketches
from layerwatch.monitor.sketch import COUNTERS, add_sketch, relative_error, sketch

WORD = 2**64


def splitmix64(z: int) -> int:
    """The published algorithm, in whole numbers."""
    z = (z + 0x9E3779B97F4A7C15) % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def plain_sketch(x: np.ndarray, name: str, counters: int, start: int = 0) -> np.ndarray:
    """Element by element, as the page says."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    found = np.zeros(counters)
    for i, value in enumerate(x.tolist()):
        z = splitmix64((seed + start + i) % WORD)
        found[z % counters] += value if z < 2**63 else -value
    return found


# The algebra ------------------------------------------------------------------------------------------------


def test_the_hash_is_the_published_one() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the reference implementation's first number of seed 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 5000])
def test_the_kernel_is_the_plain_definition(dtype: type, size: int) -> None:
    x = np.random.default_rng(0).standard_normal(size).astype(dtype)
    for name, counters in (("0.weight", 64), ("größe", 4096)):
        assert np.allclose(sketch(x, name, counters), plain_sketch(x, name, counters), atol=1e-12)
    found = np.zeros(64)
    assert add_sketch(x, "a", found, start=2**40) == pytest.approx(np.square(x.astype(np.float64)).sum())
    assert np.allclose(found, plain_sketch(x, "a", 64, 2**40), atol=1e-12)


def test_shards_add_to_the_whole() -> None:
    x = np.random.default_rng(1).standard_normal(50_000).astype(np.float32)
    whole = sketch(x, "w", COUNTERS)
    parts = np.zeros(COUNTERS)
    for start, end in ((30_000, 50_000), (0, 12_345), (12_345, 30_000)):
        add_sketch(x[start:end], "w", parts, start=start)
    assert np.allclose(parts, whole, rtol=1e-12, atol=1e-12)
    assert not np.allclose(sketch(x[::-1].copy(), "w", COUNTERS), whole)


def test_shards_by_columns_add_to_the_whole() -> None:
    x = np.random.default_rng(2).standard_normal((100, 90))
    parts = np.zeros(COUNTERS)
    for columns in (slice(0, 40), slice(40, 90)):
        for row in range(100):
            add_sketch(x[row, columns].copy(), "w", parts, start=90 * row + columns.start)
    assert np.allclose(parts, sketch(x.ravel(), "w", COUNTERS), atol=1e-12)


@pytest.mark.parametrize("counters", [256, 4096])
def test_the_stated_error_is_two_standard_deviations(counters: int) -> None:
    rng = np.random.default_rng(0)
    errors = []
    for k in range(200):
        x = rng.standard_normal(20_000)
        errors.append(np.linalg.norm(sketch(x, f"layer.{k}", counters)) / np.linalg.norm(x) - 1)
    assert abs(np.mean(errors)) < relative_error(counters) / 4  # without bias
    within = np.mean(np.abs(errors) <= relative_error(counters))
    assert 0.91 < within < 0.99
    assert np.std(errors) == pytest.approx(relative_error(counters) / 2, rel=0.15)


# Errors on real trajectories --------------------------------------------------------------------------------


class Words(nn.Module):
    """An embedding of which a step moves 16 rows, and a body of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4000, 32)
        self.body = nn.Sequential(nn.Linear(32, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU())
        self.head = nn.Linear(512, 40)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(words)))


@functools.cache
def trajectory(
    make: Callable[[Any], torch.optim.Optimizer], steps: int = 150
) -> tuple[Weights, list[Weights]]:
    torch.manual_seed(0)
    model = Words()
    start = weights_of(model)
    optimizer = make(model.parameters())
    moments = []
    for step in range(steps):
        words = batch(step, 16, 1).abs().mul(300).long().flatten() % 4000  # few words, some of them often
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(words), words % 40).backward()
        optimizer.step()
        if step in (0, 9, 149):
            moments.append({n: w for n, w in weights_of(model).items() if w.numel() > 16_384})
    return start, moments


TRAJECTORIES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-3),
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
}


@pytest.mark.parametrize("optimizer", TRAJECTORIES)
@pytest.mark.parametrize(("counters", "limit"), [(4096, 0.026), (16_384, 0.0125)])
def test_distances_on_a_real_trajectory(optimizer: str, counters: int, limit: float) -> None:
    """The 95th percentile of the errors over steps, layers and hashes is two standard deviations, whichever
    elements move: 2.2 % with 4,096 counters, 1.1 % with 16,384."""
    start, moments = trajectory(TRAJECTORIES[optimizer])
    assert {"embedding.weight", "body.2.weight", "head.weight"} == moments[0].keys()
    if optimizer == "SGD":
        moved = (moments[-1]["embedding.weight"] != start["embedding.weight"]).any(dim=1)
        assert 0 < moved.sum() < 1200
    errors: dict[str, list[float]] = {}
    for name in moments[0]:
        for weights in moments:
            r, w = (t[name].flatten().double().numpy() for t in (start, weights))
            true = float(np.linalg.norm(w - r))
            for k in range(100):
                found = np.linalg.norm(sketch(w, f"{name}{k}", counters) - sketch(r, f"{name}{k}", counters))
                errors.setdefault(name, []).append(abs(found / true - 1))
    for name, of_one in errors.items():
        assert np.quantile(of_one, 0.95) <= limit, name
        assert max(of_one) <= 2.5 * relative_error(counters), name


# Anchors ----------------------------------------------------------------------------------------------------


class Both(nn.Module):
    """One tensor beyond 4,096 elements, one of exactly so many, one small."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.large = nn.Linear(8, 700)
        self.limit = nn.Linear(700, 3, bias=False)
        self.exact = nn.Parameter(torch.randn(COUNTERS))
        self.late = nn.Parameter(torch.randn(COUNTERS + 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.limit(self.large(x).tanh()) + self.exact.sum() * 1e-3 + self.late.sum() * 1e-3


def anchored(
    path: Path, anchors: Any, *, seed: int = 0, steps: int = 12, every: int | str = 1
) -> tuple[Run, list[Weights]]:
    """The run, and the true weights: before the first step, then after each."""
    model = Both(seed)
    truth = [weights_of(model)]
    run = watched_training(
        path, model, torch.optim.SGD(model.parameters(), 0.1), steps, every=every,
        watching={"anchors": anchors}, after_step=lambda _: truth.append(weights_of(model)),
    )  # fmt: skip
    return run, truth


def assert_between(frame: Any, a: Weights, b: Weights) -> None:
    assert frame.columns.tolist() == ["tensor", "relative_l2", "distance", "cosine", "error"]
    assert frame["tensor"].tolist() == list(a)
    for line in frame.to_dict("records"):
        x, y = (t[line["tensor"]].double().flatten() for t in (a, b))
        size = float(x.norm())
        assert line["error"] == (0.0 if x.numel() <= COUNTERS else relative_error(COUNTERS))
        close = {"rel": 1.5 * line["error"] or 1e-9, "abs": 1e-12}
        assert line["distance"] == pytest.approx(float((y - x).norm()), **close)
        assert line["relative_l2"] == pytest.approx(float((y - x).norm()) / size, **close)
        cosine = float(nn.functional.cosine_similarity(x, y, dim=0))
        assert line["cosine"] == pytest.approx(cosine, abs=3 * line["error"] * (1 - cosine) + 1e-9)


def test_drift_between_any_two_anchors(tmp_path: Path) -> None:
    """An anchor at step s is the weights after step s."""
    run, truth = anchored(tmp_path / "run", [0, 5, 11])
    assert run.anchors() == [0, 5, 11]
    for a, b in ((0, 5), (5, 11), (11, 0)):
        assert_between(run.drift_between(a, b), truth[a + 1], truth[b + 1])
    assert_between(run.drift_between("initial", 11), truth[0], truth[12])
    still = run.drift_between(5, 5)
    assert still["distance"].tolist() == [0.0] * 5
    assert still["cosine"].tolist() == pytest.approx([1.0] * 5)


def test_two_runs_of_one_architecture_compare(tmp_path: Path) -> None:
    first, truth_a = anchored(tmp_path / "a", 4)
    second, truth_b = anchored(tmp_path / "b", [8], seed=1)
    assert_between(first.drift_between(4, 8, second), truth_a[5], truth_b[9])
    assert_between(second.drift_between("initial", "initial", first), truth_b[0], truth_a[0])


def test_tensors_of_another_size_are_left_out(tmp_path: Path) -> None:
    narrow = watched_training(
        tmp_path / "a", (model := mlp()), torch.optim.SGD(model.parameters(), 0.1), watching={"anchors": 1}
    )
    wide_model = mlp(width=17)
    wide = watched_training(
        tmp_path / "b", wide_model, torch.optim.SGD(wide_model.parameters(), 0.1), watching={"anchors": 1}
    )
    assert narrow.drift_between(0, 0, wide)["tensor"].tolist() == ["2.bias"]


def test_anchors_are_read_while_the_training_runs_and_after_a_merge(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watcher = watch(model, optimizer, run=tmp_path / "run", every=1, anchors=2)
    train(model, optimizer, 5)
    live = Run(tmp_path / "run").drift_between(0, 4)
    watcher.close()
    run = Run(tmp_path / "run")
    assert run.anchors() == [0, 2, 4]
    assert run.drift_between(0, 4).equals(live)
    assert (live["distance"] > 0).all()


def test_a_step_that_is_no_anchor_is_refused(tmp_path: Path) -> None:
    run, _ = anchored(tmp_path / "run", [1], steps=3)
    for step in (0, 7, "start"):
        with pytest.raises(ValueError, match=r"expected an anchor of run, got .*: it has \[1\]"):
            run.drift_between(1, step)
    model = mlp()
    plain = watched_training(tmp_path / "plain", model, torch.optim.SGD(model.parameters(), 0.1))
    assert plain.anchors() == []
    with pytest.raises(ValueError, match="it has"):
        plain.drift_between("initial", "initial")


def test_complex_and_half_precision_anchors(tmp_path: Path) -> None:
    """Of complex elements real and imaginary parts in turn: 3,000 of them are more than 4,096 numbers."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Parameter(torch.randn(3000, dtype=torch.complex64))
            self.h = nn.Parameter(torch.randn(90, 90, dtype=torch.bfloat16))

        def forward(self, x: Tensor) -> Tensor:
            return self.c.abs().sum() + self.h.float().sum()

    model = Mixed()
    truth = [weights_of(model)]
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with watch(model, optimizer, run=tmp_path / "run", every=1, anchors=[0]):
        model(batch(0)).backward()
        optimizer.step()
    frame = Run(tmp_path / "run").drift_between("initial", 0).set_index("tensor")
    for name, now in weights_of(model).items():
        before = truth[0][name]
        wide = torch.complex128 if now.is_complex() else torch.float64
        true = float((now.to(wide) - before.to(wide)).norm())
        assert frame.loc[name, "distance"] == pytest.approx(true, rel=1.5 * relative_error(COUNTERS))
        assert frame.loc[name, "relative_l2"] == pytest.approx(
            true / float(before.to(wide).norm()), rel=1.5 * relative_error(COUNTERS)
        )


@pytest.mark.parametrize("anchors", [0, -1, True, 2.5, "1", [], [1, -2], [1, 2.0], ["a"], [True], range(65)])
def test_anchors_that_are_none_are_refused(tmp_path: Path, anchors: Any) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"expected (anchors as steps|at most 64 anchors)"):
        watch(model, torch.optim.SGD(model.parameters(), 0.1), run=tmp_path / "run", anchors=anchors)
    assert not (tmp_path / "run").exists()


def test_every_nth_step_until_there_are_64() -> None:
    from layerwatch.hooks.sketch import AnchorSketches

    wanted = [s for s in range(1000) if AnchorSketches(3).wants(s)]
    assert wanted == list(range(0, 192, 3))
    assert [s for s in range(1000) if AnchorSketches(range(0, 640, 10)).wants(s)] == list(range(0, 640, 10))


def test_small_tensors_are_in_the_log_as_they_are(tmp_path: Path) -> None:
    run, truth = anchored(tmp_path / "run", [2], steps=3)
    rows = run._log.table("values", None, {"kind": ["sketch"]}).to_pandas().set_index("tensor")
    assert np.array_equal(rows.loc["exact", "values"], truth[3]["exact"].double().numpy())
    assert {len(v) for v in rows["values"]} == {700, 2100, COUNTERS}
    late = sketches.sketch(truth[3]["late"].numpy(), "late", COUNTERS).astype(np.float32)
    assert np.array_equal(rows.loc["late", "values"], late)


@pytest.mark.parametrize("every", [1000, "auto"])
def test_anchors_are_captured_whatever_the_cadence(tmp_path: Path, every: int | str) -> None:
    run, truth = anchored(tmp_path / "run", [3, 7, 40], steps=50, every=every)
    assert run.anchors() == [3, 7, 40]
    assert {3, 7, 40} <= set(run.stats("update")["step"])
    if every == 1000:
        assert set(run.stats("update")["step"]) == {0, 3, 7, 40}
    assert_between(run.drift_between(3, 40), truth[4], truth[41])
