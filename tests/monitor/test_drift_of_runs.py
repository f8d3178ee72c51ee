"""`layerwatch.drift` of runs: from sketches, small tensors and the logged drift; against the true weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import layerwatch
from layerwatch import Run, watch
from layerwatch.monitor.errors import RunError
from layerwatch.monitor.weights.report import Drift

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int | str, State]]:
    """A run of 12 steps with anchors at 3 and 9, and its true weights after each step."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 90), nn.ReLU(), nn.Linear(90, 70), nn.ReLU(), nn.Linear(70, 3))
    states: dict[int | str, State] = {"start": {n: t.clone() for n, t in model.state_dict().items()}}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with watch(model, optimizer, run=folder / "one", every=3, anchors=[3, 9]):
        for step in range(12):
            loss = nn.functional.cross_entropy(model(torch.randn(16, 80)), torch.randint(0, 3, (16,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            states[step] = {n: t.clone() for n, t in model.state_dict().items()}
    return folder / "one", states


def true(a: State, b: State, tensor: str) -> float:
    x, y = a[tensor].double(), b[tensor].double()
    return float((y - x).norm() / x.norm())


def assert_true(drift: Drift, a: State, b: State, *, error: float) -> None:
    assert {row["tensor"] for row in drift.rows} == set(a)
    for row in drift.rows:
        known = true(a, b, row["tensor"])
        allowed = 1e-5 if row["error"] == 0 else 2 * row["error"]
        assert row["error"] <= error
        assert row["relative_l2"] == pytest.approx(known, rel=allowed), row["tensor"]
        assert row["norm_b"] == pytest.approx(float(b[row["tensor"]].double().norm()), rel=1e-6)


def test_two_anchors_of_a_run(trained: tuple[Path, dict[int | str, State]]) -> None:
    run, states = trained
    drift = layerwatch.drift(f"{run}@3", f"{run}@9")
    assert_true(drift, states[3], states[9], error=0.03)
    assert {row["tensor"] for row in drift.rows if row["error"] == 0} >= {
        "0.bias",
        "2.bias",
        "4.weight",
        "4.bias",
    }
    for row in drift.rows:  # six updates lie between, of which every third is logged
        assert 0.3 < row["times_random_walk"] < 3
        assert row["unusual"] is None


def test_from_the_start_to_any_capture(trained: tuple[Path, dict[int | str, State]]) -> None:
    run, states = trained
    drift = layerwatch.drift(f"{run}@start", f"{run}@6")
    assert_true(drift, states["start"], states[6], error=0.0)
    assert all(row["sign_flips"] is not None for row in drift.rows)
    assert layerwatch.drift((run, "start"), Run(run)).b.endswith("step 11")


def test_from_the_reference_that_the_run_was_given(
    trained: tuple[Path, dict[int | str, State]], tmp_path: Path
) -> None:
    _, states = trained
    path = tmp_path / "pretrained.safetensors"
    safetensors.torch.save_file(states[9], path)
    model = nn.Sequential(nn.Linear(80, 90), nn.ReLU(), nn.Linear(90, 70), nn.ReLU(), nn.Linear(70, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, run=tmp_path / "two", reference=path):
        model(torch.randn(4, 80)).sum().backward()
        optimizer.step()
    for a in (f"{tmp_path / 'two'}@reference", path):
        drift = layerwatch.drift(a, tmp_path / "two")
        assert drift.a == str(path)
        assert_true(drift, states[9], dict(model.state_dict()), error=0.0)
    with pytest.raises(RunError, match="the distance only"):
        layerwatch.drift(f"{tmp_path / 'two'}@reference", states[9])
    with pytest.raises(RunError, match="the distance only"):
        layerwatch.precision(f"{tmp_path / 'two'}@reference")


def test_a_run_against_a_file(trained: tuple[Path, dict[int | str, State]], tmp_path: Path) -> None:
    run, states = trained
    path = tmp_path / "w.safetensors"
    more = {f"model.{n}": t for n, t in states[3].items()} | {"other.weight": torch.ones(2)}
    safetensors.torch.save_file(more, path)
    drift = layerwatch.drift(path, (run, 9))
    assert_true(drift, states[3], states[9], error=0.03)
    assert drift.only_in_a == ["other.weight"]
    back = layerwatch.drift((run, 9), path)
    assert_true(back, states[9], states[3], error=0.03)
    assert back.only_in_b == ["other.weight"]


def test_without_sketches_norms_are_compared_and_a_note_says_so(
    trained: tuple[Path, dict[int | str, State]],
) -> None:
    run, states = trained
    drift = layerwatch.drift((run, 11), states[9])
    rows: dict[str, dict[str, Any]] = {row["tensor"]: row for row in drift.rows}
    assert rows["0.weight"]["relative_l2"] is None
    assert rows["0.weight"]["norm_b"] == pytest.approx(float(states[9]["0.weight"].double().norm()), rel=1e-6)
    assert rows["4.bias"]["relative_l2"] == pytest.approx(true(states[11], states[9], "4.bias"), rel=1e-5)
    assert "anchors" in drift.notes[0]
    assert drift.groups("role")


def test_files_with_the_run_between_them_have_a_yardstick(
    trained: tuple[Path, dict[int | str, State]],
) -> None:
    run, states = trained
    drift = layerwatch.drift(states["start"], states[9], run=run)
    assert all(0.3 < row["times_random_walk"] < 4 for row in drift.rows)
    assert not any(row["unusual"] for row in drift.rows)
    jumped = states[9] | {"2.weight": states[9]["2.weight"] * -1}
    unusual = {r["tensor"]: r["unusual"] for r in layerwatch.drift(states["start"], jumped, run=run).rows}
    assert "something besides the optimizer changed it" in unusual["2.weight"]
    assert unusual["0.weight"] is None


def test_the_random_walk_is_what_independent_updates_reach(tmp_path: Path) -> None:
    """Updates in random directions: the distance is the bound."""
    torch.manual_seed(0)
    model = nn.Linear(60, 60, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    start = {"weight": model.weight.detach().clone()}
    with watch(model, optimizer, run=tmp_path / "walk", every=1):
        for _ in range(40):
            model.weight.grad = torch.randn(60, 60) * 1e-3
            optimizer.step()
    row = layerwatch.drift(start, model, run=tmp_path / "walk").rows[0]
    assert row["times_random_walk"] == pytest.approx(1.0, abs=0.05)
    assert row["random_walk"] == pytest.approx(np.sqrt(40 * 3600) * 1e-3, rel=0.02)


def test_steps_that_are_none_are_told(trained: tuple[Path, dict[int | str, State]]) -> None:
    run, _ = trained
    with pytest.raises(RunError, match="as a number, start, reference or last"):
        layerwatch.drift(f"{run}@best", run)
    with pytest.raises(ValueError, match="does not exist"):
        layerwatch.drift(run.parent / "nothing", run)
