"""Wrong arguments: one clear line, before anything is written. And every kind of number that `log` takes."""

from __future__ import annotations

import fractions
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from trainings import batch, loss_of, mlp, train

from layerwatch import Run, RunError, watch
from layerwatch.monitor import RunExistsError


def frozen() -> nn.Module:
    return mlp().requires_grad_(False)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


def trying(*models: Any, **arguments: Any) -> Callable[[Path], Any]:
    """Calls `watch` with these arguments and a run folder."""
    given: Any = models or (mlp(),)
    return lambda path: watch(*given, **{"run": path, **arguments})


SCHEDULER = torch.optim.lr_scheduler.StepLR(sgd(mlp()), 1)

#: name -> (call, type of the error, what its one line says)
BAD: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no trainable parameter": (
        trying(frozen()),
        ValueError,
        "at least one trainable parameter, got Sequential",
    ),
    "no parameter at all": (trying(nn.ReLU()), ValueError, "at least one trainable parameter, got ReLU"),
    "no model": (trying([]), ValueError, "at least one model"),
    "a function": (trying(mlp().forward), TypeError, "expected a torch.nn.Module"),
    "a state_dict": (trying(mlp().state_dict()), TypeError, "expected a torch.nn.Module"),
    "none": (trying(None), TypeError, "expected a torch.nn.Module.*got NoneType"),
    "another's optimizer": (
        trying(mlp(), sgd(mlp(1))),
        ValueError,
        "this SGD owns none of those of Sequential",
    ),
    "a scheduler": (trying(mlp(), SCHEDULER), TypeError, "expected a torch.optim.Optimizer.*got StepLR"),
    "the class": (trying(mlp(), torch.optim.SGD), TypeError, "expected a torch.optim.Optimizer"),
    "every 0": (trying(every=0), ValueError, "whole number of steps from 1, got every=0"),
    "every True": (trying(every=True), ValueError, "got every=True"),
    "every as text": (trying(every="10"), ValueError, "got every='10'"),
    "budget 0": (trying(budget=0), ValueError, "budget between 0 and 1"),
    "budget 1": (trying(budget=1), ValueError, "budget between 0 and 1"),
    "budget nan": (trying(budget=math.nan), ValueError, "got budget=nan"),
    "include that matches nothing": (
        trying(include="lstm"),
        ValueError,
        "leave no tensor.*names are like 0.weight",
    ),
    "exclude that matches all": (trying(exclude="."), ValueError, "leave no tensor"),
    "no pattern": (trying(include="("), ValueError, "regular expression"),
    "missing reference": (trying(reference="gone.pt"), ValueError, "got 'gone.pt': no such file"),
    "a file of another kind": (trying(reference=__file__), ValueError, r"\.safetensors, \.pt or \.bin"),
    "a reference that is a model": (trying(reference=mlp()), TypeError, "got Sequential"),
    "an empty reference": (trying(reference={}), ValueError, "maps names to tensors, got none"),
    "keep": (trying(keep="some"), ValueError, 'expected keep="full"'),
    "drift_limit": (trying(drift_limit=-1.0), ValueError, "drift_limit above 0"),
    "a drift_limit of nothing": (trying(drift_limit={}), ValueError, "got an empty mapping"),
    "a drift_limit of words": (trying(drift_limit="small"), ValueError, "drift_limit above 0.*got 'small'"),
    "a budget below 0": (trying(drift_limit={"0": -0.1}), ValueError, "drift_limit of 0 above 0.*got -0.1"),
    "a budget that is none": (trying(drift_limit={"0": None}), ValueError, "drift_limit of 0.*got None"),
    "a budget of no tensor": (trying(drift_limit={"layers.0-5": 0.1}), ValueError, "'layers.0-5' is in none"),
    "a range from high to low": (trying(drift_limit={"2-0": 0.1}), ValueError, "'2-0' is in none"),
    "a budget without a name": (
        trying(drift_limit={3: 0.1}),
        ValueError,
        "3 is in none: names are like 0.weight",
    ),
    "a store of no known kind": (trying(run="ftps://bucket/run"), RunError, "ftps"),
    "config": (trying(config="lr=0.1"), TypeError, "config as a mapping, got str"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_argument_is_one_clear_line_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind) as caught:
        call(tmp_path / "run")
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"rubbish", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_a_damaged_checkpoint(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"reference{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        watch(mlp(), run=tmp_path / "run", reference=path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_holds_code(tmp_path: Path) -> None:
    torch.save(mlp(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"save model\.state_dict\(\)"):
        watch(mlp(), run=tmp_path / "run", reference=tmp_path / "model.pt")


def test_a_run_that_exists_and_a_path_that_is_a_file(tmp_path: Path) -> None:
    watch(mlp(), run=tmp_path / "run").close()
    with pytest.raises(RunExistsError, match="resume=True"):
        watch(mlp(), run=tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file"):
        watch(mlp(), run=tmp_path / "file")
    with pytest.raises(RunError, match="found none"):
        watch(mlp(), run=tmp_path / "new", resume=True)


def test_a_failed_start_leaves_torch_as_it_was(tmp_path: Path) -> None:
    from torch.nn.utils import clip_grad

    grouping = clip_grad._group_tensors_by_device_and_dtype  # type: ignore[attr-defined]
    model = mlp()
    watch(model, run=tmp_path / "run").close()
    with pytest.raises(RunExistsError):
        watch(model, sgd(model), run=tmp_path / "run")
    assert clip_grad._group_tensors_by_device_and_dtype is grouping  # type: ignore[attr-defined]
    assert not any(m._forward_hooks for m in model.modules())


def test_a_resumed_training_goes_on_after_its_last_step(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    with watch(model, optimizer, run=tmp_path / "run", every=2):
        train(model, optimizer, 4)
    with watch(model, optimizer, run=tmp_path / "run", every=2, resume=True) as watcher:
        assert watcher.step == 4
        train(model, optimizer, 3)
        assert watcher.step == 6
    run = Run(tmp_path / "run")
    assert run.stats("weight", "0.weight")["step"].tolist() == [0, 2, 3, 4, 6]
    assert run.events()["event"].tolist() == ["start", "close", "restart", "close"]
    assert run.events().set_index("event").loc["restart", "step"] == 4
    assert run.stats("initial_weight", "0.weight")["step"].tolist() == [0]
    assert run.info["closed"]


def test_a_loop_that_trains_nothing_is_said_to_be_one(tmp_path: Path) -> None:
    model = mlp()
    config: Any = {("any", "key"): 1}
    with watch(model, run=tmp_path / "run", every=1, config=config) as watcher:
        loss_of(model(batch(0))).backward()
        watcher.log(train_loss=1.0)
    run = Run(tmp_path / "run")
    assert run.scalars("train_loss")["value"].tolist() == [1.0]
    assert run.info["notes"] == [
        "no torch optimizer stepped while watched, and no weight changed between backward passes"
    ]


def test_a_run_without_a_name_goes_below_runs(tmp_path: Path) -> None:
    first, second = watch(mlp()), watch(mlp())
    first.close()
    second.close()
    assert first.run != second.run
    assert {Path(first.run).parent, Path(second.run).parent} == {Path("runs")}
    assert Run(first.run).info["name"] == Path(first.run).name


def test_run_json_says_what_is_needed_to_repeat_the_training(tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = nn.Linear(8, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    with watch(
        model,
        optimizer,
        run=tmp_path / "run",
        every=3,
        config={"lr": 1e-3, "path": Path("x")},
        drift_limit=0.5,
    ):
        train(model, optimizer, 1)
    info = Run(tmp_path / "run").info
    assert (info["seed"], info["every"], info["budget"], info["reference"]) == (7, 3, None, "start")
    assert (info["config"]["lr"], info["drift_limit"]) == (1e-3, 0.5)
    with watch(model, optimizer, run=tmp_path / "budgets", drift_limit={"weight": 0.5}):
        train(model, optimizer, 1)
    assert Run(tmp_path / "budgets").info["drift_limit"] == {"weight": 0.5}
    assert info["optimizers"][0]["class"] == "AdamW"
    assert info["optimizers"][0]["groups"][0]["weight_decay"] == 0.1
    assert info["versions"]["torch"] == torch.__version__
    assert {"host", "pid", "created", "ended", "git_commit", "schema_version"} <= set(info)


# log() ------------------------------------------------------------------------------------------------------

NUMBERS: dict[str, tuple[Any, float]] = {
    "int": (3, 3.0),
    "bool": (True, 1.0),
    "float": (0.25, 0.25),
    "nan": (math.nan, math.nan),
    "inf": (-math.inf, -math.inf),
    "fraction": (fractions.Fraction(1, 4), 0.25),
    "tensor": (torch.tensor(1.5), 1.5),
    "tensor with gradient": (torch.ones(2, requires_grad=True).sum(), 2.0),
    "tensor of one element": (torch.tensor([[1.5]]), 1.5),
    "integer tensor": (torch.tensor(4), 4.0),
    "bool tensor": (torch.tensor(True), 1.0),
    "bfloat16 tensor": (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
    "numpy float32": (np.float32(0.5), 0.5),
    "numpy int": (np.int64(2), 2.0),
    "numpy bool": (np.bool_(True), 1.0),
    "numpy 0-d": (np.array(0.5), 0.5),
    "numpy 1-d": (np.array([0.5]), 0.5),
}
NO_NUMBERS: dict[str, Any] = {
    "text": "0.5",
    "none": None,
    "list": [1.0],
    "dict": {"a": 1},
    "vector": torch.ones(3),
    "empty tensor": torch.empty(0),
    "complex": 1j,
    "complex tensor": torch.tensor(1j),
    "numpy vector": np.ones(3),
    "numpy complex": np.complex64(1j),
    "numpy text": np.array("a"),
    "model": mlp(),
    "huge int": 10**400,
}


def test_log_takes_every_kind_of_number(tmp_path: Path) -> None:
    with watch(mlp(), run=tmp_path / "run") as watcher:
        for value, _ in NUMBERS.values():
            watcher.log(x=value)
    found = Run(tmp_path / "run").scalars("x")
    assert np.array_equal(found["value"], [wanted for _, wanted in NUMBERS.values()], equal_nan=True)
    assert (found["step"] == 0).all()
    assert found["time"].is_monotonic_increasing


@pytest.mark.parametrize("case", NO_NUMBERS)
def test_log_refuses_what_is_no_number_and_says_its_name(tmp_path: Path, case: str) -> None:
    with watch(mlp(), run=tmp_path / "run") as watcher:
        with pytest.raises(TypeError, match="expected a number for 'loss'") as caught:
            watcher.log(good=1.0, loss=NO_NUMBERS[case])
        assert "\n" not in str(caught.value)
    assert Run(tmp_path / "run").scalar_names() == []  # all or nothing


def test_log_keeps_no_graph_alive(tmp_path: Path) -> None:
    import weakref

    model = mlp()
    with watch(model, run=tmp_path / "run") as watcher:
        loss = loss_of(model(batch(0)))
        graph = weakref.ref(loss)
        watcher.log(train_loss=loss)
        del loss
        assert graph() is None


def test_several_values_of_a_step_are_all_kept(tmp_path: Path) -> None:
    with watch(mlp(), run=tmp_path / "run") as watcher:
        watcher.log(train_loss=1.0, val_loss=2.0)
        watcher.log(train_loss=3.0)
        watcher.log()
    run = Run(tmp_path / "run")
    assert run.scalars("train_loss")["value"].tolist() == [1.0, 3.0]
    assert run.scalar_names() == ["train_loss", "val_loss"]
