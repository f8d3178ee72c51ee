"""Every common make of model is watched without an error, with true numbers, and trains as without us."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from trainings import Weights, batch, column, failures, gradients_of, loss_of, norm, weights_of
from zoo import ZOO, train_entry

from layerwatch import Run, Watcher, watch


class Truth:
    """What each step really is: copies that plain torch makes around it."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.before: list[Weights] = []
        self.after: list[Weights] = []
        self.gradients: list[Weights] = []
        optimizer.register_step_pre_hook(lambda *_: self._begin(model))
        optimizer.register_step_post_hook(lambda *_: self.after.append(weights_of(model)))

    def _begin(self, model: nn.Module) -> None:
        self.before.append(weights_of(model))
        self.gradients.append(gradients_of(model))


def watched(path: Path, name: str, **how: object) -> tuple[nn.Module, Run, Truth]:
    ready: list[tuple[Watcher, Truth]] = []

    def start(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        watcher = watch(model, optimizer, run=path, every=1, **how)  # type: ignore[arg-type]
        ready.append((watcher, Truth(model, optimizer)))

    model = train_entry(ZOO[name], on_ready=start)
    watcher, truth = ready[0]
    watcher.close()
    assert failures(watcher) == ""
    return model, Run(path), truth


def bits(tensor: torch.Tensor) -> torch.Tensor:
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return plain.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("name", ZOO)
def test_same_seed_same_weights_bit_for_bit(tmp_path: Path, name: str) -> None:
    alone = train_entry(ZOO[name])
    random = torch.get_rng_state()
    model, _, _ = watched(tmp_path / "run", name)
    assert torch.equal(torch.get_rng_state(), random)
    for (key, a), (_, b) in zip(alone.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(bits(a), bits(b)), key


def plain(tensor: torch.Tensor) -> NDArray[np.float64]:
    """Values in double, complex ones by modulus, in the order of the indices."""
    dense = tensor.coalesce().to_dense() if tensor.is_sparse else tensor
    return (dense.abs() if dense.is_complex() else dense).double().numpy().ravel()


def assert_true(rows: pd.DataFrame, steps: Sequence[torch.Tensor], rel: float) -> None:
    """Every column of `stats` against numpy, for every step."""
    assert rows["step"].tolist() == list(range(len(steps)))
    for (_, row), tensor in zip(rows.iterrows(), steps, strict=True):
        x = plain(tensor)
        finite = x[np.isfinite(x)]
        assert (row["count"], row["nans"], row["zeros"]) == (x.size, np.isnan(x).sum(), (x == 0).sum())
        assert row["infs"] == np.isinf(x).sum()
        if finite.size:
            size = np.abs(finite).max()
            assert row["norm"] == pytest.approx(np.linalg.norm(finite), rel=rel)
            assert row["mean"] == pytest.approx(finite.mean(), rel=rel, abs=rel * size)
            assert row["std"] == pytest.approx(finite.std(), rel=rel, abs=max(rel, 1e-7) * size)
            assert (row["min"], row["max"]) == pytest.approx((finite.min(), finite.max()), rel=rel)
        else:
            assert math.isnan(row["norm"])


@pytest.mark.parametrize("name", ZOO)
def test_every_tensor_has_true_rows(tmp_path: Path, name: str) -> None:
    model, run, truth = watched(tmp_path / "run", name)
    tensors = run.tensors().set_index("tensor")
    assert tensors.index.tolist() == [n for n, _ in model.named_parameters()]
    for tensor, parameter in model.named_parameters():
        assert tensors.loc[tensor, "shape"] == list(parameter.shape)
        assert tensors.loc[tensor, "elements"] == parameter.numel()
        assert tensors.loc[tensor, "dtype"] == str(parameter.dtype).removeprefix("torch.")
        before, after = [[step[tensor] for step in steps] for steps in (truth.before, truth.after)]
        assert_true(run.stats("initial_weight", tensor), before[:1], 1e-12)
        assert_true(run.stats("weight", tensor), after, 1e-12)
        assert_drift(run.drift(tensor), before[0], after)
        if not parameter.requires_grad:
            assert run.stats("gradient", tensor).empty
            assert run.stats("update", tensor).empty
            continue
        gradients = [step[tensor] for step in truth.gradients]
        assert_true(run.stats("gradient", tensor), gradients, 1e-12)
        updates = run.stats("update", tensor)
        kind = torch.complex128 if parameter.is_complex() else torch.float64
        changes = [b.to(kind) - a.to(kind) for a, b in zip(before, after, strict=True)]
        assert_true(updates, changes, 1e-6)
        for (_, row), old, new, gradient in zip(updates.iterrows(), before, after, gradients, strict=True):
            if parameter.is_complex() or gradient.is_sparse or not parameter.numel():
                assert math.isnan(row["lost"])
            else:
                assert row["lost"] == int(((old == new) & (gradient != 0)).sum())
    assert len(run.drift()) == 5 * len(tensors)
    assert len(run.stats("activation")) > 0


def assert_drift(rows: pd.DataFrame, start: torch.Tensor, steps: Sequence[torch.Tensor]) -> None:
    """Distances in the space of real and imaginary parts."""
    kind = torch.complex128 if start.is_complex() else torch.float64
    begin = start.to(kind)
    for (_, row), now in zip(rows.iterrows(), steps, strict=True):
        distance = float((now.to(kind) - begin).abs().square().sum().sqrt())
        assert row["distance"] == pytest.approx(distance, rel=1e-9, abs=1e-12)
        if not start.is_complex():
            assert row["sign_flips"] == int((now.to(kind) * begin < 0).sum())


def test_parameters_without_values_are_listed_and_left_alone(tmp_path: Path) -> None:
    """On the meta device: part of a model that lives elsewhere."""
    model = nn.ModuleDict({"here": nn.Linear(8, 2), "elsewhere": nn.Linear(8, 2, device="meta")})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, run=tmp_path / "run", every=1) as watcher:
        for step in range(3):
            loss_of(model["here"](batch(step))).backward()
            optimizer.step()
    assert failures(watcher) == ""
    run = Run(tmp_path / "run")
    assert run.tensors()["tensor"].tolist() == [
        "here.weight", "here.bias", "elsewhere.weight", "elsewhere.bias",
    ]  # fmt: skip
    assert run.tensors().set_index("tensor").loc["elsewhere.weight", "shape"] == [2, 8]
    for kind in ("weight", "initial_weight", "gradient", "update"):
        assert sorted(set(run.stats(kind)["tensor"])) == ["here.bias", "here.weight"]
    assert column(run, "weight", "norm", "here.weight")[2] == pytest.approx(
        norm(dict(model.named_parameters())["here.weight"])
    )


def test_a_lazy_model_that_is_partly_never_used(tmp_path: Path) -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.LazyLinear(4)
            self.never = nn.LazyLinear(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Partly()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        for _ in range(3):
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()
    assert not (tmp_path / "run" / "errors.log").exists(), (tmp_path / "run" / "errors.log").read_text()
    run = Run(tmp_path / "run")
    assert run.stats("weight")["tensor"].unique().tolist() == ["used.weight", "used.bias"]
    assert run.tensors().set_index("tensor").loc["used.weight", "shape"] == [4, 8]


def test_a_complex_weight_moves_by_its_true_update(tmp_path: Path) -> None:
    """A turn in the complex plane changes no modulus, and is an update all the same."""
    parameter = nn.Parameter(torch.tensor([1.0 + 0.0j, 2.0 + 0.0j]))
    model = nn.Module()
    model.w = parameter
    optimizer = torch.optim.SGD([parameter], 1.0)
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        parameter.grad = torch.tensor([1.0 - 1.0j, 2.0 - 2.0j])  # to 0+1j and 0+2j
        optimizer.step()
    run = Run(tmp_path / "run")
    assert run.stats("update", "w")["norm"].tolist() == pytest.approx([10**0.5])
    assert run.drift("w")["distance"].iloc[0] == pytest.approx(10**0.5)


def test_checkpointed_activations_are_counted_once(tmp_path: Path) -> None:
    _, run, _ = watched(tmp_path / "run", "checkpointed")
    assert set(run.stats("activation", "body.0")["samples"]) == {16}


def test_a_torch_module_of_no_known_make(tmp_path: Path) -> None:
    """Parameters in ParameterList and ParameterDict, with dots in no name."""
    model = nn.Module()
    model.rows = nn.ParameterList([torch.randn(3) for _ in range(2)])
    model.table = nn.ParameterDict({"a": nn.Parameter(torch.randn(2, 2))})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert Run(tmp_path / "run").tensors()["tensor"].tolist() == ["rows.0", "rows.1", "table.a"]
