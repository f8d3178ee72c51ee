"""Trainings without a torch optimizer, and two watchers at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainings import batch, column, failures, gradients_of, loss_of, mlp, norm, train, weights_of

from layerwatch import Run, watch

RATE = 0.1


def by_data(model: nn.Module, _: dict[str, Tensor]) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.data.add_(-RATE * p.grad)


def without_grad(model: nn.Module, _: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p -= RATE * p.grad  # type: ignore[operator]


def momentum(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            assert p.grad is not None
            buffers[name] = 0.9 * buffers.get(name, torch.zeros_like(p)) + p.grad
            p.sub_(RATE * buffers[name])


def replaced(model: nn.Module, _: dict[str, Tensor]) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.data = p.data - RATE * p.grad


def to_none(model: nn.Module) -> None:
    model.zero_grad()


def to_zero(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)


UPDATES: dict[str, Callable[[nn.Module, dict[str, Tensor]], None]] = {
    "data": by_data, "no_grad": without_grad, "momentum": momentum, "replaced": replaced,
}  # fmt: skip
CLEARS = {"none": to_none, "zero": to_zero}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("clear", CLEARS)
@pytest.mark.parametrize("order", ["clear after", "clear before"])
@pytest.mark.parametrize("micro", [1, 3])
def test_steps_by_hand_against_the_truth(
    tmp_path: Path, update: str, clear: str, order: str, micro: int
) -> None:
    model, buffers = mlp(), {}
    weights, gradients = [weights_of(model)], []
    with watch(model, run=tmp_path / "run", every=1) as watcher:
        for step in range(5):
            if order == "clear before":
                CLEARS[clear](model)
            loss = torch.zeros(())
            for part in range(micro):
                loss = loss_of(model(batch(10 * step + part)))
                loss.backward()
            gradients.append(gradients_of(model))
            UPDATES[update](model, buffers)
            if order == "clear after":
                CLEARS[clear](model)
            weights.append(weights_of(model))
            watcher.log(train_loss=loss)
            assert watcher.step == step
        assert failures(watcher) == ""
    run = Run(tmp_path / "run")
    assert run.info["notes"] == []
    for name in weights[0]:
        assert run.stats("initial_weight", name)["norm"].tolist() == [pytest.approx(norm(weights[0][name]))]
        expected = {s: pytest.approx(norm(gradients[s][name]), rel=1e-9) for s in range(5)}
        assert column(run, "gradient", "norm", name) == expected
        expected = {s: pytest.approx(norm(weights[s + 1][name]), rel=1e-12) for s in range(5)}
        assert column(run, "weight", "norm", name) == expected
        moved = {s: pytest.approx(norm(weights[s + 1][name] - weights[s][name]), rel=1e-6) for s in range(5)}
        assert column(run, "update", "norm", name) == moved
        drift = dict(zip(*(run.drift(name)[c] for c in ("step", "relative_l2")), strict=True))
        for step in range(5):
            away = norm(weights[step + 1][name] - weights[0][name]) / norm(weights[0][name])
            assert drift[step] == pytest.approx(away, rel=1e-5)
    assert set(run.stats("weight")["state"]) == {"trainable"}
    assert run.scalars("train_loss")["step"].tolist() == list(range(5))
    samples = run.stats("activation", "0")
    assert samples["step"].tolist() == list(range(5))
    assert samples["samples"].tolist() == [32 * micro] * 5
    assert run.scalars("clip_ratio").empty
    for kind in ("weight", "gradient", "update", "activation"):
        assert not run.stats(kind).duplicated(["step", "tensor"]).any()


def test_every_third_step_and_the_last(tmp_path: Path) -> None:
    model = mlp()
    weights, gradients = [weights_of(model)], []
    with watch(model, run=tmp_path / "run", every=3):
        for step in range(8):
            loss_of(model(batch(step))).backward()
            gradients.append(gradients_of(model))
            by_data(model, {})
            model.zero_grad()
            weights.append(weights_of(model))
    run = Run(tmp_path / "run")
    assert column(run, "gradient", "norm", "2.bias") == {
        s: pytest.approx(norm(gradients[s]["2.bias"]), rel=1e-9) for s in (0, 3, 6)
    }
    assert column(run, "update", "norm", "2.bias") == {
        s: pytest.approx(norm(weights[s + 1]["2.bias"] - weights[s]["2.bias"]), rel=1e-6) for s in (0, 3, 6)
    }
    found = column(run, "weight", "norm", "2.bias")
    assert found == {s: pytest.approx(norm(weights[s + 1]["2.bias"]), rel=1e-12) for s in (0, 3, 6, 7)}
    assert run.stats("activation", "0")["step"].tolist() == [0, 3, 6]


def test_one_step_by_hand(tmp_path: Path) -> None:
    model = mlp()
    before = weights_of(model)
    with watch(model, run=tmp_path / "run", every=1):
        loss_of(model(batch(0))).backward()
        by_data(model, {})
    run = Run(tmp_path / "run")
    moved = norm(weights_of(model)["0.weight"] - before["0.weight"])
    assert column(run, "update", "norm", "0.weight") == {0: pytest.approx(moved, rel=1e-6)}


def test_monitoring_by_hand_changes_nothing(tmp_path: Path) -> None:
    def run(path: Path | None) -> dict[str, Tensor]:
        model, buffers = mlp(), {}
        watcher = watch(model, run=path, every=2) if path else None
        for step in range(6):
            loss_of(model(batch(step))).backward()
            momentum(model, buffers)
            model.zero_grad()
        if watcher:
            watcher.close()
        return weights_of(model)

    alone, watched = run(None), run(tmp_path / "run")
    assert all(torch.equal(alone[name], watched[name]) for name in alone)


def test_an_optimizer_that_comes_later_ends_it_for_good(tmp_path: Path) -> None:
    model = mlp()
    after, gradients = [], []
    with watch(model, run=tmp_path / "run", every=1) as watcher:
        for step in range(3):
            loss_of(model(batch(step))).backward()
            gradients.append(gradients_of(model))
            by_data(model, {})
            model.zero_grad()
            after.append(weights_of(model))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)

        def look(step: int) -> None:
            gradients.append(gradients_of(model))
            after.append(weights_of(model))

        train(model, optimizer, 3, data=lambda s: batch(s + 3), after_step=look)
        for step in range(6, 8):  # by hand again: not counted any more
            loss_of(model(batch(step))).backward()
            by_data(model, {})
        assert watcher.step == 5
        assert failures(watcher) == ""
    run = Run(tmp_path / "run")
    assert len(run.info["optimizers"]) == 1
    gradient = run.stats("gradient", "0.weight")
    assert gradient["step"].tolist() == list(range(6))
    assert gradient["norm"].tolist() == pytest.approx([norm(g["0.weight"]) for g in gradients], rel=1e-6)
    assert gradient["stage"].tolist()[3:] == ["at_step"] * 3


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("clear_first", [True, False])
def test_an_ordinary_training_never_counts_backward_passes(
    tmp_path: Path, micro: int, clear_first: bool
) -> None:
    """The optimizer is found when it steps; gradients may have been computed and cleared before."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    truth = []
    with watch(model, run=tmp_path / "run", every=1) as watcher:
        if clear_first:
            loss_of(model(batch(99))).backward()
            optimizer.zero_grad()
        for step in range(4):
            for part in range(micro):
                loss_of(model(batch(10 * step + part))).backward()
            truth.append(gradients_of(model))
            optimizer.step()
            optimizer.zero_grad()
            assert watcher.step == step
        assert watcher._follower._manual is None
    run = Run(tmp_path / "run")
    assert run.last_step == 3
    assert set(run.stats("gradient")["stage"]) == {"at_step"}
    assert column(run, "gradient", "norm", "0.weight") == {
        s: pytest.approx(norm(truth[s]["0.weight"]), rel=1e-9) for s in range(4)
    }
    assert len(run.info["optimizers"]) == 1


def test_a_watcher_with_an_optimizer_waits_for_it(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, run=tmp_path / "run", every=1) as watcher:
        for step in range(3):
            loss_of(model(batch(step))).backward()
            by_data(model, {})
            model.zero_grad()
        assert watcher.step == 0
    assert Run(tmp_path / "run").stats("gradient").empty


# Two watchers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["same", "part", "among several"])
def test_a_second_watcher_on_one_model_is_refused(tmp_path: Path, how: str) -> None:
    model = mlp()
    first = watch(model, run=tmp_path / "a")
    second: Any = {"same": model, "part": model[0], "among several": [mlp(1), model]}[how]
    with pytest.raises(ValueError, match="expected a model that is not watched yet") as caught:
        watch(second, run=tmp_path / "b")
    assert str(tmp_path / "a") in str(caught.value)
    assert "close()" in str(caught.value)
    assert not (tmp_path / "b").exists()
    first.close()
    watch(second, run=tmp_path / "b").close()


def test_after_a_failure_the_model_can_be_watched_again(tmp_path: Path) -> None:
    model = mlp()
    broken = watch(model, run=tmp_path / "a")
    broken._fail(RuntimeError("on purpose"))
    watch(model, run=tmp_path / "b").close()
    broken.close()


def test_watchers_on_different_models_work_side_by_side(tmp_path: Path) -> None:
    models = [mlp(0), mlp(1)]
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in models]
    watchers = [watch(m, run=tmp_path / str(i), every=1) for i, m in enumerate(models)]
    seen: list[list[dict[str, Tensor]]] = [[], []]
    for step in range(4):
        for i in (0, 1) if step < 3 else (1,):
            optimizers[i].zero_grad()
            loss_of(models[i](batch(step))).backward()
            nn.utils.clip_grad_norm_(models[i].parameters(), 100.0)
            optimizers[i].step()
            seen[i].append(gradients_of(models[i]))
    for watcher in watchers:
        assert failures(watcher) == ""
        watcher.close()
    for i, steps in enumerate((3, 4)):
        run = Run(tmp_path / str(i))
        assert column(run, "gradient", "norm", "0.weight") == {
            s: pytest.approx(norm(seen[i][s]["0.weight"]), rel=1e-6) for s in range(steps)
        }
        assert run.stats("activation", "0")["samples"].tolist() == [32] * steps
