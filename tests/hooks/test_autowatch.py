"""Models and optimizers are found without a line in the program, and logged as `watch` logs them."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils.clip_grad import clip_grad_norm_
from torch.optim.optimizer import register_optimizer_step_pre_hook
from trainings import batch, loss_of, mlp, train

from layerwatch import Run, watch
from layerwatch.hooks import autowatch
from layerwatch.hooks.autowatch import AutoWatch

STEPS = 5


@dataclass
class Watched:
    """What the command line would have."""

    auto: AutoWatch
    words: list[str] = field(default_factory=list)


@contextmanager
def zero_code(path: Path, **options: Any) -> Iterator[Watched]:
    words: list[str] = []
    auto = AutoWatch({"run": path, "every": 1, **options}, words.append)
    auto.start()
    try:
        yield Watched(auto, words)
    finally:
        auto.finish()


# Equal to watch ---------------------------------------------------------------------------------------------

Loop = Callable[[Callable[[nn.Module], object]], list[Tensor]]


def plain(attach: Callable[[nn.Module], object]) -> list[Tensor]:
    """Two micro-batches a step, clipping, a schedule."""
    model = mlp()
    attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for step in range(STEPS):
        for part in batch(step).chunk(2):
            (loss_of(model(part)) / 2).backward()
        clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        schedule.step()
        model.zero_grad()
    return list(model.parameters())


def scaled(attach: Callable[[nn.Module], object]) -> list[Tensor]:
    """A loss scaler, from which the clipped gradients must be freed; it skips a step."""
    model = mlp()
    attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scaler = GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    for step in range(STEPS):
        loss = loss_of(model(batch(step))) * (torch.inf if step == 2 else 1.0)
        scaler.scale(loss).backward()
        clip_grad_norm_(model.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return list(model.parameters())


def closures(attach: Callable[[nn.Module], object]) -> list[Tensor]:
    """Backward runs inside the optimizer's step only."""
    model = mlp()
    attach(model)
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model(batch(step)))
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    return list(model.parameters())


def by_hand(attach: Callable[[nn.Module], object]) -> list[Tensor]:
    """No optimizer at all."""
    model = mlp()
    attach(model)
    for step in range(STEPS):
        loss_of(model(batch(step))).backward()
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p -= 0.1 * p.grad
                p.grad = None
    return list(model.parameters())


def one_each(attach: Callable[[nn.Module], object]) -> list[Tensor]:
    """One optimizer for each layer; the second is created late."""
    model = mlp()
    attach(model)
    optimizers = [torch.optim.SGD(model[0].parameters(), 0.1)]
    for step in range(STEPS):
        if step == 2:
            optimizers.append(torch.optim.SGD(model[2].parameters(), 0.1))
        loss_of(model(batch(step))).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return list(model.parameters())


def in_backward(attach: Callable[[nn.Module], object]) -> list[Tensor]:
    """One optimizer for each parameter, which steps as soon as the gradient is there."""
    model = mlp()
    attach(model)
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}

    def step_now(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    for step in range(STEPS):
        loss_of(model(batch(step))).backward()
    return list(model.parameters())


def gradients_only(attach: Callable[[nn.Module], object]) -> list[Tensor]:
    """`backward` is never called: the first that is seen is an optimizer's step."""
    model = mlp()
    attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        found = torch.autograd.grad(loss_of(model(batch(step))), list(model.parameters()))
        for p, gradient in zip(model.parameters(), found, strict=True):
            p.grad = gradient
        optimizer.step()
    return list(model.parameters())


def compiled(attach: Callable[[nn.Module], object]) -> list[Tensor]:
    torch.compiler.reset()
    model = torch.compile(mlp(), backend="aot_eager")
    attach(model)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)  # type: ignore[attr-defined]
    for step in range(STEPS):
        loss_of(model(batch(step))).backward()  # type: ignore[operator]
        optimizer.step()
        optimizer.zero_grad()
    torch.compiler.reset()
    return list(model.parameters())  # type: ignore[attr-defined]


def rows(run: Run, kind: str) -> pd.DataFrame:
    frame = run.stats(kind).drop(columns="time", errors="ignore")
    return frame.sort_values(["step", "tensor"]).reset_index(drop=True)


@pytest.mark.parametrize(
    "loop", [plain, scaled, closures, by_hand, one_each, in_backward, gradients_only, compiled]
)
def test_the_same_numbers_as_watch_and_the_same_training(tmp_path: Path, loop: Loop) -> None:
    alone = loop(lambda _: None)
    opened: list[Any] = []
    watched = loop(lambda model: opened.append(watch(model, run=tmp_path / "watch", every=1)))
    opened[0].close()
    with zero_code(tmp_path / "auto") as found:
        automatic = loop(lambda _: None)
    assert found.auto.runs == [tmp_path / "auto"]
    assert len(found.words) == 1
    for a, b, c in zip(alone, watched, automatic, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    one, other = Run(tmp_path / "watch"), Run(tmp_path / "auto")
    assert not (tmp_path / "auto" / "errors.log").exists()
    for kind in ("initial_weight", "weight", "gradient", "update"):
        assert len(rows(one, kind)) > 0, kind
        pd.testing.assert_frame_equal(rows(one, kind), rows(other, kind))
    for name in ("lr", "grad_norm", "clip_ratio", "loss_scale"):
        columns = ["step", "value"]
        pd.testing.assert_frame_equal(one.scalars(name)[columns], other.scalars(name)[columns])
    assert list(one.tensors()["tensor"]) == list(other.tensors()["tensor"])


# What is found ----------------------------------------------------------------------------------------------


class Generator(nn.Sequential):
    pass


class Critic(nn.Sequential):
    pass


def test_two_networks_that_train_each_other_are_one_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with zero_code(tmp_path / "gan") as found:
        generator, critic = Generator(nn.Linear(8, 8)), Critic(nn.Linear(8, 1))
        of_critic = torch.optim.SGD(critic.parameters(), 0.1)
        of_generator = torch.optim.SGD(generator.parameters(), 0.1)
        expected: dict[str, list[float]] = {"Critic": [], "Generator": []}
        for step in range(STEPS):
            fake = generator(batch(step))
            critic.zero_grad()
            real, made = critic(batch(step + 50)).square().mean(), critic(fake.detach()).exp().mean()
            real.backward()
            made.backward()
            of_critic.step()
            generator.zero_grad()
            fooled = -critic(fake).mean()
            fooled.backward()
            of_generator.step()
            expected["Critic"].append(real.item() + made.item())
            expected["Generator"].append(fooled.item())
    run = Run(tmp_path / "gan")
    assert set(run.tensors()["tensor"]) == {
        f"{name}.0.{leaf}" for name in expected for leaf in ("weight", "bias")
    }
    assert run.last_step == STEPS - 1
    for name, losses in expected.items():
        assert run.scalars(f"train_loss/{name}")["value"].tolist() == pytest.approx(losses)
    assert found.auto.runs == [tmp_path / "gan"]


def test_the_loss_is_what_backward_was_called_on_before_it_was_scaled(tmp_path: Path) -> None:
    with zero_code(tmp_path / "run"):
        scaled(lambda _: None)
    logged = Run(tmp_path / "run").scalars("train_loss")
    assert logged["step"].tolist() == list(range(STEPS))
    model = mlp()
    assert logged["value"][0] == pytest.approx(loss_of(model(batch(0))).item())
    assert logged["value"][2] == float("inf")
    with zero_code(tmp_path / "parts"):
        plain(lambda _: None)
    logged = Run(tmp_path / "parts").scalars("train_loss")
    assert logged["value"][0] == pytest.approx(loss_of(model(batch(0))).item())  # two halves


class Agent(nn.Module):
    """Its forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.value = nn.Linear(8, 2), nn.Linear(8, 1)


def test_an_agent_whose_forward_is_never_called(tmp_path: Path) -> None:
    with zero_code(tmp_path / "run"):
        agent = Agent()
        target = copy.deepcopy(agent)
        frozen = mlp().requires_grad_(False)
        optimizer = torch.optim.Adam(agent.parameters(), 1e-2)
        losses = []
        for step in range(STEPS):
            loss = agent.actor(batch(step)).square().mean() + agent.value(batch(step)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert target is not None
        assert frozen is not None
    run = Run(tmp_path / "run")
    assert list(run.tensors()["tensor"]) == ["actor.weight", "actor.bias", "value.weight", "value.bias"]
    assert run.scalars("train_loss")["value"].tolist() == pytest.approx(losses)
    assert run.stats("activation")["step"].min() == 1  # the first forward was over when it was found


def test_layers_in_a_plain_list_and_a_wrapper_around_them(tmp_path: Path) -> None:
    class Forward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["layers"] = [Critic(nn.Linear(8, 8)), Critic(nn.Linear(8, 8))]
            self.optimizers = [torch.optim.SGD(layer.parameters(), 0.1) for layer in self.__dict__["layers"]]

    with zero_code(tmp_path / "run") as found:
        model = Forward()
        for step in range(STEPS):
            x = batch(step)
            for layer, optimizer in zip(model.__dict__["layers"], model.optimizers, strict=True):
                optimizer.zero_grad()
                x = layer(x.detach())
                x.square().mean().backward()
                optimizer.step()
    assert found.auto.runs == [tmp_path / "run"]
    run = Run(tmp_path / "run")
    assert list(run.tensors()["tensor"])[::2] == ["Critic0.0.weight", "Critic1.0.weight"]
    assert run.last_step == STEPS - 1


def test_models_that_come_later_are_runs_of_their_own(tmp_path: Path) -> None:
    """Cross-validation: a run for each fold, each closed when it is seen to be over."""
    with zero_code(tmp_path / "fold") as found:
        for fold in range(3):
            model = mlp(fold)
            train(model, torch.optim.SGD(model.parameters(), 0.1), STEPS)
        assert found.auto.runs == [tmp_path / "fold"]
    names = ["fold", "fold-2", "fold-3"]
    assert found.auto.runs == [tmp_path / name for name in names]
    for name in names:
        run = Run(tmp_path / name)
        assert run.last_step == STEPS - 1
        assert run.info["closed"]
        assert len(run.scalars("train_loss")) == STEPS


def test_a_model_that_grows_into_a_larger_one(tmp_path: Path) -> None:
    body = mlp()
    with zero_code(tmp_path / "run") as found:
        train(body, torch.optim.SGD(body.parameters(), 0.1), STEPS)
        whole = nn.Sequential(body, nn.Linear(3, 2))
        train(whole, torch.optim.SGD(whole.parameters(), 0.1), STEPS)
    assert found.auto.runs == [tmp_path / "run", tmp_path / "run-2"]
    assert len(Run(tmp_path / "run").tensors()) == 4
    assert len(Run(tmp_path / "run-2").tensors()) == 6


def test_a_model_that_rested_goes_on(tmp_path: Path) -> None:
    with zero_code(tmp_path / "run") as found:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        train(model, optimizer, STEPS)
        for other in (mlp(1), mlp(2)):
            train(other, torch.optim.SGD(other.parameters(), 0.1), STEPS)
        assert found.auto.runs == [tmp_path / "run"]
        train(model, optimizer, STEPS)
    assert len(found.auto.runs) == 4


def test_a_checkpoint_goes_on_in_its_run(tmp_path: Path) -> None:
    """At the step that the optimizer's state tells."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with zero_code(tmp_path / "run"):
        train(model, optimizer, 3)
        saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        train(model, optimizer, 2)
    with zero_code(tmp_path / "run", resume=True):
        again = mlp()
        optimizer = torch.optim.Adam(again.parameters(), 1e-2)
        again.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        train(again, optimizer, 4)
    assert Run(tmp_path / "run").last_step == 6


def test_there_is_an_end_to_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autowatch, "MAX_RUNS", 2)
    with zero_code(tmp_path / "run") as found:
        for task in range(4):
            model = mlp(task)
            train(model, torch.optim.SGD(model.parameters(), 0.1), 2)
    assert len(found.auto.runs) == 2
    assert [w for w in found.words if "2 runs have begun" in w] == found.words[-1:]


# What is left alone -----------------------------------------------------------------------------------------


def test_a_gradient_without_a_training_leaves_no_run(tmp_path: Path) -> None:
    model = mlp()
    with zero_code(tmp_path / "run") as found:
        for step in range(3):
            loss_of(model(batch(step))).backward()
    assert found.auto.runs == []
    assert not (tmp_path / "run").exists()


def test_tensors_in_no_module(tmp_path: Path) -> None:
    with zero_code(tmp_path / "run") as found:
        picture = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.SGD([picture], 0.1)
        (picture - 1).square().sum().backward()
        optimizer.step()
    assert found.auto.loose
    assert found.words == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_program_that_watches_decides_alone(tmp_path: Path, steps_before: int) -> None:
    model, other = mlp(), mlp(1)
    with zero_code(tmp_path / "auto") as found:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        train(model, optimizer, steps_before)
        with watch(model, optimizer, run=tmp_path / "own", every=1):
            train(model, optimizer, STEPS)
            train(other, torch.optim.SGD(other.parameters(), 0.1), 2)
    assert found.auto.left
    assert Run(tmp_path / "own").last_step == STEPS - 1
    assert (tmp_path / "auto").exists() == (steps_before > 0)
    assert not (tmp_path / "auto-2").exists()


def test_an_error_of_ours_is_told_and_the_training_goes_on(tmp_path: Path) -> None:
    alone, model = mlp(), mlp()
    train(alone, torch.optim.SGD(alone.parameters(), 0.1), STEPS)
    with zero_code(tmp_path / "run", include="no such tensor") as found:
        train(model, torch.optim.SGD(model.parameters(), 0.1), STEPS)
    assert len(found.words) == 1
    assert "leave no tensor to watch" in found.words[0]
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), model.parameters(), strict=True))


def test_a_forked_worker_is_not_watched(tmp_path: Path) -> None:
    with zero_code(tmp_path / "run") as found:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        child = os.fork()
        if child == 0:
            try:
                train(model, optimizer, STEPS)
                found.auto.finish()
                os._exit(int((tmp_path / "run").exists()))
            finally:
                os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        train(model, optimizer, 2)
    assert Run(tmp_path / "run").last_step == 1


def test_other_hooks_of_the_process_go_on(tmp_path: Path) -> None:
    """Watching begins in the middle of a step, while torch goes through its global hooks."""
    seen: list[str] = []
    with zero_code(tmp_path / "run"):
        handle = register_optimizer_step_pre_hook(lambda *_: seen.append("step"))
        gradients_only(lambda _: None)
        handle.remove()
    assert len(seen) == STEPS
    assert Run(tmp_path / "run").last_step == STEPS - 1


def test_torch_is_left_as_it_was(tmp_path: Path) -> None:
    module = importlib.import_module("torch.optim.optimizer")

    def state() -> list[Any]:
        hooks = (module._global_optimizer_pre_hooks, module._global_optimizer_post_hooks)
        return [torch.autograd.backward, torch.optim.Optimizer.__init__, GradScaler.step, *map(dict, hooks)]

    before = state()
    with zero_code(tmp_path / "run"):
        assert state()[0] is not before[0]
        plain(lambda _: None)
    assert state() == before
