"""What happens to a model after `watch`: parts come, go, are replaced, materialised and tied anew."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from trainings import Weights, column, failures, gradients_of, norm, train, weights_of

from layerwatch import Run, watch
from layerwatch.hooks.tensors import Tensors

#: A run, and what plain torch saw: weights after, and gradients at each step.
Watching = tuple[Run, list[Weights], list[Weights]]


class Body(nn.Module):
    """Two linear layers, one without bias, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.head = nn.Linear(4, 5, bias=False)


BEFORE = ["embed.weight", "layers.0.weight", "layers.0.bias", "head.weight"]


def assert_follows(tensors: Tensors, model: nn.Module) -> None:
    """The same objects as torch itself finds, under their first names."""
    truth = dict(model.named_parameters())
    assert {t.name: id(t.parameter) for t in tensors} == {name: id(p) for name, p in truth.items()}
    assert [t.name for t in tensors] == list(truth)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    assert [t.names for t in tensors] == list(aliases.values())
    modules = dict(model.named_modules(remove_duplicate=False))
    assert all(type(modules[t.module]).__name__ == t.module_type for t in tensors)


def _assign(model: Body) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def _convert(model: Body) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def _tie(model: Body) -> None:
    model.head = nn.Linear(4, 5, bias=False)
    model.head.weight = model.embed.weight


def _swap(model: Body) -> None:
    """As many as before, and in the same order: only the objects tell."""
    table = model.layers[0]._parameters
    table["weight"], table["bias"] = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))


def _rename(model: Body) -> None:
    """The same parameter at the same place in the order under another name, as old hooks do it."""
    weight = model.head._parameters.pop("weight")
    model.head.register_parameter("weight_orig", weight)


def _drop(model: Body) -> None:
    del model.layers[0]


def _drop_and_add(model: Body) -> None:
    del model.layers[0].bias
    model.layers[0].scale = nn.Parameter(torch.ones(4))


def _equal_scalar(model: Body) -> None:
    model.register_parameter("gate", nn.Parameter(torch.tensor(1.0)))


CHANGES: dict[str, Callable[[Body], object]] = {
    "a module by attribute": lambda m: setattr(m, "extra", nn.Linear(4, 2)),
    "a module by add_module": lambda m: m.add_module("extra", nn.Sequential(nn.Linear(4, 2))),
    "a module in a ModuleList": lambda m: m.layers.append(nn.Linear(4, 4)),
    "a module inserted before": lambda m: m.layers.insert(0, nn.Linear(4, 4)),
    "a module in the dictionary": lambda m: m._modules.update(extra=nn.Linear(4, 2)),
    "a module exchanged in the dictionary": lambda m: m._modules.update(head=nn.Linear(4, 9)),
    "a parameter": _equal_scalar,
    "a bias where none was": lambda m: setattr(m.head, "bias", nn.Parameter(torch.ones(5))),
    "a parameter exchanged": lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight.detach())),
    "a parameter taken away": lambda m: setattr(m.layers[0], "bias", None),
    "a module taken away": _drop,
    "one goes, one comes": _drop_and_add,
    "load_state_dict(assign=True)": _assign,
    "a conversion that replaces": _convert,
    "values of the dictionary swapped": _swap,
    "renamed at the same place": _rename,
    "tied": _tie,
    "tied by assignment": lambda m: setattr(m.head, "weight", m.embed.weight),
    "parametrized": lambda m: parametrizations.orthogonal(m.layers[0]),
    "spectral norm": lambda m: parametrizations.spectral_norm(m.head),
    "weight norm": lambda m: parametrizations.weight_norm(m.head),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_once_and_followed(change: str) -> None:
    model = Body()
    tensors = Tensors([model])
    assert [t.name for t in tensors] == BEFORE
    assert not tensors.refresh()
    roles = {t.name: t.role for t in tensors}
    CHANGES[change](model)
    assert tensors.refresh()
    assert_follows(tensors, model)
    assert not tensors.refresh()
    assert {t.name: t.role for t in tensors if t.name in roles} == {
        t.name: roles[t.name] for t in tensors if t.name in roles
    }
    assert [t.role for t in tensors].count("output") == (change not in ("tied", "tied by assignment"))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_the_old_ways_to_normalise_a_weight() -> None:
    model = Body()
    tensors = Tensors([model])
    old_spectral_norm(model.head)
    assert tensors.refresh()
    old_weight_norm(model.layers[0])
    assert tensors.refresh()
    assert_follows(tensors, model)
    assert [t.name for t in tensors] == [
        "embed.weight", "layers.0.bias", "layers.0.weight_g", "layers.0.weight_v", "head.weight_orig",
    ]  # fmt: skip
    model.head(torch.ones(1, 4))  # computes a new `weight`, which is no parameter
    assert not tensors.refresh()


def test_a_parametrization_made_and_removed() -> None:
    """Sources are watched under torch's own names; removed, the weight is itself again."""
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 4)), parametrizations.spectral_norm(nn.Linear(4, 2))
    )
    tensors = Tensors([model])
    assert [(t.name, t.role) for t in tensors] == [
        ("0.bias", "bias"),
        ("0.parametrizations.weight.original0", "matrix"),
        ("0.parametrizations.weight.original1", "matrix"),
        ("1.bias", "bias"),
        ("1.parametrizations.weight.original", "output"),
    ]
    model[1](torch.ones(1, 4))  # a power iteration changes buffers: nothing to notice
    assert not tensors.refresh()
    parametrize.remove_parametrizations(model[1], "weight")
    assert tensors.refresh()
    assert_follows(tensors, model)
    assert {t.name: t.role for t in tensors}["1.weight"] == "output"


def test_what_is_no_change_is_none() -> None:
    """Training, moving data, freezing, buffers and plain attributes."""
    model = Body()
    tensors = Tensors([model])
    kept = list(tensors)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.head(model.layers[0](model.embed(torch.tensor([1])))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.to(torch.bfloat16)
    model.load_state_dict(model.state_dict())
    model.requires_grad_(False)
    model.eval()
    model.register_buffer("seen", torch.zeros(3))
    model.__dict__["note"] = "anything"
    assert not tensors.refresh()
    assert list(tensors) == kept
    assert_follows(tensors, model)


def test_lazy_parameters_are_noticed_when_they_get_their_values() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
    tensors = Tensors([model])
    roles = [t.role for t in tensors]
    assert roles == ["conv", "bias", "norm_gain", "norm_bias", "output", "bias"]
    assert not tensors.refresh()
    model(torch.randn(2, 3, 5, 5))
    assert tensors.refresh()
    assert_follows(tensors, model)
    assert [t.role for t in tensors] == roles
    assert [t.entry()["shape"] for t in tensors] == [[4, 3, 3, 3], [4], [4], [4], [2, 36], [2]]
    assert [t.module_type for t in tensors] == ["Conv2d"] * 2 + ["BatchNorm2d"] * 2 + ["Linear"] * 2
    assert not tensors.refresh()


def test_one_lazy_layer_after_the_other() -> None:
    model = nn.ModuleList([nn.LazyLinear(2), nn.LazyLinear(2)])
    tensors = Tensors([model])
    for layer in model:
        layer(torch.ones(1, 3))
        assert tensors.refresh()
        assert not tensors.refresh()


def test_a_name_keeps_its_object_and_a_tie_moves_names() -> None:
    """What others keep about a tensor by its name or object stays true."""
    model = Body()
    tensors = Tensors([model])
    kept = {t.name: t for t in tensors}
    old = model.embed.weight
    model.embed.weight = nn.Parameter(torch.zeros(5, 4))
    assert tensors.refresh()
    assert kept["embed.weight"] is tensors[0]
    assert tensors[0].parameter is model.embed.weight is not old
    model.head.weight = model.embed.weight  # tie
    assert tensors.refresh()
    assert tensors[0].names == ["embed.weight", "head.weight"]
    assert len(tensors) == 3
    model.embed.weight = nn.Parameter(torch.ones(5, 4))  # untie, the other way round
    assert tensors.refresh()
    assert_follows(tensors, model)
    assert tensors[0] is kept["embed.weight"]
    assert [t.role for t in tensors] == ["embedding", "matrix", "bias", "output"]


def test_the_last_matrix_stays_the_output_when_more_come() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tensors = Tensors([model])
    model.append(nn.Linear(2, 2))
    assert tensors.refresh()
    assert [t.role for t in tensors if t.name.endswith("weight")] == ["matrix", "output", "matrix"]
    del model[1]  # the output goes, and its name now is that of another
    model.append(nn.Linear(2, 7))
    assert tensors.refresh()
    assert_follows(tensors, model)
    assert [t.role for t in tensors].count("output") == 1


def test_include_and_exclude_hold_for_what_comes_later() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    tensors = Tensors([model], include=["weight", "gate"], exclude=r"^1\.")
    assert [t.name for t in tensors] == ["0.weight"]
    model.append(nn.Linear(2, 2))
    model.append(nn.Linear(2, 2))
    model.gate = nn.Parameter(torch.ones(()))
    assert tensors.refresh()
    assert [t.name for t in tensors] == ["gate", "0.weight", "2.weight"]
    assert tensors[:1] == [tensors[0]]
    assert tensors[-1].name == "2.weight"
    model[0], model[2] = nn.Identity(), nn.Identity()
    del model.gate
    assert tensors.refresh()
    assert list(tensors) == []  # no error in the middle of a training


def test_several_models_keep_their_prefixes() -> None:
    generator, critic = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 1))
    tensors = Tensors([generator, critic])
    critic.append(nn.Linear(1, 1))
    assert tensors.refresh()
    assert [t.name for t in tensors if "weight" in t.name] == [
        "Sequential0.0.weight",
        "Sequential1.0.weight",
        "Sequential1.1.weight",
    ]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_scripted_parts_are_listed_and_take_no_harm() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.Linear(2, 2))
    tensors = Tensors([model])
    assert not tensors.refresh()
    model.append(nn.Linear(2, 2))
    assert tensors.refresh()
    assert len(tensors) == 6


def test_looking_costs_next_to_nothing() -> None:
    """Measured: about 80 ns for each tensor of this model. The limit leaves room for a busy machine."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(200)])
    tensors = Tensors([model])
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        tensors.refresh()
        best = min(best, time.perf_counter() - start)
    assert best / len(tensors) < 400e-9


# In a training ----------------------------------------------------------------------------------------------


def _grown(
    path: Path, change: Callable[[nn.Module, torch.optim.Optimizer], object], *, every: int = 1
) -> Watching:
    """Trains for six steps; the change happens after the third."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    weights: list[Weights] = []
    gradients: list[Weights] = []

    def after_step(step: int) -> None:
        weights.append(weights_of(model))
        if step == 2:
            change(model, optimizer)

    watcher = watch(model, optimizer, run=path, every=every)
    train(
        model,
        optimizer,
        6,
        after_step=after_step,
        after_backward=lambda _: gradients.append(gradients_of(model)),
    )
    watcher.close()
    assert failures(watcher) == ""
    return Run(path), weights, gradients


def assert_true_rows(watching: Watching, tensor: str, steps: Sequence[int]) -> None:
    """Weight, gradient and update of these steps, and of no others, against copies made by plain torch."""
    run, weights, gradients = watching
    assert sorted(column(run, "weight", "norm", tensor)) == list(steps)
    assert sorted(column(run, "gradient", "norm", tensor)) == list(steps)
    for step in steps:
        now = weights[step][tensor]
        assert column(run, "weight", "norm", tensor)[step] == pytest.approx(norm(now), rel=1e-9)
        assert column(run, "gradient", "norm", tensor)[step] == pytest.approx(
            norm(gradients[step][tensor]), rel=1e-9
        )
        before = weights[step - 1].get(tensor) if step else None
        if before is not None and before.shape == now.shape:
            true = norm(now.double() - before.double())
            assert column(run, "update", "norm", tensor)[step] == pytest.approx(true, rel=1e-6, abs=1e-12)


def _add(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    assert isinstance(model, nn.Sequential)
    model.append(nn.Linear(3, 2))
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.5})


def test_a_module_added_to_model_and_optimizer_is_in_the_next_capture(tmp_path: Path) -> None:
    watching = _grown(tmp_path / "run", _add)
    for tensor in ("2.weight", "2.bias"):
        assert_true_rows(watching, tensor, [3, 4, 5])
        assert set(column(watching[0], "weight", "state", tensor).values()) == {"trainable"}
        assert sorted(column(watching[0], "update", "norm", tensor)) == [3, 4, 5]
    for tensor in ("0.weight", "1.bias"):
        assert_true_rows(watching, tensor, range(6))
    table = watching[0].tensors().set_index("tensor")
    shapes = {"0.weight": [4, 8], "0.bias": [4], "1.weight": [3, 4], "1.bias": [3]}
    assert table["shape"].to_dict() == shapes | {"2.weight": [2, 3], "2.bias": [2]}
    assert table.loc["1.weight", "role"] == "output"


def _assign_all(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """New parameters under the old names, as after loading a checkpoint by assignment."""
    model.load_state_dict({k: v.clone() * 2 for k, v in model.state_dict().items()}, assign=True)
    optimizer.param_groups[0]["params"] = list(model.parameters())


def test_parameters_that_are_replaced_are_followed(tmp_path: Path) -> None:
    watching = _grown(tmp_path / "run", _assign_all)
    run, weights, gradients = watching
    for tensor in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert sorted(column(run, "weight", "norm", tensor)) == list(range(6))
        for step in range(6):
            assert column(run, "weight", "norm", tensor)[step] == pytest.approx(
                norm(weights[step][tensor]), rel=1e-9
            )
            assert column(run, "gradient", "norm", tensor)[step] == pytest.approx(
                norm(gradients[step][tensor]), rel=1e-9
            )
        true = norm(weights[3][tensor].double() - 2 * weights[2][tensor].double())
        assert column(run, "update", "norm", tensor)[3] == pytest.approx(true, rel=1e-6)


def test_a_part_that_is_taken_away_has_no_more_rows(tmp_path: Path) -> None:
    def drop(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        assert isinstance(model, nn.Sequential)
        optimizer.param_groups[0]["params"] = list(model[0].parameters())
        del model[1]

    watching = _grown(tmp_path / "run", drop)
    assert_true_rows(watching, "1.weight", [0, 1, 2])
    assert_true_rows(watching, "0.weight", range(6))


def test_the_next_capture_may_be_later(tmp_path: Path) -> None:
    watching = _grown(tmp_path / "run", _add, every=2)
    assert sorted(column(watching[0], "gradient", "norm", "2.weight")) == [4]
    assert sorted(column(watching[0], "weight", "norm", "2.weight")) == [4, 5]
