"""Optimizer state: second moments and momentum of many optimizers, against the optimizers' own arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from trainings import batch, loss_of, mlp, train, watched_training

from layerwatch.hooks import optimizer_state
from layerwatch.hooks.optimizer_state import on_device, summaries
from layerwatch.monitor import Summary, summarise

Rows = dict[tuple[str, str], Summary]

ADAMS: dict[str, Callable[[Any], Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, 1e-2),
    "Adam, eps": lambda p: torch.optim.Adam(p, 1e-2, eps=0.03),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "AdamW, one by one": lambda p: torch.optim.AdamW(p, 1e-2, foreach=False),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True, betas=(0.9, 0.5)),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, 1e-2),
}


def rows_of(model: nn.Module, optimizer: Optimizer) -> Rows:
    names = {id(p): n for n, p in model.named_parameters()}
    rows = summaries(optimizer, names)
    found = {(tensor, kind): summary for tensor, kind, summary in rows}
    assert len(found) == len(rows)
    return found


def trained(
    make: Callable[[Any], Optimizer], steps: int = 5, model: nn.Module | None = None
) -> tuple[nn.Module, Optimizer]:
    model = model or mlp()
    optimizer = make(model.parameters())
    train(model, optimizer, steps)
    return model, optimizer


def assert_summary(found: Summary, values: Tensor) -> None:
    true = summarise(values.detach().to(torch.float64).numpy())
    for name in ("count", "zeros", "subnormals", "nans", "pos_infs", "neg_infs"):
        assert getattr(found, name) == getattr(true, name), name
    for name in ("sum", "sum_sq", "min", "max"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-9), name
    assert np.array_equal(found.buckets, true.buckets)
    assert np.array_equal(found.counts, true.counts)


def assert_second(found: Summary, v: Tensor, v_hat: Tensor, gradient: Tensor | None, eps: float) -> None:
    assert_summary(found, v)
    v64 = v_hat.detach().double()
    assert found.lost == int((v64.sqrt() < eps).sum())
    if gradient is None:
        assert found.dot is None
    else:
        ratios = gradient.double().square() / v64.clamp(min=eps**2)
        assert found.dot == pytest.approx(float(ratios.sum()), rel=1e-6)


@pytest.mark.parametrize("kind", ADAMS)
def test_adam_and_its_relatives(kind: str) -> None:
    model, optimizer = trained(ADAMS[kind])
    rows = rows_of(model, optimizer)
    assert len(rows) == 2 * 4
    group = optimizer.param_groups[0]
    some_below = 0
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        v = state["max_exp_avg_sq"] if "amsgrad" in kind else state["exp_avg_sq"]
        correction = 1 - group["betas"][1] ** 5
        assert_second(rows[name, "second_moment"], v, v.double() / correction, p.grad, group["eps"])
        assert_summary(rows[name, "momentum"], state["exp_avg"])
        some_below += rows[name, "second_moment"].lost or 0
    assert (some_below > 0) == (kind == "Adam, eps")


def test_the_ratio_is_the_step_that_adam_takes() -> None:
    """At the first step v_hat is g^2: every ratio is 1, whatever the gradient's size."""
    model, optimizer = trained(lambda p: torch.optim.Adam(p, 1e-2, eps=1e-12), 1)
    for name, p in model.named_parameters():
        assert p.grad is not None
        found = rows_of(model, optimizer)[name, "second_moment"]
        assert found.dot == pytest.approx(int((p.grad != 0).sum()), rel=1e-4)


OTHERS: dict[str, tuple[Callable[[Any], Optimizer], str | None, str | None]] = {
    "RMSprop": (lambda p: torch.optim.RMSprop(p, 1e-3), "square_avg", None),
    "RMSprop, m": (lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9), "square_avg", "momentum_buffer"),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, 1e-2), "sum", None),
    "Adadelta": (lambda p: torch.optim.Adadelta(p), "square_avg", None),
    "SGD": (lambda p: torch.optim.SGD(p, 1e-2), None, None),
    "SGD, m": (lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True), None, "momentum_buffer"),
    "Adamax": (lambda p: torch.optim.Adamax(p, 1e-3), None, "exp_avg"),
    "Rprop": (lambda p: torch.optim.Rprop(p, 1e-3), None, None),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_optimizers_have_what_they_have(kind: str) -> None:
    make, second, first = OTHERS[kind]
    model, optimizer = trained(make)
    rows = rows_of(model, optimizer)
    assert len(rows) == 4 * ((second is not None) + (first is not None))
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        if second:
            eps = optimizer.param_groups[0]["eps"]
            eps = eps**0.5 if kind == "Adadelta" else eps
            assert_second(rows[name, "second_moment"], state[second], state[second], p.grad, eps)
        if first:
            assert_summary(rows[name, "momentum"], state[first])


def test_lbfgs_and_factored_optimizers_are_left_alone() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model(batch(0)))
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert rows_of(model, optimizer) == {}
    assert rows_of(*trained(lambda p: torch.optim.Adafactor(p, 1e-3))) == {}


def test_only_named_parameters_and_those_that_stepped() -> None:
    model, optimizer = trained(ADAMS["Adam"], 0)
    assert rows_of(model, optimizer) == {}
    train(model, optimizer, 1)
    first = next(model.parameters())
    assert [row[:2] for row in summaries(optimizer, {id(first): "w"})] == [
        ("w", "second_moment"),
        ("w", "momentum"),
    ]
    first.grad = None
    assert summaries(optimizer, {id(first): "w"})[0][2].dot is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 30).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-4)
    train(model, optimizer, 3, data=lambda s: batch(s, 8, 40).to(dtype))
    check_adam(model, optimizer, 3)


def check_adam(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    rows = rows_of(model, optimizer)
    for name, p in model.named_parameters():
        v = optimizer.state[p]["exp_avg_sq"]
        hat = v.double() / (1 - 0.999**steps)
        assert_second(rows[name, "second_moment"], v, hat, p.grad, optimizer.param_groups[0]["eps"])
        assert_summary(rows[name, "momentum"], optimizer.state[p]["exp_avg"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_tensors_are_done_in_blocks(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """Elements of moment and gradient stay beside each other, whatever the layout of either."""
    monkeypatch.setattr(optimizer_state, "BLOCK", 100)
    torch.manual_seed(0)
    model = nn.Conv2d(5, 16, 3, dtype=dtype)
    model.to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, eps=1e-4)
    train(model, optimizer, 2, data=lambda s: torch.randn(4, 5, 8, 8).to(dtype))
    assert model.weight.grad is not None
    model.weight.grad = model.weight.grad.contiguous()
    check_adam(model, optimizer, 2)


def test_complex_tensors_by_their_parts() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 5, dtype=torch.complex64)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    train(model, optimizer, 2, data=lambda s: batch(s, 8, 6).to(torch.complex64))
    rows = rows_of(model, optimizer)
    weight = model.weight
    v = torch.view_as_real(optimizer.state[weight]["exp_avg_sq"])
    assert weight.grad is not None
    gradient = torch.view_as_real(weight.grad)
    assert_second(rows["weight", "second_moment"], v, v.double() / (1 - 0.999**2), gradient, 1e-8)


def test_sparse_gradients_have_no_ratio() -> None:
    model = nn.Embedding(20, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(list(model.parameters()))
    model(torch.tensor([1, 3, 3])).square().sum().backward()
    optimizer.step()
    found = rows_of(model, optimizer)["weight", "second_moment"]
    assert (found.dot, found.count, found.zeros) == (None, 80, 72)


def test_broken_gradients_break_nothing() -> None:
    model, optimizer = trained(ADAMS["Adam"], 1)
    first = next(model.parameters())
    assert first.grad is not None
    first.grad[0, 0], first.grad[0, 1] = float("nan"), float("inf")
    optimizer.step()
    found = rows_of(model, optimizer)["0.weight", "second_moment"]
    assert found.nans + found.pos_infs == 2
    assert found.dot is not None
    assert np.isfinite(found.dot)


@pytest.mark.parametrize("betas", [(0.9, 1.0), (0.0, 0.0)])
def test_extreme_settings(betas: tuple[float, float]) -> None:
    model, optimizer = trained(lambda p: torch.optim.Adam(p, 1e-3, betas=(0.9, 0.5), eps=0.0), 1)
    optimizer.param_groups[0]["betas"] = betas
    rows = rows_of(model, optimizer)
    assert (("0.weight", "second_moment") in rows) == (betas[1] < 1)
    assert all(np.isfinite(s.dot) for s in rows.values() if s.dot is not None)


@pytest.mark.parametrize("kind", ["AdamW, fused", "Adam, eps", "SGD, m", "RMSprop, m"])
def test_the_operations_of_a_device_agree(kind: str) -> None:
    """On the CPU; with the correction as a tensor, as it is when the optimizer counts steps on the device."""
    make = ADAMS[kind] if kind in ADAMS else OTHERS[kind][0]
    model, optimizer = trained(make)
    wanted = rows_of(model, optimizer)
    seconds, firsts = [], []
    for group in optimizer.param_groups:
        for name, p in model.named_parameters():
            second = optimizer_state._second(p, name, optimizer.state[p], group)
            first = optimizer_state._find(optimizer.state[p], optimizer_state.FIRST, p)
            if second is not None:
                count = torch.tensor(second.correction, dtype=torch.float64)
                seconds.append(dataclasses.replace(second, correction=count))
            firsts += [(name, first)] if first is not None else []
    found = {(tensor, what): summary for tensor, what, summary in on_device(seconds, firsts)}
    assert found.keys() == wanted.keys()
    for key, summary in found.items():
        assert (summary.count, summary.lost) == (wanted[key].count, wanted[key].lost)
        assert summary.sum_sq == pytest.approx(wanted[key].sum_sq)
        assert np.array_equal(summary.counts, wanted[key].counts)
        assert summary.dot == pytest.approx(wanted[key].dot)


def test_a_run_holds_the_state_of_every_tenth_capture(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, eps=0.03)
    truth: dict[int, tuple[float, float]] = {}

    def look(step: int) -> None:
        p = model.get_parameter("0.weight")
        hat = optimizer.state[p]["exp_avg_sq"].double() / (1 - 0.999 ** (step + 1))
        assert p.grad is not None
        ratio = p.grad.double().square() / hat.clamp(min=0.03**2)
        truth[step] = (float(ratio.mean().sqrt()), float((hat.sqrt() < 0.03).double().mean()))

    run = watched_training(tmp_path / "run", model, optimizer, 25, after_step=look)
    frame = run.stats("second_moment", "0.weight")
    assert frame["step"].tolist() == run.stats("momentum", "0.weight")["step"].tolist() == [0, 10, 20]
    for line in frame.to_dict("records"):
        assert (line["rms_ratio"], line["below_epsilon"]) == pytest.approx(truth[line["step"]], rel=1e-6)
    assert 0 < frame["below_epsilon"].iloc[-1] < 1
