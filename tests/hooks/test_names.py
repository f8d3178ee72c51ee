"""One network has the same names whatever is wrapped around it, so that runs of different stacks compare."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from layerwatch import Run, watch
from layerwatch.hooks.tensors import Tensors, canonical, leaf_modules, watched_tensors


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def checkpointed(net: nn.Module) -> nn.Module:
    apply_activation_checkpointing(net, check_fn=lambda m: isinstance(m, nn.Linear))
    return net


def compiled(net: nn.Module) -> Any:
    return torch.compile(net, backend="aot_eager")


def in_parts(net: nn.Module) -> nn.Module:
    net.body = compiled(net.body)  # type: ignore[arg-type]
    return net


class Forwarding(nn.Module):
    """As Lightning Fabric wraps."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self._forward_module = net


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "DataParallel": nn.DataParallel,
    "compile": compiled,
    "compile in parts": in_parts,
    "checkpoint wrapper": checkpointed,
    "EMA": AveragedModel,
    "Accelerate": lambda net: Accelerator(cpu=True).prepare(net),
    "Fabric": Forwarding,
    "all at once": lambda net: compiled(nn.DataParallel(Forwarding(checkpointed(net)))),
}


@pytest.fixture
def _process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def names_of(*models: nn.Module) -> list[str]:
    return [t.name for t in Tensors(models)]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_wrappers_leave_no_trace(wrap: str) -> None:
    wrapped = WRAPPED[wrap](Net())
    assert [n for n, _ in wrapped.named_parameters()] != names_of(Net()) or wrap == "Accelerate"
    assert names_of(wrapped) == names_of(Net())
    assert {t.module for t in watched_tensors([wrapped])} == {"body.0", "body.2", "head"}
    if "compile" not in wrap and wrap != "all at once":  # inside compiled parts no module is seen
        assert [name for name, _ in leaf_modules([wrapped])] == ["body.0", "body.1", "body.2", "head"]


@pytest.mark.usefixtures("_process_group")
def test_replicas_too() -> None:
    assert names_of(DistributedDataParallel(Net())) == names_of(Net())
    assert names_of(compiled(DistributedDataParallel(Net()))) == names_of(Net())  # type: ignore[arg-type]


def adapted(**how: Any) -> nn.Module:
    return get_peft_model(Net(), LoraConfig(r=1, target_modules=["0"], modules_to_save=["head"], **how))  # type: ignore[arg-type]


ADAPTERS = [f"body.0.lora_{part}.default.weight" for part in "AB"]


def test_peft() -> None:
    names = names_of(adapted())
    assert names == [
        "body.0.weight", "body.0.bias", *ADAPTERS, "body.2.weight", "body.2.bias",
        "head.original_module.weight", "head.original_module.bias", "head.weight", "head.bias",
    ]  # fmt: skip
    assert names_of(nn.DataParallel(adapted())) == names
    tensors = {t.name: t for t in watched_tensors([adapted()])}
    assert tensors["head.weight"].parameter.requires_grad  # the copy that is trained
    assert (tensors["body.0.weight"].module, tensors["body.0.weight"].module_type) == ("body.0", "Linear")
    assert "body.0" in dict(leaf_modules([adapted()]))


def test_a_second_adapter_keeps_what_tells_it_from_the_first() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=1, target_modules=["0"], modules_to_save=["head"]))  # type: ignore[operator, arg-type]
    names = names_of(model)
    assert len(set(names)) == len(names) == len(list(model.parameters()))
    assert "base_model.model.head.modules_to_save.other.weight" in names
    assert "body.0.lora_A.other.weight" in names


class Named(nn.Module):
    """A user's own parts, with the names that wrappers take."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.base_layer = nn.Linear(2, 2)
        self.base_model = nn.Linear(2, 2)


def test_names_that_would_become_one_are_kept() -> None:
    assert names_of(Named()) == [
        "weight", "bias", "base_layer.weight", "base_layer.bias", "base_model.weight", "base_model.bias",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("base_model.model.model.layers.0.q.base_layer.weight", "model.layers.0.q.weight"),
        ("module._orig_mod.base_model.model.x", "x"),
        ("x.modules_to_save.default.weight", "x.weight"),
        ("base_model.encoder.weight", "base_model.encoder.weight"),
        ("my_base_model.model.weight", "my_base_model.model.weight"),
        ("database_layer.weight", "database_layer.weight"),
    ],
)
def test_canonical(raw: str, name: str) -> None:
    assert canonical(raw) == name


def test_drift_of_an_adapted_model_is_measured_from_the_plain_checkpoint(tmp_path: Path) -> None:
    """Whose names are those of the network without PEFT."""
    torch.manual_seed(0)
    start = Net()
    path = tmp_path / "start.pt"
    torch.save({name: weight + 1 for name, weight in start.state_dict().items()}, path)
    model = get_peft_model(start, LoraConfig(r=1, target_modules=["0"], modules_to_save=["head"]))  # type: ignore[arg-type]
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1)
    with watch(model, optimizer, run=tmp_path / "run", every=1, reference=os.fspath(path)):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    drift = Run(tmp_path / "run").drift().set_index("tensor")["relative_l2"]
    assert set(names_of(Net())) <= set(drift.dropna().index)
    before = torch.load(path)["body.0.weight"]
    layer: Any = start.body[0]
    effective = (layer.base_layer.weight + layer.get_delta_weight("default")).detach()
    expected = float((effective - before).norm() / before.norm())
    assert drift["body.0.weight"] == pytest.approx(expected, rel=1e-5)
