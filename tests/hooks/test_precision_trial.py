"""Advised number formats tried on a metric: the weights are rounded as said, and come back bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import layerwatch
from layerwatch import try_precision


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        for name in ("0.weight", "2.weight", "4.weight"):
            model.get_parameter(name).normal_(0, 0.2)
        model.get_parameter("2.weight")[5, 6] = 30.0
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


def output_error(model: nn.Sequential) -> tuple[Tensor, Callable[[nn.Module], float]]:
    """A batch's outputs, and the relative error against them as a metric."""
    x = torch.randn(64, 16)
    with torch.no_grad():
        truth = model(x)

    def metric(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net(x) - truth).norm() / truth.norm())

    return truth, metric


def test_the_advice_costs_less_than_one_scale_for_a_matrix_with_an_outlier() -> None:
    model = network()
    before = state(model)
    _, metric = output_error(model)
    report = layerwatch.precision(model)
    advised = report.recommended()
    assert advised["2.weight"] == "int8 per channel"
    trial = try_precision(model, report, metric, each=True)
    assert same(before, state(model))
    assert trial.before == 0 < trial.after < 0.1
    assert trial.change == trial.after
    assert set(trial.each) == set(advised) == set(trial.formats)
    worse = try_precision(model, {"2.weight": "int4 per tensor"}, metric)
    assert worse.after > 3 * trial.after
    frame = trial.frame()
    assert frame["change"].abs().is_monotonic_decreasing
    assert len(frame) == len(advised)


def test_weights_are_rounded_as_torch_rounds_them() -> None:
    model = network()
    seen = {}

    def look(net: nn.Module) -> float:
        seen.update(state(net))
        return 0.0

    weight = model.get_parameter("0.weight").detach().clone()
    scale = weight.abs().amax(1) / 127
    truth = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(32).int(), 0, -127, 127)
    try_precision(model, {"0.weight": "int8 per channel", "2.bias": "bf16"}, look)
    assert torch.equal(seen["0.weight"], truth)
    assert torch.equal(seen["2.bias"], model.get_parameter("2.bias").bfloat16().float())
    assert torch.equal(seen["2.weight"], model.get_parameter("2.weight"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_come_back_when_the_metric_fails(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    before = state(model)
    calls = []

    def fails(net: nn.Module) -> float:
        calls.append(not same(before, state(net)))
        if len(calls) == 2:
            raise RuntimeError("no data")
        return 0.0

    with pytest.raises(RuntimeError, match="no data"):
        try_precision(model, {"0.weight": "int4 per channel", "2.weight": "fp8_e4m3"}, fails)
    assert calls == [False, True]
    assert same(before, state(model))


def test_tied_weights_come_back_too() -> None:
    model = network()
    again = nn.Linear(32, 32)
    again.register_parameter("weight", model.get_parameter("2.weight"))
    model.add_module("again", again)
    before = state(model)
    formats = {"2.weight": "int4 per tensor", "again.weight": "int8 per tensor"}
    try_precision(model, formats, lambda net: 0.0, each=True)
    assert same(before, state(model))


def test_what_is_not_finite_stays_and_what_overflows_does_as_the_format_says() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[float("nan"), 1e6], [1.0, -float("inf")]]))
    seen: list[Tensor] = []

    def look(net: nn.Module) -> float:
        seen.append(net.get_parameter("weight").detach().clone())
        return 0.0

    try_precision(model, {"weight": "fp16"}, look)
    assert seen[1].isnan().tolist() == [[True, False], [False, False]]
    assert seen[1].isinf().tolist() == [[False, True], [False, True]]
    try_precision(model, {"weight": "fp8_e4m3"}, look)
    assert seen[3][0, 1] == 448


def test_wrong_requests_are_one_clear_line() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"it has no 9\.weight: give the report of this model"):
        try_precision(model, {"9.weight": "int8 per tensor"}, lambda net: 0.0)
    with pytest.raises(ValueError, match="expected a number format among fp16, bf16"):
        try_precision(model, {"0.weight": "int3"}, lambda net: 0.0)
