"""Whatever happens inside layerwatch, the training does not notice."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad
from trainings import assert_same_numbers, batch, hooks_of, loss_of, mlp, train, weights_of

from layerwatch import Run, Watcher, watch
from layerwatch.hooks import activations, capture, measure, reference, units, values
from layerwatch.monitor import LogWriter


def final_weights(
    on_ready: Callable[[nn.Module, torch.optim.Optimizer], Any] | None = None,
) -> dict[str, torch.Tensor]:
    """A training with everything that the hooks touch: dropout, clipping, a schedule."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    watched = on_ready(model, optimizer) if on_ready is not None else None
    for step in range(6):
        optimizer.zero_grad()
        loss = loss_of(model(batch(step)))
        loss.backward()
        clip_grad.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        if isinstance(watched, Watcher):
            watched.log(train_loss=loss)
    if isinstance(watched, Watcher):
        watched.close()
    return weights_of(model)


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(a[n], b[n]) for n in a)


class Boom(Exception):
    """Something inside layerwatch went wrong."""


#: Places that a hook goes through: (object, attribute). What is logged about a failure there is tested here;
#: that no other place is forgotten, in test_injection.
POINTS: dict[str, tuple[Any, str]] = {
    "begin": (capture.Capture, "begin"),
    "reference": (reference.Reference, "take"),
    "before step": (capture.Capture, "before_step"),
    "after step": (capture.Capture, "after_step"),
    "rates": (capture.Capture, "log_rates"),
    "complete": (capture.Capture, "complete"),
    "clip": (capture.Capture, "before_clip"),
    "activation": (units.Units, "add"),
    "copy": (measure.Measure, "copy"),
    "collect": (measure.Measure, "collect"),
    "rows": (measure.Measure, "taken"),
    "state": (capture, "state_of"),
    "values": (values.Values, "store"),
    "arming": (activations.ActivationTap, "arm"),
    "final": (capture.Capture, "final"),
    "append": (LogWriter, "stats"),
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("later", [False, True])
def test_an_error_at_any_point_ends_the_watching_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, point: str, later: bool
) -> None:
    alone = final_weights()
    owner, name = POINTS[point]
    real, calls = getattr(owner, name), 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2 * later:
            raise Boom("on purpose")
        return real(*args, **kwargs)

    def start(model: nn.Module, optimizer: torch.optim.Optimizer) -> Watcher:
        started = watch(model, optimizer, run=tmp_path / "run", every=2)
        monkeypatch.setattr(owner, name, broken)
        return started

    with caplog.at_level(logging.WARNING, "layerwatch"):
        weights = final_weights(start)
    assert_equal(weights, alone)
    monkeypatch.undo()
    if not calls or (later and calls <= 2):
        return  # this point is passed less often
    run = Run(tmp_path / "run")
    events = run.events()
    assert (events["event"] == "error").sum() == 1
    assert "on purpose" in events.loc[events["event"] == "error", "message"].iloc[0]
    assert len([r for r in caplog.records if r.name == "layerwatch"]) == 1
    text = (tmp_path / "run" / "errors.log").read_text()
    assert text.count("Traceback") == 1
    assert "Boom: on purpose" in text
    assert "broken" in text  # the frame that raised
    assert len(run.scalars("train_loss")) == 6  # what the user logs goes on
    assert run.info["closed"]


def test_every_point_is_really_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would prove nothing."""
    passed = set()
    for point, (owner, name) in POINTS.items():
        real = getattr(owner, name)

        def counting(*args: Any, _point: str = point, _real: Any = real, **kwargs: Any) -> Any:
            passed.add(_point)
            return _real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)
    final_weights(lambda m, o: watch(m, o, run=tmp_path / "run", every=2))
    assert passed == set(POINTS)


def test_a_damaged_log_does_not_reach_the_training_at_close(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watching = watch(model, optimizer, run=tmp_path / "run", every=1)
    train(model, optimizer, 2)
    (tmp_path / "run" / "stats" / "r0-000000.parquet").write_bytes(b"PAR1 rubbish")
    watching.close()
    assert sorted(set(Run(tmp_path / "run").stats("weight")["step"])) == [0, 1]


@pytest.mark.parametrize("call", ["scalars", "close"])
def test_an_error_in_what_the_user_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watching = watch(model, optimizer, run=tmp_path / "run", every=1)
    train(model, optimizer, 2)

    def broken(*_: Any, **__: Any) -> None:
        raise Boom("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(LogWriter, call, broken)
        watching.log(train_loss=1.0)
        train(model, optimizer, 2)
        watching.close()
        watching.close()
    assert "Boom: on purpose" in (tmp_path / "run" / "errors.log").read_text()
    assert len(caplog.records) == 1
    steps = sorted(set(Run(tmp_path / "run").stats("weight")["step"]))
    assert steps == ([0, 1] if call == "scalars" else [0, 1, 2, 3])
    assert hooks_of(model) == []


def test_a_deleted_run_folder_does_not_reach_the_training(tmp_path: Path) -> None:
    import shutil

    alone = final_weights()

    def start(model: nn.Module, optimizer: torch.optim.Optimizer) -> Watcher:
        watching = watch(model, optimizer, run=tmp_path / "run", every=1)
        shutil.rmtree(tmp_path / "run")
        return watching

    assert_equal(final_weights(start), alone)


# Copies -----------------------------------------------------------------------------------------------------


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: _saved_and_loaded(m),
}


def _saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", COPIES)
def test_a_watched_model_can_be_copied_and_the_copy_is_not_watched(tmp_path: Path, way: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, run=tmp_path / "run", every=1) as watching:
        train(model, optimizer, 1)
        assert hooks_of(model)  # armed
        twin = COPIES[way](model)
        assert len(hooks_of(model)) == 3  # still
        loss_of(twin(batch(0, 1000))).backward()
        torch.optim.SGD(twin.parameters(), 0.1).step()
        assert watching.step == 0
        train(model, optimizer, 1)
    run = Run(tmp_path / "run")
    assert not (tmp_path / "run" / "errors.log").exists()
    assert run.stats("activation", "0")["samples"].tolist() == [32, 32]
    assert run.last_step == 1


def test_a_watched_optimizer_can_be_copied(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    with watch(model, optimizer, run=tmp_path / "run", every=1) as watching:
        train(model, optimizer, 1)
        twin = copy.deepcopy(optimizer)
        again = pickle.loads(pickle.dumps(optimizer))
        twin.step()
        again.step()
        assert watching.step == 0
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)


def test_a_saved_model_loads_where_we_are_not(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        loss_of(model(batch(0))).backward()  # captured, and not stepped
        assert hooks_of(model)
        torch.save((model, optimizer), tmp_path / "saved.pt")
        optimizer.step()
    script = (
        "import sys, torch\nsys.modules['layerwatch'] = None\n"
        "model, optimizer = torch.load('saved.pt', weights_only=False)\n"
        "model(torch.ones(1, 8)).sum().backward()\noptimizer.step()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# Detaching --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False])
def test_close_leaves_nothing_behind(tmp_path: Path, given: bool) -> None:
    def global_hooks() -> list[int]:
        names = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
        return [len(getattr(sys.modules["torch.optim.optimizer"], name)) for name in names]

    grouping, step, scale = clip_grad._group_tensors_by_device_and_dtype, GradScaler.step, GradScaler.scale  # type: ignore[attr-defined]
    before, backward = global_hooks(), torch.autograd.backward
    model, other = mlp(), mlp(1)
    optimizer, others = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, other))
    first = watch(model, optimizer if given else None, run=tmp_path / "a", every=1)
    second = watch(other, others if given else None, run=tmp_path / "b", every=1)
    train(model, optimizer, 2)
    train(other, others, 2)
    assert clip_grad._group_tensors_by_device_and_dtype is not grouping  # type: ignore[attr-defined]
    assert torch.autograd.backward is not backward
    first.close()
    train(other, others, 1)
    second.close()
    first.close()  # twice
    assert hooks_of(model) == []
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert global_hooks() == before
    assert clip_grad._group_tensors_by_device_and_dtype is grouping  # type: ignore[attr-defined]
    assert (GradScaler.step, GradScaler.scale) == (step, scale)
    assert torch.autograd.backward is backward
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    train(model, optimizer, 2)
    first.log(train_loss=1.0)
    second.close()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == files
    assert (Run(tmp_path / "a").last_step, Run(tmp_path / "b").last_step) == (1, 2)


def surface() -> dict[str, int]:
    """Every function and class that torch has, by its place: which object it is."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name == "torch" or name.startswith("torch."):
            for attribute, value in list(vars(module).items()):
                if callable(value):
                    found[f"{name}.{attribute}"] = id(value)
                if issubclass(type(value), type) and value.__module__.startswith("torch"):
                    members = vars(value).items()
                    found |= {f"{name}.{attribute}.{k}": id(v) for k, v in members if callable(v)}
    hooks = {**vars(sys.modules["torch.nn.modules.module"]), **vars(sys.modules["torch.optim.optimizer"])}
    return found | {k: len(v) for k, v in hooks.items() if "hooks" in k and isinstance(v, dict)}


@pytest.mark.parametrize("given", [True, False])
def test_torch_is_as_it_was_before(tmp_path: Path, given: bool) -> None:
    """Whatever was replaced or registered, wherever."""

    def once(path: Path) -> set[str]:
        model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 8, batch_first=True))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        before = surface()
        with watch(model, optimizer if given else None, run=path, every=1):
            train(model, optimizer, 1)
            loss_of(model(batch(1))).backward()
            during = surface()
            optimizer.step()
        after = surface()
        assert hooks_of(model) == []
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        assert {name for name, value in before.items() if after[name] != value} == set()
        return {name for name, value in before.items() if during[name] != value}

    once(tmp_path / "first")  # what torch loads when it is needed is there now
    changed = once(tmp_path / "second")
    assert "torch.autograd.backward" in changed
    assert "torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype" in changed


def test_a_with_block_closes_also_after_an_exception(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ZeroDivisionError), watch(model, optimizer, run=tmp_path / "run", every=1):
        train(model, optimizer, 2, after_step=lambda s: 1 / (1 - s))
    run = Run(tmp_path / "run")
    assert run.info["closed"]
    assert run.events()["event"].tolist() == ["start", "close"]
    assert hooks_of(model) == []


ENDINGS = {
    "falls off the end": "",
    "raises": "raise RuntimeError('on purpose')",
    "exits": "import sys; sys.exit(3)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_is_closed_when_the_program_ends(tmp_path: Path, checkout: Path, ending: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nfrom layerwatch import watch\n"
        "model = torch.nn.Linear(3, 2)\noptimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
        f"watcher = watch(model, optimizer, run={str(tmp_path / 'run')!r}, every=2)\n"
        "for step in range(4):\n    model(torch.ones(1, 3)).sum().backward()\n    optimizer.step()\n"
        "    watcher.log(train_loss=torch.tensor(1.0))\n" + ENDINGS[ending]
    )
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )  # fmt: skip
    assert done.returncode == {"falls off the end": 0, "raises": 1, "exits": 3}[ending]
    assert "layerwatch" not in done.stderr
    run = Run(tmp_path / "run")
    assert run.info["closed"]
    assert run.stats("weight", "weight")["step"].tolist() == [0, 2, 3]
    assert len(run.scalars("train_loss")) == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python warns of forking with threads
def test_a_forked_process_writes_nothing(tmp_path: Path) -> None:
    """Workers inherit the hooks: neither their steps nor their exit may touch the parent's log."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watching = watch(model, optimizer, run=tmp_path / "run", every=1)
    train(model, optimizer, 2)
    pid = os.fork()
    if pid == 0:
        try:
            train(model, optimizer, 3)
            watching.log(train_loss=9.0)
            watching.close()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert not Run(tmp_path / "run").info["closed"]
    train(model, optimizer, 1)
    watching.close()
    run = Run(tmp_path / "run")
    assert run.stats("weight", "0.weight")["step"].tolist() == [0, 1, 2]
    assert run.scalars("train_loss").empty


def test_user_callbacks_and_detectors_may_fail(tmp_path: Path) -> None:
    def angry(_: object) -> None:
        raise Boom("on purpose")

    alone = final_weights()
    assert_equal(
        final_weights(lambda m, o: watch(m, o, run=tmp_path / "run", every=1, on_finding=angry)), alone
    )
    assert Run(tmp_path / "run").info["closed"]


def test_a_step_that_an_error_ended_was_not_made(tmp_path: Path) -> None:
    """It came out of the closure, where frameworks run forward and backward."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def closure(step: int, fails: bool) -> torch.Tensor:
        optimizer.zero_grad()
        if fails:
            raise Boom
        loss = loss_of(model(batch(step)))
        loss.backward()
        return loss

    with watch(model, optimizer, run=tmp_path / "run", every=1):
        for step, fails in [(0, True), (0, False), (1, False), (2, True), (2, False), (3, True)]:
            with contextlib.suppress(Boom):
                optimizer.step(lambda step=step, fails=fails: closure(step, fails))  # type: ignore[misc]
    made = mlp()
    with watch(made, optimizer := torch.optim.SGD(made.parameters(), 0.1), run=tmp_path / "raw", every=1):
        train(made, optimizer, steps=3)
    assert_same_numbers(Run(tmp_path / "run"), Run(tmp_path / "raw"))
