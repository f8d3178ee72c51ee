"""What each unit did, against numpy: dead and saturated shares, for any layout, dtype and number of calls."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from layerwatch.hooks import units
from layerwatch.hooks.activations import ActivationTap
from layerwatch.hooks.attention import Observation
from layerwatch.hooks.pending import Pending
from layerwatch.monitor import kernels
from layerwatch.monitor.summary import summarise


def observe(model: nn.Module, *inputs: Any, backward: bool = False) -> dict[tuple[str, str], Observation]:
    """What a captured step with one call for each of these inputs shows."""
    tap = ActivationTap([model], lambda work: work)
    tap.arm()
    for x in inputs:
        output = model(x)
        if backward:
            output.sum().backward()
    found = {(o.tensor, o.kind): o for o in tap.take()}
    tap.detach()
    return found


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def per_unit(hit: Any, dim: int) -> np.ndarray:
    """The share of True along a dimension's units."""
    mask = np.moveaxis(hit.numpy() if isinstance(hit, Tensor) else hit, dim, 0)
    return mask.reshape(len(mask), -1).mean(axis=1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (70_000, 3, 1), (5, 7, 1), (4, 6, 11), (3, 1, 5), (0, 4, 1)])
def test_kernels_count_what_numpy_counts(shape: tuple[int, ...], dtype: Any) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    x[x < -0.5] = 0.0
    if x.size > 10:
        x.flat[3], x.flat[5], x.flat[6] = np.nan, np.inf, -np.inf
    zeros, ends = np.ones((2, shape[1]), np.int64)  # they add
    kernels.unit_counts(x, dtype(-0.3), dtype(0.9), zeros, ends)
    with np.errstate(invalid="ignore"):
        assert (zeros - 1).tolist() == (x == 0).sum(axis=(0, 2)).tolist()
        assert (ends - 1).tolist() == ((x < dtype(-0.3)) | (x > dtype(0.9))).sum(axis=(0, 2)).tolist()
    active = np.zeros(shape[1], bool)
    kernels.active_units(x, active)
    assert active.tolist() == (x != 0).any(axis=(0, 2)).tolist()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dead_share_of_images(layout: str, dtype: torch.dtype) -> None:
    x = randn(6, 5, 4, 8).to(dtype)
    x = x - torch.arange(5).view(1, 5, 1, 1) * 0.7
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(2, 3)
    elif layout == "sliced":
        x = x[..., ::2]
    found = observe(nn.Sequential(nn.ReLU()), x)
    expected = per_unit(torch.relu(x) == 0, 1)
    assert found["0", "dead_share"].values == pytest.approx(expected)
    summary, truth = found["0", "activation"].summary, summarise(torch.relu(x).detach().double().numpy())
    assert summary is not None
    assert (summary.count, summary.zeros, summary.max) == (truth.count, truth.zeros, truth.max)
    assert summary.counts.tolist() == truth.counts.tolist()
    assert summary.samples == x.numel() // 5
    assert ("0", "saturated_share") not in found


def test_a_dense_layout_is_not_copied() -> None:
    x = torch.randn(6, 5, 4, 8).to(memory_format=torch.channels_last)
    dense, unit = units.in_memory_order(x, 1)
    assert dense.data_ptr() == x.data_ptr()
    assert dense.is_contiguous()
    assert unit == 3
    assert torch.equal(dense.movedim(unit, 0), x.movedim(1, 0))


@pytest.mark.parametrize(
    ("module", "saturated"),
    [
        (nn.Sigmoid(), lambda y: (y < 0.05) | (y > 0.95)),
        (nn.Tanh(), lambda y: y.abs() > 0.95),
        (nn.Softsign(), lambda y: y.abs() > 0.95),
        (nn.Hardtanh(-1.5, 0.5), lambda y: (y == -1.5) | (y == 0.5)),
        (nn.Hardsigmoid(), lambda y: (y == 0) | (y == 1)),
        (nn.ReLU6(), lambda y: y == 6),
        (nn.Softmax(dim=-1), lambda y: y > 0.95),
    ],
    ids=lambda m: type(m).__name__ if isinstance(m, nn.Module) else "",
)
def test_saturated_share(module: nn.Module, saturated: Callable[[Tensor], Tensor]) -> None:
    x = 4 * randn(200, 6) + torch.arange(6)
    found = observe(nn.Sequential(module), x)
    expected = per_unit(saturated(module(x)), 1)
    assert 0 < expected.max() < 1
    assert found["0", "saturated_share"].values == pytest.approx(expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_outputs(kind: Any, packed: bool) -> None:
    torch.manual_seed(0)
    module = kind(4, 6, batch_first=True)
    for p in module.parameters():
        nn.init.normal_(p, std=3.0)
    x: Any = randn(5, 9, 4)
    x = pack_padded_sequence(x, torch.tensor([9, 7, 5, 2, 1]), batch_first=True) if packed else x
    found = observe(nn.ModuleList([module])[0], x)
    y = module(x)[0]
    y = y.data if packed else y
    expected = per_unit(y.detach().abs() > 0.95, -1)
    assert expected.max() > 0
    row = found[kind.__name__, "saturated_share"]
    assert row.values == pytest.approx(expected)
    summary = found[kind.__name__, "activation"].summary
    assert summary is not None
    assert summary.count == y.numel()


@pytest.mark.parametrize("dim", [-1, 1])
def test_the_gate_of_a_glu(dim: int) -> None:
    x = 3 * randn(7, 8, 10)
    found = observe(nn.Sequential(nn.GLU(dim)), x)
    gate = torch.sigmoid(x.chunk(2, dim)[1].detach())
    assert found["0", "saturated_share"].values == pytest.approx(per_unit((gate < 0.05) | (gate > 0.95), dim))


@pytest.mark.parametrize(
    "module", [nn.Linear(5, 5), nn.Dropout(0.5), nn.GELU(), nn.LayerNorm(5), nn.LeakyReLU()]
)
def test_other_modules_have_no_shares(module: nn.Module) -> None:
    x = randn(40, 5).abs().detach().requires_grad_()  # a Dropout leaves zeros and nothing negative
    found = observe(nn.Sequential(module), x)
    assert {kind for _, kind in found} == {"activation"}


def test_whatever_puts_out_zeros_and_nothing_negative_can_be_dead() -> None:
    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) ** 2

    x = randn(30, 4) - torch.tensor([0.0, 9.0, 1.0, -9.0])
    row = observe(nn.Sequential(Squared()), x)["0", "dead_share"]
    assert row.values == pytest.approx(per_unit(torch.relu(x) == 0, 1))
    assert row.values is not None
    assert row.values[[1, 3]].tolist() == [1.0, 0.0]


def test_calls_of_a_step_add() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    batches = [randn(n, 3, seed=n) for n in (5, 11, 2)]
    found = observe(model, *batches)
    together = torch.cat([model(x) for x in batches])
    assert found["1", "dead_share"].values == pytest.approx(per_unit(together == 0, 1))
    summary = found["1", "activation"].summary
    assert summary is not None
    assert summary.samples == 18
    assert summary.sum == pytest.approx(float(together.detach().double().sum()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_counts_once(reentrant: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    found = observe(Model(), randn(5, 3), randn(6, 3, seed=1), backward=True)
    summary = found["inner.1", "activation"].summary
    assert summary is not None
    assert summary.samples == 11


def test_units_up_to_a_number() -> None:
    found = observe(nn.Sequential(nn.ReLU()), randn(2, units.MAX_UNITS))
    assert found["0", "dead_share"].values is not None
    found = observe(nn.Sequential(nn.ReLU()), randn(2, units.MAX_UNITS + 1))
    assert ("0", "dead_share") not in found
    assert found["0", "activation"].summary is not None


def test_calls_with_different_units_have_no_shares() -> None:
    found = observe(nn.Sequential(nn.ReLU()), randn(3, 4), randn(3, 5))
    assert {kind for _, kind in found} == {"activation"}


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Tanh(), nn.Identity(), nn.ReLU6(), nn.GLU()])
def test_a_device_computes_the_same(module: nn.Module) -> None:
    """The asynchronous way, run on the CPU."""
    output = module(4 * randn(6, 4, 5, 10)).detach()
    results = []
    for reduce in (units._on_host, units._on_device):
        pending = Pending()
        mine = units.Units(module, pending)
        dense, unit = units.in_memory_order(output, units.unit_dimension(module, output))
        mine._calls.append(reduce(pending, module, dense, unit, *units.flat_ends(module, output.ndim)))
        pending.settle()
        results.append(mine.observed())
    (summary, *shares), (other, *others) = results
    assert (summary.active, summary.units, summary.samples) == (other.active, other.units, other.samples)
    for share, theirs in zip(shares, others, strict=True):
        assert (share is None) == (theirs is None)
        assert share is None or share.tolist() == theirs.tolist()


def test_modules_that_come_later_are_followed() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    tap = ActivationTap([model], lambda work: work)
    tap.arm()
    model(randn(2, 3))
    assert {o.tensor for o in tap.take()} == {"0"}
    tap.disarm()
    model.append(nn.ReLU())
    tap.arm()
    model(randn(2, 3))
    assert {o.tensor for o in tap.take()} == {"0", "1"}
    tap.detach()


def test_copies_of_an_armed_model_carry_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Dropout(), nn.MultiheadAttention(4, 2))
    tap = ActivationTap([model], lambda work: work)
    tap.arm()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        other[:3](randn(2, 3))
    assert tap.take() == []
    tap.detach()
    assert not any(m._forward_hooks for m in model.modules())
