"""Updates, gradients and clipping against what the loop itself saw."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_  # as users import them
from trainings import (
    batch,
    column,
    failures,
    gradients_of,
    loss_of,
    mlp,
    norm,
    train,
    watched_training,
    weights_of,
)

from layerwatch import Run, watch

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "adamw fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_gradients_and_updates_are_the_true_ones(tmp_path: Path, name: str) -> None:
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    weights, gradients = [weights_of(model)], []
    run = watched_training(
        tmp_path / "run", model, optimizer, 4,
        after_backward=lambda _: gradients.append(gradients_of(model)),
        after_step=lambda _: weights.append(weights_of(model)),
    )  # fmt: skip
    for tensor in weights[0]:
        start = run.stats("initial_weight", tensor)
        assert start["norm"].tolist() == [pytest.approx(norm(weights[0][tensor]), rel=1e-12)]
        for step in range(4):
            before, after = weights[step][tensor], weights[step + 1][tensor]
            moved = norm(after - before)
            assert column(run, "weight", "norm", tensor)[step] == pytest.approx(norm(after), rel=1e-12)
            assert column(run, "gradient", "norm", tensor)[step] == pytest.approx(
                norm(gradients[step][tensor]), rel=1e-12
            )
            assert column(run, "update", "norm", tensor)[step] == pytest.approx(moved, rel=1e-12)
            assert column(run, "update", "ratio", tensor)[step] == pytest.approx(
                moved / norm(before), rel=1e-9
            )
            cosine = float((after - before).double().ravel() @ before.double().ravel()) / moved / norm(before)
            assert column(run, "update", "along", tensor)[step] == pytest.approx(cosine, abs=1e-6)
            lost = int(((after == before) & (gradients[step][tensor] != 0)).sum())
            assert column(run, "update", "lost", tensor)[step] == lost
    assert set(run.stats("gradient")["stage"]) == {"at_step"}
    assert run.scalars("grad_norm")["value"].tolist() == pytest.approx(
        [sum(norm(g) ** 2 for g in step.values()) ** 0.5 for step in gradients]
    )
    assert run.scalars("clip_ratio").empty


def test_lbfgs_counts_one_step_and_logs_its_last_closures_gradient(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    weights, gradients, calls = [weights_of(model)], [], 0
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        for step in range(3):

            def closure(step: int = step) -> Tensor:
                nonlocal calls
                calls += 1
                optimizer.zero_grad()
                loss = loss_of(model(batch(step)))
                loss.backward()
                return loss

            optimizer.step(closure)  # type: ignore[arg-type]
            weights.append(weights_of(model))
            gradients.append(gradients_of(model))
    run = Run(tmp_path / "run")
    assert calls > 3
    assert run.last_step == 2
    for step in range(3):
        update = norm(weights[step + 1]["0.weight"] - weights[step]["0.weight"])
        assert column(run, "update", "norm", "0.weight")[step] == pytest.approx(update, rel=1e-9)
        assert column(run, "gradient", "norm", "0.weight")[step] == pytest.approx(
            norm(gradients[step]["0.weight"]), rel=1e-12
        )


def gan(path: Path, *, given: bool, steps: int = 5) -> tuple[Run, dict[str, list[dict[str, Tensor]]]]:
    """Discriminator first, then the generator, as in every textbook; returns weights after each step."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    discriminator = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(), nn.Linear(8, 1))
    of_g = torch.optim.Adam(generator.parameters(), 1e-2)
    of_d = torch.optim.Adam(discriminator.parameters(), 1e-2)
    seen = {"G": [weights_of(generator)], "D": [weights_of(discriminator)]}
    watcher = watch([generator, discriminator], [of_g, of_d] if given else None, run=path, every=1)
    for step in range(steps):
        fake = generator(batch(step, 16, 4))
        of_d.zero_grad()
        (discriminator(fake.detach()).mean() - discriminator(batch(step, 16, 2)).mean()).backward()
        of_d.step()
        of_g.zero_grad()
        (-discriminator(fake).mean()).backward()
        of_g.step()
        seen["G"].append(weights_of(generator))
        seen["D"].append(weights_of(discriminator))
        assert watcher.step == step
    watcher.close()
    return Run(path), seen


@pytest.mark.parametrize("given", [True, False])
def test_two_optimizers_share_a_step(tmp_path: Path, given: bool) -> None:
    run, seen = gan(tmp_path / "run", given=given)
    assert run.last_step == 4
    assert [t.partition(".")[0] for t in run.tensors()["tensor"]] == ["Sequential0"] * 4 + ["Sequential1"] * 4
    for prefix, key in (("Sequential0", "G"), ("Sequential1", "D")):
        for step in range(5):
            before, after = seen[key][step]["0.weight"], seen[key][step + 1]["0.weight"]
            name = f"{prefix}.0.weight"
            assert column(run, "weight", "norm", name)[step] == pytest.approx(norm(after), rel=1e-12)
            assert column(run, "update", "norm", name)[step] == pytest.approx(norm(after - before), rel=1e-9)
    # The mean's gradient of the last bias is exactly zero for the discriminator.
    assert set(run.stats("weight")["state"]) == {"trainable", "zero_gradient"}
    assert not run.stats("weight").duplicated(["step", "tensor"]).any()
    assert not run.stats("activation").duplicated(["step", "tensor"]).any()
    for scalar in ("grad_norm", "lr", "overhead"):
        assert not run.scalars(scalar)["step"].duplicated().any(), scalar


# Clipping ---------------------------------------------------------------------------------------------------

CLIPS: dict[str, Callable[[list[nn.Parameter]], object]] = {
    "norm": lambda p: clip_grad_norm_(p, 0.01),
    "norm foreach": lambda p: clip_grad_norm_(p, 0.01, foreach=True),
    "norm plain": lambda p: clip_grad_norm_(p, 0.01, foreach=False),
    "max norm": lambda p: clip_grad_norm_(p, 0.01, norm_type=math.inf),
    "value": lambda p: clip_grad_value_(p, 1e-3),
    "value plain": lambda p: clip_grad_value_(p, 1e-3, foreach=False),
    "qualified": lambda p: nn.utils.clip_grad_norm_(p, 0.01),
    "generator": lambda p: clip_grad_norm_(iter(p), 0.01),
    "twice": lambda p: (clip_grad_norm_(p, 0.01), clip_grad_value_(p, 1e-4)),
}


@pytest.mark.parametrize("clip", CLIPS)
def test_gradients_are_those_before_clipping_and_after_accumulation(tmp_path: Path, clip: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    raw, clipped = [], []
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        for step in range(3):
            optimizer.zero_grad()
            for micro in range(3):
                loss_of(model(batch(10 * step + micro))).backward()
            raw.append(gradients_of(model))
            CLIPS[clip](list(model.parameters()))
            clipped.append(gradients_of(model))
            optimizer.step()
    run = Run(tmp_path / "run")
    for name in raw[0]:
        assert column(run, "gradient", "norm", name) == {
            s: pytest.approx(norm(raw[s][name]), rel=1e-12) for s in range(3)
        }
    assert set(run.stats("gradient")["stage"]) == {"before_clip"}
    before, after = ([sum(norm(g) ** 2 for g in s.values()) ** 0.5 for s in seen] for seen in (raw, clipped))
    assert run.scalars("grad_norm")["value"].tolist() == pytest.approx(before, rel=1e-9)
    ratios = [a / b for a, b in zip(after, before, strict=True)]
    assert max(ratios) < 0.5
    assert run.scalars("clip_ratio")["value"].tolist() == pytest.approx(ratios, rel=1e-5)


def test_clipping_that_changes_nothing_has_ratio_one(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = watched_training(
        tmp_path / "run", model, optimizer, after_backward=lambda _: clip_grad_norm_(model.parameters(), 1e6)
    )
    assert run.scalars("clip_ratio")["value"].tolist() == pytest.approx([1.0] * 4, rel=1e-6)


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_the_clip_ratio_of_extreme_gradients(tmp_path: Path, scale: float) -> None:
    """Their squares do not fit into a float32."""
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    def clip(_: int) -> None:
        model.weight.grad = torch.full((1, 4), scale)
        clip_grad_value_(model.parameters(), scale / 4)

    run = watched_training(
        tmp_path / "run", model, optimizer, 1, data=lambda s: batch(s, features=4), after_backward=clip
    )
    assert run.scalars("clip_ratio")["value"].tolist() == pytest.approx([0.25], rel=1e-5)
    assert run.scalars("grad_norm")["value"].tolist() == pytest.approx([2 * scale], rel=1e-5)


def test_clipping_of_one_part_of_the_model(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = watched_training(
        tmp_path / "run",
        model,
        optimizer,
        after_backward=lambda _: clip_grad_norm_(model[0].parameters(), 0.01),
    )
    stages = run.stats("gradient").groupby("tensor")["stage"].unique().map(list).to_dict()
    assert stages == {
        "0.weight": ["before_clip"],
        "0.bias": ["before_clip"],
        "2.weight": ["at_step"],
        "2.bias": ["at_step"],
    }


def test_clipping_inside_a_closure(tmp_path: Path) -> None:
    """Lightning clips inside the closure that it hands to the optimizer."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    raw = []
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        for step in range(3):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model(batch(step)))
                loss.backward()
                raw.append(gradients_of(model))
                clip_grad_norm_(model.parameters(), 0.01)
                return loss

            optimizer.step(closure)  # type: ignore[arg-type]
    run = Run(tmp_path / "run")
    assert column(run, "gradient", "norm", "0.weight") == {
        s: pytest.approx(norm(raw[s]["0.weight"]), rel=1e-12) for s in range(3)
    }


def test_measuring_a_norm_is_not_clipping(tmp_path: Path) -> None:
    model = mlp()

    def measure(_: int) -> None:
        nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = watched_training(tmp_path / "run", model, optimizer, after_backward=measure)
    assert set(run.stats("gradient")["stage"]) == {"at_step"}
    assert run.scalars("clip_ratio").empty


def test_another_models_clipping_is_not_ours(tmp_path: Path) -> None:
    model, other = mlp(), mlp(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_of(other(batch(0))).backward()
    run = watched_training(
        tmp_path / "run", model, optimizer, after_backward=lambda _: clip_grad_norm_(other.parameters(), 0.01)
    )
    assert set(run.stats("gradient")["stage"]) == {"at_step"}


# What is captured when --------------------------------------------------------------------------------------


def test_every_nth_step_and_the_last_weights(tmp_path: Path) -> None:
    model = mlp()
    weights = []
    run = watched_training(
        tmp_path / "run", model, torch.optim.Adam(model.parameters()), 12, every=5,
        after_step=lambda _: weights.append(weights_of(model)),
    )  # fmt: skip
    assert sorted(column(run, "gradient", "norm", "0.weight")) == [0, 5, 10]
    assert sorted(column(run, "update", "norm", "0.weight")) == [0, 5, 10]
    last = column(run, "weight", "norm", "0.weight")
    assert sorted(last) == [0, 5, 10, 11]
    assert last[11] == pytest.approx(norm(weights[11]["0.weight"]), rel=1e-12)
    assert run.drift("0.weight")["step"].tolist() == [0, 5, 10, 11]


def test_without_updates_no_copy_is_made(tmp_path: Path) -> None:
    model = mlp()
    run = watched_training(
        tmp_path / "run", model, torch.optim.Adam(model.parameters()), watching={"updates": False}
    )
    assert run.stats("update").empty
    assert len(run.stats("weight", "0.weight")) == 4


def test_steps_are_counted_by_optimizer_steps_not_by_forward_calls(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watcher = watch(model, optimizer, run=tmp_path / "run", every=1)
    for _ in range(7):
        loss_of(model(batch(0))).backward()
    train(model, optimizer, 3)
    watcher.log(train_loss=0.5)
    with torch.no_grad():
        model(batch(0))
    watcher.log(val_loss=0.6)
    watcher.close()
    run = Run(tmp_path / "run")
    assert run.last_step == 2
    assert run.scalars("train_loss")["step"].tolist() == [2]
    assert run.scalars("val_loss")["step"].tolist() == [2]


def test_one_optimizer_per_parameter_shares_a_step(tmp_path: Path) -> None:
    model = mlp()
    optimizers = [torch.optim.SGD([p], 0.1) for p in model.parameters()]
    with watch(model, run=tmp_path / "run", every=1) as watcher:
        for step in range(4):
            loss_of(model(batch(step))).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            assert watcher.step == step
    run = Run(tmp_path / "run")
    counts = run.stats("weight").groupby("tensor").size()
    assert counts.tolist() == [4] * 4
    assert run.stats("update").groupby("tensor").size().tolist() == [4] * 4
    assert run.last_step == 3


def test_a_discriminator_that_steps_more_often(tmp_path: Path) -> None:
    """n_critic = 3: its own second step begins the next step of the run."""
    torch.manual_seed(0)
    often, seldom = nn.Linear(2, 1), nn.Linear(2, 2)
    of_often, of_seldom = (torch.optim.SGD(m.parameters(), 0.1) for m in (often, seldom))
    after = []
    with watch([often, seldom], [of_often, of_seldom], run=tmp_path / "run", every=1) as watcher:
        for step in range(9):
            loss_of(often(seldom(batch(step, features=2)))).backward()
            of_often.step()
            if step % 3 == 2:
                of_seldom.step()
            for model in (often, seldom):
                model.zero_grad()
            after.append(
                {
                    "Linear0.weight": weights_of(often)["weight"],
                    "Linear1.weight": weights_of(seldom)["weight"],
                }
            )
            assert watcher.step == step
    run = Run(tmp_path / "run")
    for name in after[0]:
        found = column(run, "weight", "norm", name)
        assert found == {s: pytest.approx(norm(after[s][name]), rel=1e-12) for s in range(9)}
    assert sorted(column(run, "update", "norm", "Linear1.weight")) == [2, 5, 8]


def test_the_learning_rate_is_logged_with_captures_and_when_it_changes(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.5}], 1.0
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
    run = watched_training(
        tmp_path / "run", model, optimizer, 5, every=3, after_step=lambda _: schedule.step()
    )
    # Every captured step (0 and 3), and every change.
    rates = run.scalars("lr")
    assert rates["step"].tolist() == [0, 2, 3, 4]
    assert rates["value"].tolist() == pytest.approx([1, 0.1, 0.1, 0.01])
    assert run.scalars("lr/1")["value"].tolist() == pytest.approx([0.5, 0.05, 0.05, 0.005])


# Loops that are not plain -----------------------------------------------------------------------------------


def expect_gradients(run: Run, name: str, truth: dict[int, Tensor], stage: str) -> None:
    """The gradient rows of a tensor are exactly these, at this stage."""
    assert column(run, "gradient", "norm", name) == {
        s: pytest.approx(norm(g), rel=1e-6, abs=1e-12) for s, g in truth.items()
    }
    assert set(run.stats("gradient", name)["stage"]) == {stage}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("seldom_first", [True, False])
def test_clipping_with_an_optimizer_that_steps_now_and_then(
    tmp_path: Path, given: bool, every: int, seldom_first: bool
) -> None:
    torch.manual_seed(0)
    often, seldom = nn.Linear(2, 1), nn.Linear(2, 2)
    of_often, of_seldom = (torch.optim.SGD(m.parameters(), 0.1) for m in (often, seldom))
    truth: dict[str, dict[int, Tensor]] = {"Linear0.weight": {}, "Linear1.weight": {}}
    optimizers = [of_often, of_seldom] if given else None
    with watch([often, seldom], optimizers, run=tmp_path / "run", every=every) as watcher:
        for iteration in range(9):
            for model in (often, seldom):
                model.zero_grad()
            loss_of(often(seldom(batch(iteration, features=2)))).backward()
            raw = [gradients_of(m)["weight"] for m in (often, seldom)]
            turns = [(0, often, of_often)]
            if iteration % 3 == 2:
                turns.insert(0 if seldom_first else 1, (1, seldom, of_seldom))
            for index, model, optimizer in turns:
                clip_grad_norm_(model.parameters(), 0.01)
                optimizer.step()
                truth[f"Linear{index}.weight"][watcher.step] = raw[index]
            assert watcher.step == iteration
        assert failures(watcher) == ""
    run = Run(tmp_path / "run")
    assert len(truth["Linear1.weight"]) == 3
    for name, seen in truth.items():
        expect_gradients(run, name, {s: g for s, g in seen.items() if s % every == 0}, "before_clip")
    weights = run.stats("weight")
    assert not weights.duplicated(["step", "tensor"]).any()
    assert (weights.groupby("step").size() == 4).all()
    updates = run.stats("update", "Linear1.weight")
    moved = updates[updates["norm"] > 0]
    assert moved["step"].tolist() == [s for s in truth["Linear1.weight"] if s % every == 0]
    assert not run.stats("activation").duplicated(["step", "tensor"]).any()


@pytest.mark.parametrize("to_none", [True, False])
def test_a_step_that_is_not_made_after_clipping(tmp_path: Path, to_none: bool) -> None:
    """A loop that skips bad batches: the next step's gradient is its own."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    used, ratios = [], []
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        for iteration in range(6):
            loss_of(model(batch(iteration))).backward()
            raw = gradients_of(model)
            clip_grad_norm_(model.parameters(), 0.01)
            if iteration % 2 == 1:
                used.append(raw)
                whole, cut = (
                    sum(norm(g) ** 2 for g in each.values()) ** 0.5 for each in (raw, gradients_of(model))
                )
                ratios.append(cut / whole)
                optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
    run = Run(tmp_path / "run")
    for name in used[0]:
        expect_gradients(run, name, {s: used[s][name] for s in range(3)}, "before_clip")
    assert run.scalars("clip_ratio")["value"].tolist() == pytest.approx(ratios, rel=1e-5)
    norms = [sum(norm(g) ** 2 for g in each.values()) ** 0.5 for each in used]
    assert run.scalars("grad_norm")["value"].tolist() == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize("clip", [False, True])
def test_a_closure_that_accumulates(tmp_path: Path, clip: bool) -> None:
    """As Lightning does it: forward, backward and clipping happen inside `optimizer.step(closure)`."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    raw, weights = [], [weights_of(model)]
    with watch(model, run=tmp_path / "run", every=1) as watcher:
        for step in range(4):
            loss_of(model(batch(10 * step))).backward()  # a micro-batch before the one that steps

            def closure(step: int = step) -> Tensor:
                loss = loss_of(model(batch(10 * step + 1)))
                loss.backward()
                raw.append(gradients_of(model))
                if clip:
                    clip_grad_norm_(model.parameters(), 0.01)
                return loss

            optimizer.step(closure)  # type: ignore[arg-type]
            optimizer.zero_grad()
            weights.append(weights_of(model))
            assert watcher.step == step
    run = Run(tmp_path / "run")
    for name in raw[0]:
        expect_gradients(run, name, {s: raw[s][name] for s in range(4)}, "before_clip" if clip else "at_step")
        assert column(run, "update", "norm", name) == {
            s: pytest.approx(norm(weights[s + 1][name] - weights[s][name]), rel=1e-6) for s in range(4)
        }
    assert run.stats("activation", "0")["samples"].tolist() == [64] * 4


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("given", [True, False])
def test_a_gan_whose_discriminator_keeps_stale_gradients(tmp_path: Path, clip: bool, given: bool) -> None:
    """The generator's backward reaches the discriminator, and nobody clears that: its next step uses it."""
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(4, 2), nn.Linear(2, 1)
    of_g, of_d = (torch.optim.SGD(m.parameters(), 0.05) for m in (generator, discriminator))
    truth: dict[str, dict[int, Tensor]] = {"Linear0.weight": {}, "Linear1.weight": {}}
    optimizers = [of_g, of_d] if given else None
    with watch([generator, discriminator], optimizers, run=tmp_path / "run", every=1):
        for step in range(5):
            fake = generator(batch(step, 16, 4))
            (
                discriminator(fake.detach()).square().mean() - discriminator(batch(step, 16, 2)).mean()
            ).backward()
            truth["Linear1.weight"][step] = gradients_of(discriminator)["weight"]
            if clip:
                clip_grad_norm_(discriminator.parameters(), 0.01)
            of_d.step()
            discriminator.zero_grad()
            of_g.zero_grad()
            (-discriminator(fake).mean()).backward()  # and this stays in the discriminator
            truth["Linear0.weight"][step] = gradients_of(generator)["weight"]
            if clip:
                clip_grad_norm_(generator.parameters(), 0.01)
            of_g.step()
    run = Run(tmp_path / "run")
    for name, seen in truth.items():
        expect_gradients(run, name, seen, "before_clip" if clip else "at_step")


@pytest.mark.parametrize("given", [True, False])
def test_optimizers_that_step_inside_backward(tmp_path: Path, given: bool) -> None:
    model = mlp()
    of = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}
    names = {p: name for name, p in model.named_parameters()}
    truth: list[dict[str, Tensor]] = []
    weights = [weights_of(model)]

    def step_now(parameter: Tensor) -> None:
        assert parameter.grad is not None
        truth[-1][names[parameter]] = parameter.grad.clone()  # type: ignore[index]
        of[parameter].step()  # type: ignore[index]
        of[parameter].zero_grad()  # type: ignore[index]

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_now)
    with watch(model, list(of.values()) if given else None, run=tmp_path / "run", every=1) as watcher:
        for step in range(4):
            truth.append({})
            loss_of(model(batch(step))).backward()
            weights.append(weights_of(model))
            assert watcher.step == step
        assert failures(watcher) == ""
    run = Run(tmp_path / "run")
    for name in weights[0]:
        expect_gradients(run, name, {s: truth[s][name] for s in range(4)}, "at_step")
        assert column(run, "update", "norm", name) == {
            s: pytest.approx(norm(weights[s + 1][name] - weights[s][name]), rel=1e-6) for s in range(4)
        }
    assert not run.stats("weight").duplicated(["step", "tensor"]).any()


def test_gradients_that_are_cleared_to_zero(tmp_path: Path) -> None:
    """A layer that is left out keeps a zero gradient, and still moves by momentum."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "seldom": nn.Linear(4, 4)})
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    weights, gradients = [weights_of(model)], []
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        for step in range(4):
            optimizer.zero_grad(set_to_none=False)
            x = model["used"](batch(step, features=4))
            loss_of(model["seldom"](x) if step < 2 else x).backward()
            gradients.append(gradients_of(model))
            optimizer.step()
            weights.append(weights_of(model))
    run = Run(tmp_path / "run")
    for name in weights[0]:
        expect_gradients(run, name, {s: gradients[s][name] for s in range(4)}, "at_step")
        assert column(run, "update", "norm", name) == {
            s: pytest.approx(norm(weights[s + 1][name] - weights[s][name]), rel=1e-6) for s in range(4)
        }
    found = run.stats("gradient", "seldom.weight")
    assert found["norm"].tolist()[2:] == [0.0, 0.0]
    assert found["state"].tolist() == ["trainable", "trainable", "zero_gradient", "zero_gradient"]
    assert (run.stats("update", "seldom.weight")["norm"] > 0).all()


def test_an_optimizer_that_takes_over(tmp_path: Path) -> None:
    """A second phase with its own optimizer: every step is still written when it ends."""
    model = mlp()
    first, second = torch.optim.SGD(model.parameters(), 0.1), torch.optim.Adam(model.parameters(), 1e-2)
    gradients = []
    with watch(model, run=tmp_path / "run", every=1) as watcher:
        for step in range(8):
            optimizer = first if step < 4 else second
            loss_of(model(batch(step))).backward()
            gradients.append(gradients_of(model))
            optimizer.step()
            optimizer.zero_grad()
            if step not in (4, 5):  # the one that has gone is waited for twice
                assert sorted(column(Run(watcher.run), "gradient", "norm", "0.weight"))[-1] == watcher.step
    run = Run(tmp_path / "run")
    # By definition a new optimizer's first step joins the step that is under way.
    assert run.last_step in (6, 7)
    norms = run.stats("gradient", "0.weight")["norm"].tolist()
    assert norms[-1] == pytest.approx(norm(gradients[-1]["0.weight"]), rel=1e-6)
    assert not run.stats("weight").duplicated(["step", "tensor"]).any()
