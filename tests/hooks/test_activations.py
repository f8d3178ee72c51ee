"""Outputs of leaf modules: which calls are recorded, along which dimension, what compiled models show."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trainings import batch, loss_of, mlp, norm, train, watched_training

from layerwatch import Run, watch
from layerwatch.hooks.activations import ActivationTap


def capture_outputs(model: nn.Module) -> dict[str, list[Tensor]]:
    """The first tensor that each leaf put out, call by call: what the log should be about."""
    seen: dict[str, list[Tensor]] = {}

    def look(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                first = output if isinstance(output, Tensor) else output[0]
                seen.setdefault(name, []).append(first.detach().clone())

        return hook

    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(look(name))
    return seen


def assert_activations(run: Run, seen: dict[str, list[Tensor]], dims: dict[str, int], calls: int = 1) -> None:
    """Each row is the summary of a step's calls together."""
    assert set(run.stats("activation")["tensor"]) == set(seen)
    for name, outputs in seen.items():
        frame = run.stats("activation", name)
        steps, active = run.activity("activation", name)
        assert steps.tolist() == frame["step"].tolist() == list(range(len(outputs) // calls))
        for step, line in enumerate(frame.to_dict("records")):
            mine = outputs[step * calls : (step + 1) * calls]
            together = torch.cat([o.flatten() for o in mine]).double()
            units = mine[0].shape[dims[name]]
            assert line["count"] == together.numel()
            assert line["norm"] == pytest.approx(norm(together), rel=1e-9)
            assert line["mean"] == pytest.approx(float(together.mean()), rel=1e-6, abs=1e-9)
            assert line["zeros"] == int((together == 0).sum())
            assert line["units"] == units
            assert line["samples"] == together.numel() // units
            others = [(o.movedim(dims[name], 0).flatten(1) != 0).any(1) for o in mine]
            assert active[step].tolist() == torch.stack(others).any(0).tolist()
            assert line["active_units"] == int(active[step].sum())


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.conv(x))))
        return self.head(self.drop(x.flatten(1)))


def test_linear_layers_and_units(tmp_path: Path) -> None:
    model = mlp()
    seen = capture_outputs(model)
    run = watched_training(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1))
    assert_activations(run, seen, {"0": -1, "1": -1, "2": -1})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions_have_channels(tmp_path: Path, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = Image().to(memory_format=layout)  # type: ignore[call-overload]
    seen = capture_outputs(model)

    def data(step: int) -> Tensor:
        images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        return images.to(memory_format=layout)

    run = watched_training(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1), 3, data=data)
    dims = {"conv": 1, "norm": 1, "relu": 1, "pool": 1, "drop": -1, "head": -1}
    assert_activations(run, seen, dims)


def test_a_unit_that_never_fires_is_seen(tmp_path: Path) -> None:
    model = mlp()
    with torch.no_grad():
        model.get_parameter("0.weight")[[2, 7]] = 0.0
        model.get_parameter("0.bias")[[2, 7]] = -1.0
    run = watched_training(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.01))
    _, active = run.activity("activation", "1")
    assert np.flatnonzero(~active.any(axis=0)).tolist() == [2, 7]
    assert run.stats("activation", "1")["active_units"].tolist() == [14] * 4
    _, receiving = run.activity("gradient", "0.weight")
    assert np.flatnonzero(~receiving.any(axis=0)).tolist() == [2, 7]
    assert run.stats("gradient", "0.weight")["active_units"].tolist() == [14] * 4


def test_calls_within_a_step_are_one_row(tmp_path: Path) -> None:
    """A shared module that is called twice, and micro-batches."""

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.trunk(x) - self.trunk(x * 2)

    model = Siamese()
    seen = capture_outputs(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        for step in range(3):
            for micro in range(3):
                loss_of(model(batch(10 * step + micro))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_activations(Run(tmp_path / "run"), seen, {"trunk": -1}, calls=6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_is_not_recorded(tmp_path: Path, mode: Any) -> None:
    model = mlp()
    seen = capture_outputs(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        for step in range(3):
            with mode():
                model.eval()
                model(batch(99, 1000))
                model.train()
            train(model, optimizer, 1, data=lambda _, s=step: batch(s))
    assert_activations(Run(tmp_path / "run"), seen, {"0": -1, "1": -1, "2": -1})


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def test_tuple_outputs_are_their_first_tensor(tmp_path: Path) -> None:
    model = Recurrent()
    seen = capture_outputs(model)
    run = watched_training(
        tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1),
        data=lambda s: torch.randn(4, 7, 8, generator=torch.Generator().manual_seed(s)),
    )  # fmt: skip
    assert_activations(run, seen, {"lstm": -1, "head": -1})


class Odd(nn.Module):
    """Puts out what is no floating tensor at all."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output


@pytest.mark.parametrize(
    "output", [None, 3, "x", (), [], {}, (None, 1), torch.tensor([1, 2]), torch.empty(0, 4)]
)
def test_outputs_without_numbers_are_passed_over(tmp_path: Path, output: Any) -> None:
    model = nn.ModuleDict({"net": mlp(), "odd": Odd(output)})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        for step in range(3):
            model["odd"](batch(step))
            loss_of(model["net"](batch(step))).backward()
            optimizer.step()
    run = Run(tmp_path / "run")
    assert not (tmp_path / "run" / "errors.log").exists()
    assert {"net.0", "net.1", "net.2"} <= set(run.stats("activation")["tensor"])
    assert len(run.stats("activation", "net.0")) == 3


def test_mappings_are_looked_into(tmp_path: Path) -> None:
    model = nn.ModuleDict({"net": mlp(), "odd": Odd({"label": None, "logits": torch.ones(2, 3)})})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        model["odd"](batch(0))
        loss_of(model["net"](batch(0))).backward()
        optimizer.step()
    assert Run(tmp_path / "run").stats("activation", "odd")["count"].tolist() == [6]


def test_hooks_exist_only_for_captured_steps(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    armed = []
    watcher = watch(model, optimizer, run=tmp_path / "run", every=3)
    for step in range(7):
        armed.append(any(m._forward_hooks for m in model.modules()))
        train(model, optimizer, 1, data=lambda _, s=step: batch(s))
    watcher.close()
    assert armed == [True, False, False, True, False, False, True]
    assert Run(tmp_path / "run").stats("activation", "0")["step"].tolist() == [0, 3, 6]
    assert not any(m._forward_hooks for m in model.modules())


def test_activations_can_be_left_out(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watcher = watch(model, optimizer, run=tmp_path / "run", every=1, activations=False)
    assert not any(m._forward_hooks for m in model.modules())
    train(model, optimizer, 2)
    watcher.close()
    assert "activation" not in Run(tmp_path / "run").kinds()
    assert Run(tmp_path / "run").modules().empty


# Compiled models --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, while it compiles
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("watched", ["compiled", "raw"])
def test_a_compiled_model_has_no_added_graph_break(tmp_path: Path, backend: str, watched: str) -> None:
    torch._dynamo.reset()
    graphs = 0

    def counting(module: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    model = mlp()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(compiled if watched == "compiled" else model, optimizer, run=tmp_path / "run", every=2):  # type: ignore[arg-type]
        for step in range(6):
            loss_of(compiled(batch(step))).backward()
            optimizer.step()
            optimizer.zero_grad()
    # Whole graphs only. Of a model that was compiled behind our back there are two: with hooks and without.
    assert graphs == (1 if watched == "compiled" else 2)
    run = Run(tmp_path / "run")
    assert not (tmp_path / "run" / "errors.log").exists()
    assert run.tensors()["tensor"].tolist() == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert sorted(run.stats("gradient", "0.weight")["step"]) == [0, 2, 4]
    assert run.stats("activation").empty
    if watched == "compiled":
        assert any("cannot be seen" in note for note in run.info["notes"])
    torch._dynamo.reset()


def test_a_scripted_part_is_left_alone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated, and still in use
        scripted = torch.jit.trace(model[0], torch.zeros(1, 8))
    mixed = nn.Sequential(scripted, model[1], model[2])  # type: ignore[arg-type]
    run = watched_training(tmp_path / "run", mixed, torch.optim.SGD(mixed.parameters(), 0.1))
    assert not (tmp_path / "run" / "errors.log").exists()
    assert set(run.stats("activation")["tensor"]) == {"1", "2"}
    assert len(run.stats("weight", "0.weight")) == 4
    assert any("scripted" in note for note in run.info["notes"])


def test_a_step_whose_forward_was_over_is_not_called_silent() -> None:
    """An accident is known at backward: its step is captured, and the hooks come too late for its outputs."""
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    tap = ActivationTap([model], lambda work: work)
    tap.attach()
    model(x)
    tap.arm()
    assert (tap.take(), tap.notes()) == ([], [])
    model(x)
    assert [seen.tensor for seen in tap.take()] == ["Linear"]
    assert tap.notes() == []
    tap.detach()
