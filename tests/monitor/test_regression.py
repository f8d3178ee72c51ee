"""A run beside earlier good runs: silent when it is another seed, else the layer and step of the change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_seeds import both, history, scaled, seed_run
from torch import nn

from layerwatch.hooks import watch
from layerwatch.monitor import Finding, Run
from layerwatch.monitor.courses import Courses, courses
from layerwatch.monitor.detectors import Arrays, History, Unjudged
from layerwatch.monitor.detectors.regression import notes, regression
from layerwatch.monitor.findings import judge
from layerwatch.monitor.normal import Normal, learn


def compare(own: History, normal: Normal) -> Finding | None:
    own.normal = normal
    return regression(own)


@pytest.fixture(scope="module")
def seeds() -> list[Courses]:
    return [courses(history(seed)) for seed in range(8)]


@pytest.fixture(scope="module")
def normal(seeds: list[Courses]) -> Normal:
    return learn(seeds[:5])


LOST = scaled("val_loss", "", 100, 1.5)
FASTER = scaled("update", "2.weight", 100, 3.0)


# ---- the rule


def test_a_layer_that_changed_is_named_with_its_step_and_worse_is_an_alarm(normal: Normal) -> None:
    found = compare(history(50, change=both(FASTER, LOST)), normal)
    assert found is not None
    assert found.severity == "warning"
    assert found.layers[0] == "2.weight"
    assert abs(found.first_step - 100) <= 3
    evidence = found.evidence
    assert (evidence["signal"], evidence["layer"]) == ("update ratio", "2.weight")
    assert float(evidence["distance_in_mads"]) > float(evidence["distance_limit"]) >= 6
    assert float(evidence["value"]) > float(evidence["threshold"]) > float(evidence["baseline"])
    assert evidence["baselines"] == 5
    assert 99 <= int(evidence["worse_since"]) <= 119
    assert "2.weight" in found.summary
    assert "val_loss" in found.summary


def test_a_layer_that_changed_without_a_worse_outcome_is_a_remark(normal: Normal) -> None:
    found = compare(history(50, change=FASTER), normal)
    assert found is not None
    assert found.severity == "info"
    assert found.layers == ("2.weight",)
    assert abs(found.first_step - 100) <= 3
    assert "not worse" in found.summary


def test_a_better_run_is_no_regression(normal: Normal) -> None:
    found = compare(history(50, change=scaled("val_loss", "", 0, 0.5)), normal)
    assert found is None


def test_worse_without_a_layer_names_none(normal: Normal) -> None:
    found = compare(history(50, change=LOST), normal)
    assert found is not None
    assert (found.severity, found.layers) == ("warning", ())
    assert 99 <= found.first_step <= 119
    assert "layer" not in found.evidence


@pytest.mark.parametrize("signal", ["gradient", "weight", "activation"])
def test_every_signal_can_give_a_layer_away(normal: Normal, signal: str) -> None:
    layer = "3" if signal == "activation" else "3.weight"
    found = compare(history(51, change=scaled(signal, layer, 120, 8.0)), normal)
    assert found is not None
    assert found.layers == (layer,)
    assert abs(found.first_step - 120) <= 3


def test_a_layer_that_stands_still_left_its_range(normal: Normal) -> None:
    found = compare(history(52, change=scaled("update", "1.weight", 150, 0.0)), normal)
    assert found is not None
    assert found.layers[0] == "1.weight"
    assert abs(found.first_step - 150) <= 3


def test_the_end_counts_not_a_bad_stretch(normal: Normal) -> None:
    passing = both(scaled("val_loss", "", 50, 1.5), scaled("val_loss", "", 90, 1 / 1.5))
    found = compare(history(53, change=passing), normal)
    assert found is None or not found.alarm


def test_without_validation_the_training_loss_counts(seeds: list[Courses]) -> None:
    def training_only(source: Arrays) -> History:
        source.losses = {"train_loss": source.losses["train_loss"]}
        return History(source)

    normal = learn([courses(training_only(seed_run(seed))) for seed in range(5)])
    assert compare(training_only(seed_run(54)), normal) is None
    worse = training_only(seed_run(54, change=scaled("train_loss", "", 100, 1.6)))
    found = compare(worse, normal)
    assert found is not None
    assert found.alarm
    assert "train_loss ends at" in found.summary
    assert abs(found.first_step - 100) <= 5


def test_a_learning_rate_that_differs_is_named(seeds: list[Courses]) -> None:
    def with_rate(seed: int, rate: float) -> History:
        source = seed_run(seed)
        source.losses = {**source.losses, "lr": ([0, 80], [0.1, rate])}
        return History(source)

    normal = learn([courses(with_rate(seed, 0.1)) for seed in range(4)])
    assert compare(with_rate(60, 0.1), normal) is None
    found = compare(with_rate(60, 0.05), normal)
    assert found is not None
    assert found.evidence["scalars"] == "lr (step 80)"
    assert found.severity == "info"


def test_runs_without_anything_in_common_are_not_judged(normal: Normal) -> None:
    with pytest.raises(Unjudged, match="in common"):
        compare(History(Arrays()), normal)
    found, said = judge(History(Arrays()), normal)
    assert [f for f in found if f.problem == "regression"] == []
    assert any("regression" in note and "in common" in note for note in said)


# ---- properties


def test_the_order_of_the_baselines_does_not_matter(seeds: list[Courses]) -> None:
    rng = np.random.default_rng(0)
    own = history(50, change=both(FASTER, LOST))
    first = compare(own, learn(seeds[:6]))
    for _ in range(5):
        assert compare(own, learn([seeds[i] for i in rng.permutation(6)])) == first


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_run_among_its_own_baselines_is_silent(seeds: list[Courses], count: int) -> None:
    normal = learn(seeds[:count])
    for seed in range(count):
        assert compare(history(seed), normal) is None


def alarms_and_remarks(count: int, groups: int, each: int) -> tuple[int, int]:
    """Healthy runs against `count` baselines of the same distribution: how many are not passed over."""
    found = []
    for group in range(groups):
        first = 1000 * count + 20 * group
        small = {"steps": 120, "layers": 3}
        normal = learn([courses(history(first + i, **small)) for i in range(count)])
        found += [compare(history(first + count + i, **small), normal) for i in range(each)]
    return sum(f is not None and f.alarm for f in found), sum(f is not None and not f.alarm for f in found)


@pytest.mark.parametrize(("count", "groups"), [(1, 4), (2, 4), (3, 20), (5, 4)])
def test_at_most_one_of_a_hundred_healthy_runs_alarms(count: int, groups: int) -> None:
    alarms, remarks = alarms_and_remarks(count, groups, 10)
    assert alarms <= 0.01 * 10 * groups
    assert remarks <= 2 + 0.01 * 10 * groups  # runs that share baselines are not independent


@pytest.mark.soak
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_at_most_one_of_a_hundred_healthy_runs_alarms_or_gets_a_remark(count: int) -> None:
    alarms, remarks = alarms_and_remarks(count, 200, 5)
    assert alarms <= 10
    assert remarks <= 20


def test_other_cadences_and_lengths_are_compared_by_step(normal: Normal) -> None:
    for options in ({"every": 5}, {"every": 2, "steps": 120}, {"every": 10}):
        assert compare(history(70, **options), normal) is None
        change = both(scaled("update", "2.weight", 60, 4.0), scaled("val_loss", "", 60, 1.8))
        found = compare(history(70, change=change, **options), normal)
        assert found is not None
        assert found.alarm
        assert found.layers[0] == "2.weight"
        assert abs(found.first_step - 60) <= 2 * options["every"]


def test_fewer_baselines_say_less(seeds: list[Courses]) -> None:
    limits, confidences = [], []
    for count in (1, 3, 8):
        found = compare(history(50, change=scaled("val_loss", "", 0, 3.0)), learn(seeds[:count]))
        assert found is not None
        limits.append(float(found.evidence["threshold"]) / float(found.evidence["baseline"]))
        confidences.append(found.confidence)
    assert limits[0] > 1.5 * max(limits[1:])
    assert confidences == sorted(confidences)
    own = history(50)
    own.normal = learn(seeds[:1])
    assert any("1 earlier run only" in note for note in notes(own))
    own.normal = learn(seeds[:3])
    assert notes(own) == []


def test_layers_of_other_models_are_left_out_and_named(normal: Normal) -> None:
    own = history(50, layers=7, change=both(FASTER, LOST))
    found = compare(own, normal)
    assert found is not None
    assert found.layers[0] == "2.weight"
    assert any("lack 5.weight, 5.bias, 6.weight and 1 more" in note for note in notes(own))
    wider = history(50, width=32, change=FASTER)
    assert compare(wider, normal) is None  # no layer has a counterpart
    assert any("have another shape of" in note for note in notes(wider))
    fewer = history(50, layers=3)
    assert compare(fewer, normal) is None
    assert any("this run has not" in note for note in notes(fewer))


def test_a_longer_run_is_judged_by_its_end(normal: Normal) -> None:
    assert compare(history(71, steps=500), normal) is None
    own = history(
        71, steps=500, change=both(scaled("update", "2.weight", 300, 5.0), scaled("val_loss", "", 300, 2))
    )
    found = compare(own, normal)
    assert found is not None
    assert found.alarm
    assert found.layers == ()  # beyond the baselines' end
    assert any("until step 199" in note for note in notes(own))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_left_out(normal: Normal, bad: float) -> None:
    found = compare(history(50, change=scaled("gradient", "2.weight", 20, bad)), normal)
    assert found is None
    broken = [courses(history(seed, change=scaled("update", "1.bias", 0, bad))) for seed in range(4)]
    found = compare(history(50, change=FASTER), learn(broken))
    assert found is not None
    assert found.layers == ("2.weight",)


# ---- real trainings


def train(path: Path, seed: int, *, fast_from: int | None = None, bad_from: int | None = None) -> Run:
    """A classifier; from a step on its middle layer learns five times as fast, or its inputs are scaled."""
    rng = torch.Generator().manual_seed(1)
    x, steps = torch.randn(2000, 12, generator=rng), 120
    y = (torch.tanh(x @ torch.randn(12, 20, generator=rng)) @ torch.randn(20, 5, generator=rng)).argmax(1)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
    middle = [model.get_parameter("2.weight"), model.get_parameter("2.bias")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("2.")]
    optimizer = torch.optim.Adam([{"params": rest}, {"params": middle}], lr=2e-3)
    watcher = watch(model, optimizer, run=path, every=1)
    for step in range(steps):
        batch = torch.randint(0, 1800, (64,))
        inputs = x[batch] * (3.0 if bad_from is not None and step >= bad_from else 1.0)
        optimizer.param_groups[1]["lr"] = 1e-2 if fast_from is not None and step >= fast_from else 2e-3
        loss = F.cross_entropy(model(inputs), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watcher.log(train_loss=loss)
        if step % 10 == 9:
            with torch.no_grad():
                watcher.log(val_loss=F.cross_entropy(model(x[1800:]), y[1800:]))
    watcher.close()
    return Run(path)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Run]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("seeds")
    runs = [train(root / f"seed{seed}", seed) for seed in range(6)]
    torch.set_num_threads(threads)
    return runs


def of(found: Sequence[Finding]) -> list[Finding]:
    return [f for f in found if f.problem == "regression"]


def test_real_seeds_are_silent_when_each_is_left_out(real: Sequence[Run]) -> None:
    for out, run in enumerate(real):
        assert of(run.findings([r for place, r in enumerate(real) if place != out])) == []


def test_a_real_change_is_named_with_its_layer_and_step(real: Sequence[Run], tmp_path: Path) -> None:
    fast = of(train(tmp_path / "fast", 20, fast_from=60).findings(list(real)))
    assert fast[0].layers[0] in ("2.weight", "2.bias")
    assert abs(fast[0].first_step - 60) <= 4
    assert "lr/1 (step 60)" in str(fast[0].evidence["scalars"])
    data = of(train(tmp_path / "data", 21, bad_from=60).findings(list(real)))
    assert data[0].layers[0] in ("0", "0.weight")
    assert abs(data[0].first_step - 60) <= 4
