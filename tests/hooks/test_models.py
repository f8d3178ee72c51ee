"""Every common make of model is watched without an error, with true numbers, and trains as without us."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from trainings import norm
from zoo import ZOO, train_entry

from layerwatch import Run, Watcher, watch


def watched(path: Path, name: str, **how: object) -> tuple[nn.Module, Run]:
    watchers: list[Watcher] = []
    model = train_entry(
        ZOO[name],
        on_ready=lambda m, o: watchers.append(watch(m, o, run=path, every=1, **how)),  # type: ignore[arg-type]
    )
    watchers[0].close()
    assert not (path / "errors.log").exists(), (path / "errors.log").read_text()
    return model, Run(path)


@pytest.mark.parametrize("name", ZOO)
def test_same_seed_same_weights_bit_for_bit(tmp_path: Path, name: str) -> None:
    alone = train_entry(ZOO[name])
    random = torch.get_rng_state()
    model, _ = watched(tmp_path / "run", name)
    assert torch.equal(torch.get_rng_state(), random)
    for (key, a), (_, b) in zip(alone.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", ZOO)
def test_every_tensor_has_true_rows(tmp_path: Path, name: str) -> None:
    model, run = watched(tmp_path / "run", name)
    tensors = run.tensors().set_index("tensor")
    for tensor, parameter in model.named_parameters():
        assert tensors.loc[tensor, "shape"] == list(parameter.shape)
        assert tensors.loc[tensor, "elements"] == parameter.numel()
        weights = run.stats("weight", tensor)
        assert weights["step"].tolist() == [0, 1, 2, 3, 4]
        now = parameter.detach().abs() if parameter.is_complex() else parameter.detach()
        assert weights["norm"].iloc[-1] == pytest.approx(norm(now), rel=1e-9)
        assert weights["count"].tolist() == [parameter.numel()] * 5
        if parameter.requires_grad:
            gradients = run.stats("gradient", tensor)
            gradient = parameter.grad
            assert gradient is not None
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            assert gradients["norm"].iloc[-1] == pytest.approx(norm(dense.abs()), rel=1e-9)
            assert gradients["count"].tolist() == [parameter.numel()] * 5
            assert len(run.stats("update", tensor)) == 5
    assert len(run.drift()) == 5 * len(tensors)
    assert len(run.stats("activation")) > 0


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


def test_a_norm_of_weights_in_a_complex_tensor_moves_by_its_true_update(tmp_path: Path) -> None:
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
    _, run = watched(tmp_path / "run", "checkpointed")
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
