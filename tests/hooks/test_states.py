"""The states of a parameter, its names and its role."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from trainings import batch, column, failures, loss_of, mlp, train, watched_training, weights_of

from layerwatch import Run, watch


class SixStates(nn.Module):
    """One linear layer for each state."""

    def __init__(self) -> None:
        super().__init__()
        self.trainable = nn.Linear(8, 4)
        self.frozen = nn.Linear(8, 4).requires_grad_(False)
        self.unused = nn.Linear(8, 4)
        self.no_optimizer = nn.Linear(8, 4)
        self.lr_zero = nn.Linear(8, 4)
        self.zero_gradient = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        used = self.trainable(x) + self.frozen(x) + self.no_optimizer(x) + self.lr_zero(x)
        return used + 0.0 * self.zero_gradient(x)


def six(path: Path) -> tuple[SixStates, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = SixStates()
    known = [
        p
        for n in ("trainable", "frozen", "unused", "zero_gradient")
        for p in model.get_submodule(n).parameters()
    ]
    groups = [{"params": known}, {"params": list(model.lr_zero.parameters()), "lr": 0.0}]
    return model, torch.optim.SGD(groups, 0.1)


def test_each_state_is_recorded_as_what_it_is(tmp_path: Path) -> None:
    model, optimizer = six(tmp_path)
    run = watched_training(tmp_path / "run", model, optimizer, 3)
    for name in ("trainable", "frozen", "unused", "no_optimizer", "lr_zero", "zero_gradient"):
        for leaf in ("weight", "bias"):
            tensor = f"{name}.{leaf}"
            assert set(column(run, "weight", "state", tensor).values()) == {name}
            assert len(column(run, "weight", "state", tensor)) == 3
    assert run.tensors().set_index("tensor")["state"].to_dict() == {
        f"{n}.{leaf}": n for n in vars(model)["_modules"] for leaf in ("weight", "bias")
    }
    gradients = set(run.stats("gradient")["tensor"].str.partition(".")[0])
    assert gradients == {"trainable", "no_optimizer", "lr_zero", "zero_gradient"}
    updates = run.stats("update").groupby("tensor")["norm"].max()
    assert updates["lr_zero.weight"] == updates["zero_gradient.weight"] == 0.0
    assert updates["trainable.weight"] > 0.0


def test_the_last_row_does_not_forget_the_state(tmp_path: Path) -> None:
    """The weights written by close are of a step that was not captured: gradients may be cleared by then."""
    model, optimizer = six(tmp_path)
    watcher = watch(model, optimizer, run=tmp_path / "run", every=2)
    train(model, optimizer, 4)
    optimizer.zero_grad()
    watcher.close()
    run = Run(tmp_path / "run")
    assert run.last_step == 3
    for name in ("trainable", "frozen", "unused", "no_optimizer", "lr_zero", "zero_gradient"):
        assert column(run, "weight", "state", f"{name}.weight") == {0: name, 2: name, 3: name}


def test_a_layer_that_is_unfrozen_later(tmp_path: Path) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)

    def unfreeze(step: int) -> None:
        if step == 1:
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})

    run = watched_training(tmp_path / "run", model, optimizer, 5, after_step=unfreeze)
    assert column(run, "weight", "state", "0.weight") == {
        s: "frozen" if s < 2 else "trainable" for s in range(5)
    }
    assert sorted(column(run, "update", "norm", "0.weight")) == [2, 3, 4]
    assert run.tensors().set_index("tensor").loc["0.weight", "state"] == "trainable"
    assert column(run, "update", "ratio", "0.weight")[3] > 0


def stages(depth: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(depth)])


def test_gradual_unfreezing_is_followed(tmp_path: Path) -> None:
    """One more layer every second step, from the last to the first, in a group of its own; then all again."""
    model = stages()
    model.requires_grad_(False)
    optimizer = torch.optim.SGD(model[3].requires_grad_(True).parameters(), 0.1, momentum=0.9)
    moved: dict[int, set[str]] = {}
    before = weights_of(model)

    def after_step(step: int) -> None:
        nonlocal before
        now = weights_of(model)
        moved[step] = {name for name in now if not torch.equal(now[name], before[name])}
        before = now
        if step % 2 == 1 and step < 6:
            layer = model[2 - step // 2].requires_grad_(True)
            optimizer.add_param_group({"params": list(layer.parameters()), "lr": 0.1 / step})
        if step == 7:
            optimizer.zero_grad()
            model[3].requires_grad_(False)

    run = watched_training(tmp_path / "run", model, optimizer, 10, after_step=after_step)
    states = {i: column(run, "weight", "state", f"{i}.weight") for i in range(4)}
    assert [step for step in range(10) if states[0][step] == "trainable"] == [6, 7, 8, 9]
    assert [step for step in range(10) if states[1][step] == "trainable"] == [4, 5, 6, 7, 8, 9]
    assert [step for step in range(10) if states[2][step] == "trainable"] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert [step for step in range(10) if states[3][step] == "trainable"] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert {state for of_one in states.values() for state in of_one.values()} == {"trainable", "frozen"}
    updates = run.stats("update")
    for step in range(10):
        assert set(updates.loc[updates["step"] == step, "tensor"]) == moved[step]
    table = run.tensors().set_index("tensor")["state"]
    assert table.to_dict() == {
        f"{i}.{leaf}": "frozen" if i == 3 else "trainable" for i in range(4) for leaf in ("weight", "bias")
    }


def test_an_optimizer_for_each_stage(tmp_path: Path) -> None:
    """A new optimizer takes over, as in fine-tuning by stages: found when it steps.

    Its first step falls into the last of the old one, as that of a GAN's second optimizer would.
    """
    model = stages(2)
    with watch(model, run=tmp_path / "run", every=1) as watching:
        train(model, torch.optim.SGD(model[1].parameters(), 0.1), 3)
        train(model, torch.optim.Adam(model.parameters(), 1e-3), 3)
    assert failures(watching) == ""
    run = Run(tmp_path / "run")
    assert run.last_step == 4
    states = column(run, "weight", "state", "0.weight")
    assert [states[step] for step in (0, 1, 3, 4)] == ["no_optimizer"] * 2 + ["trainable"] * 2
    assert set(column(run, "weight", "state", "1.weight").values()) == {"trainable"}


def test_a_layer_that_is_used_at_times(tmp_path: Path) -> None:
    """As with stochastic depth, where gradients are cleared to None."""
    model = SixStates()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        for step in range(6):
            optimizer.zero_grad()
            used = model.unused(batch(step)) if step % 3 == 1 else 0.0
            loss_of(model(batch(step)) + used).backward()
            optimizer.step()
    run = Run(tmp_path / "run")
    expected = ["unused", "trainable", "unused"] * 2
    assert list(column(run, "weight", "state", "unused.weight").values()) == expected
    assert sorted(column(run, "gradient", "norm", "unused.weight")) == [1, 4]
    assert [v > 0 for v in column(run, "update", "norm", "unused.weight").values()] == [
        s == "trainable" for s in expected
    ]


def test_a_learning_rate_that_comes_from_zero_and_goes_there(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    rates = [0.0, 0.1, 0.1, 0.0]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[min(step, 3)])
    run = watched_training(tmp_path / "run", model, optimizer, 4, after_step=lambda _: schedule.step())
    states = column(run, "weight", "state", "0.weight")
    assert list(states.values()) == ["lr_zero", "trainable", "trainable", "lr_zero"]
    assert [v > 0 for v in column(run, "update", "norm", "0.weight").values()] == [False, True, True, False]


def test_a_rate_that_is_a_tensor(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), torch.tensor(0.0))

    def warm(step: int) -> None:
        optimizer.param_groups[0]["lr"].fill_(0.01 * step)

    run = watched_training(tmp_path / "run", model, optimizer, 3, after_step=warm)
    assert list(column(run, "weight", "state", "0.weight").values()) == ["lr_zero", "lr_zero", "trainable"]


def test_a_gradient_that_is_zero_for_a_while(tmp_path: Path) -> None:
    model = SixStates()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model(batch(step)) + step % 2 * model.zero_gradient(batch(step))).backward()
            optimizer.step()
    states = column(Run(tmp_path / "run"), "weight", "state", "zero_gradient.weight")
    assert list(states.values()) == ["zero_gradient", "trainable"] * 2


def test_a_group_that_is_taken_out_of_the_optimizer(tmp_path: Path) -> None:
    model = stages(3)
    optimizer = torch.optim.SGD([{"params": list(layer.parameters())} for layer in model], 0.1)

    def change(step: int) -> None:
        if step == 1:
            del optimizer.param_groups[0]

    run = watched_training(tmp_path / "run", model, optimizer, 4, after_step=change)
    states = column(run, "weight", "state", "0.weight")
    assert list(states.values()) == ["trainable", "trainable", "no_optimizer", "no_optimizer"]
    assert list(column(run, "weight", "state", "1.weight").values()) == ["trainable"] * 4


def test_zeroed_instead_of_cleared_gradients(tmp_path: Path) -> None:
    """zero_grad(set_to_none=False): a layer out of use has a zero gradient, and momentum still moves it."""
    model = SixStates()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        for step in range(4):
            output = model(batch(step)) + (model.unused(batch(step)) if step == 0 else 0.0)
            loss_of(output).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    run = Run(tmp_path / "run")
    assert column(run, "weight", "state", "unused.weight") == {
        0: "trainable",
        1: "zero_gradient",
        2: "zero_gradient",
        3: "zero_gradient",
    }
    assert all(v > 0 for v in column(run, "update", "norm", "unused.weight").values())
    assert column(run, "update", "lost", "unused.weight")[2] == 0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x)))


def test_tied_weights_are_one_tensor_with_several_names(tmp_path: Path) -> None:
    model = Tied()
    run = watched_training(
        tmp_path / "run", model, torch.optim.Adam(model.parameters()),
        data=lambda s: torch.randint(0, 10, (4, 5), generator=torch.Generator().manual_seed(s)),
    )  # fmt: skip
    tensors = run.tensors().set_index("tensor")
    assert tensors["names"].to_dict() == {
        "embed.weight": ["embed.weight", "head.weight"],
        "body.weight": ["body.weight"],
        "body.bias": ["body.bias"],
    }
    assert tensors["role"].to_dict() == {
        "embed.weight": "embedding",
        "body.weight": "output",
        "body.bias": "bias",
    }
    assert not run.stats("weight").duplicated(["step", "tensor"]).any()


class Roles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(8, 2)
        self.layer_norm = nn.LayerNorm(8)
        self.rnn = nn.LSTM(8, 8)
        self.embedding = nn.Embedding(5, 8)
        self.lora_A = nn.Linear(8, 2, bias=False)
        self.lora_B = nn.Linear(2, 8, bias=False)
        self.gate = nn.Parameter(torch.tensor(1.0))
        self.position = nn.Parameter(torch.zeros(8))
        self.lazy = nn.LazyConv2d(4, 3)
        self.head = nn.Linear(8, 3)


def test_roles_modules_and_shapes(tmp_path: Path) -> None:
    model = Roles()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lazy" not in n], 0.1)
    watch(model, optimizer, run=tmp_path / "run").close()
    tensors = Run(tmp_path / "run").tensors().set_index("tensor")
    assert tensors["role"].to_dict() == {
        "gate": "scalar",
        "position": "other",
        "conv.weight": "conv",
        "conv.bias": "bias",
        "norm.weight": "norm_gain",
        "norm.bias": "norm_bias",
        "attention.in_proj_weight": "matrix",
        "attention.in_proj_bias": "bias",
        "attention.out_proj.weight": "matrix",
        "attention.out_proj.bias": "bias",
        "layer_norm.weight": "norm_gain",
        "layer_norm.bias": "norm_bias",
        "rnn.weight_ih_l0": "matrix",
        "rnn.weight_hh_l0": "matrix",
        "rnn.bias_ih_l0": "bias",
        "rnn.bias_hh_l0": "bias",
        "embedding.weight": "embedding",
        "lora_A.weight": "lora_a",
        "lora_B.weight": "lora_b",
        "lazy.weight": "conv",
        "lazy.bias": "bias",
        "head.weight": "output",
        "head.bias": "bias",
    }
    assert tensors.loc["conv.weight", "shape"] == [4, 3, 3, 3]
    assert tensors.loc["conv.weight", "elements"] == 108
    assert tensors.loc["attention.out_proj.weight", "module"] == "attention.out_proj"
    assert tensors.loc["rnn.weight_ih_l0", "module_type"] == "LSTM"
    assert tensors.loc["gate", "module"] == ""
    assert tensors.loc["gate", "module_type"] == "Roles"
    assert tensors["dtype"].unique().tolist() == ["float32"]


def test_names_lose_what_wrappers_add(tmp_path: Path) -> None:
    model = nn.DataParallel(nn.Sequential(nn.Linear(8, 2)))
    compiled = torch.compile(model, backend="eager")
    run = watched_training(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1))
    assert run.tensors()["tensor"].tolist() == ["0.weight", "0.bias"]
    assert run.modules()["module"].tolist() == ["0"]
    with watch(compiled, run=tmp_path / "compiled"):  # type: ignore[arg-type]
        pass
    assert Run(tmp_path / "compiled").tensors()["tensor"].tolist() == ["0.weight", "0.bias"]


def test_names_that_would_fall_together_stay_apart(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(8, 8)
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x) * self.weight

    model = Scaled()
    run = watched_training(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1))
    names = run.tensors()["tensor"].tolist()
    assert len(set(names)) == 3
    assert not run.stats("weight").duplicated(["step", "tensor"]).any()


def test_include_and_exclude(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    one = watched_training(tmp_path / "one", model, optimizer, watching={"include": r"^1\."})
    assert one.tensors()["tensor"].tolist() == ["1.weight", "1.bias"]
    some = watched_training(
        tmp_path / "some", model, optimizer, watching={"include": ["^1", "^2"], "exclude": "bias$"}
    )
    assert some.stats("weight")["tensor"].unique().tolist() == ["1.weight", "2.weight"]
