"""Resuming: at which step a training goes on, and what becomes of the steps that are done again."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from trainings import mlp

from layerwatch import Run, watch

State = dict[str, Any]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        loss = model(torch.randn(4, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def checkpointed(
    path: Path, kind: type[torch.optim.Optimizer], saved_at: int, steps: int
) -> tuple[State, State]:
    """A run of so many steps that is never closed, and its checkpoint after `saved_at` of them."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = kind(model.parameters(), 0.01)  # type: ignore[call-arg]
    watcher = watch(model, optimizer, run=path, every=1)
    train(model, optimizer, saved_at)
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, steps - saved_at)
    watcher._detach()  # as if the process had died: nothing is closed
    watcher._open = False
    return states


def resumed(path: Path, kind: type[torch.optim.Optimizer], states: tuple[State, State], **more: Any) -> int:
    model = mlp()
    optimizer = kind(model.parameters(), 0.01)  # type: ignore[call-arg]
    model.load_state_dict(states[0])
    optimizer.load_state_dict(copy.deepcopy(states[1]))  # it would go on with the counters that it is given
    with watch(model, optimizer, run=path, every=1, **more) as watcher:
        first = watcher.step
        train(model, optimizer, 4)
    return first


def test_a_checkpoint_with_counters_tells_where_it_was_saved(tmp_path: Path) -> None:
    states = checkpointed(tmp_path / "run", torch.optim.Adam, 6, 10)
    before = Run(tmp_path / "run").stats("weight")
    assert resumed(tmp_path / "run", torch.optim.Adam, states, resume=True) == 6
    run = Run(tmp_path / "run")
    after = run.stats("weight")
    assert sorted(set(after["step"])) == list(range(10))
    old, new = after[after["step"] < 6], before[before["step"] < 6]
    pd.testing.assert_frame_equal(old.reset_index(drop=True), new.reset_index(drop=True))
    again = after.merge(before, on=["step", "tensor"], suffixes=("", "_old")).query("step >= 6")
    assert (again["norm"] != again["norm_old"]).all()  # other data was drawn
    # nothing is removed
    pd.testing.assert_frame_equal(Run(tmp_path / "run", session=0).stats("weight"), before)
    assert run.events().query("event == 'restart'")["step"].tolist() == [6]


def test_the_numbers_continue_the_checkpoint(tmp_path: Path) -> None:
    """The weight before the first resumed step is the one that was saved."""
    states = checkpointed(tmp_path / "run", torch.optim.Adam, 6, 10)
    resumed(tmp_path / "run", torch.optim.Adam, states, resume=True)
    update = Run(tmp_path / "run").stats("update").query("step == 6").set_index("tensor")
    for name, saved in states[0].items():
        size = float(saved.double().norm())
        assert update.loc[name, "norm"] / update.loc[name, "ratio"] == pytest.approx(size, rel=1e-6), name


def test_without_counters_it_goes_on_after_the_last_step(tmp_path: Path) -> None:
    states = checkpointed(tmp_path / "run", torch.optim.SGD, 6, 10)
    assert resumed(tmp_path / "run", torch.optim.SGD, states, resume=True) == 10


@pytest.mark.parametrize("step", [0, 6])
def test_the_step_can_be_given(tmp_path: Path, step: int) -> None:
    states = checkpointed(tmp_path / "run", torch.optim.SGD, 6, 10)
    assert resumed(tmp_path / "run", torch.optim.SGD, states, resume=step) == step
    run = Run(tmp_path / "run")
    assert sorted(set(run.stats("weight")["step"])) == list(range(max(step + 4, step)))
    assert run.last_step == step + 3
    sessions = run.sessions()
    assert sessions["first_step"].tolist() == [0, step]


def test_twice_from_one_checkpoint(tmp_path: Path) -> None:
    states = checkpointed(tmp_path / "run", torch.optim.Adam, 6, 8)
    for _ in range(2):
        assert resumed(tmp_path / "run", torch.optim.Adam, states, resume=True) == 6
    steps = Run(tmp_path / "run").stats("weight")
    assert len(steps) == 4 * 10
    assert sorted(set(steps["step"])) == list(range(10))
    assert Run(tmp_path / "run").sessions()["session"].tolist() == [0, 1, 2]


def test_from_a_checkpoint_that_is_older_than_the_last_start(tmp_path: Path) -> None:
    old = checkpointed(tmp_path / "run", torch.optim.Adam, 3, 3)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    optimizer.load_state_dict(copy.deepcopy(old[1]))
    with watch(model, optimizer, run=tmp_path / "run", every=1, resume=True):
        train(model, optimizer, 4)
    newer = model.state_dict(), optimizer.state_dict()
    assert resumed(tmp_path / "run", torch.optim.Adam, newer, resume=True) == 7
    assert resumed(tmp_path / "run", torch.optim.Adam, old, resume=True) == 3


def test_an_optimizer_that_was_old_at_the_start(tmp_path: Path) -> None:
    """A new run from an old checkpoint counts from 0; resumed, it goes on from its own count."""
    states = checkpointed(tmp_path / "first", torch.optim.Adam, 6, 6)
    assert resumed(tmp_path / "second", torch.optim.Adam, states) == 0  # 4 steps: the counter says 10
    states = checkpointed(tmp_path / "other", torch.optim.Adam, 9, 9)
    assert resumed(tmp_path / "second", torch.optim.Adam, states, resume=True) == 3


def test_steps_that_a_scaler_skipped_are_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    watcher = watch(model, optimizer, run=tmp_path / "run", every=1)
    for step in range(8):
        loss = model(torch.randn(4, 8)).square().mean() * (float("inf") if step in (1, 3) else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    states = model.state_dict(), optimizer.state_dict()
    watcher.close()
    assert int(next(iter(optimizer.state.values()))["step"]) == 6
    assert resumed(tmp_path / "run", torch.optim.Adam, states, resume=True) == 8


def test_a_checkpoint_that_does_not_belong_to_the_log(tmp_path: Path) -> None:
    states = checkpointed(tmp_path / "long", torch.optim.Adam, 20, 20)
    checkpointed(tmp_path / "run", torch.optim.Adam, 5, 5)
    assert resumed(tmp_path / "run", torch.optim.Adam, states, resume=True) == 5
    assert "20 steps, of which the log knows 5" in " ".join(Run(tmp_path / "run").info["notes"])


@pytest.mark.parametrize(
    ("resume", "error", "words"),
    [(-1, ValueError, "from 0, got -1"), ("yes", TypeError, "the number of a step, got str")],
)
def test_what_resume_takes(tmp_path: Path, resume: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        watch(mlp(), run=tmp_path / "run", resume=resume)


def test_what_run_json_knew_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "run"
    checkpointed(path, torch.optim.SGD, 3, 3)
    from layerwatch.monitor.description import write_json

    write_json(
        path / "run.json", {**Run(path).info, "accidents": [{"step": 1, "kind": "loss_spike"}], "mine": 1}
    )
    resumed(
        path,
        torch.optim.SGD,
        (mlp().state_dict(), torch.optim.SGD(mlp().parameters(), 0.1).state_dict()),
        resume=True,
    )
    info = Run(path).info
    assert (info["accidents"], info["mine"], info["closed"]) == ([{"step": 1, "kind": "loss_spike"}], 1, True)


KILLED = """
import sys, torch
from layerwatch import watch
torch.manual_seed(int(sys.argv[2]))
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
optimizer = torch.optim.AdamW(model.parameters(), 0.01)
if len(sys.argv) > 3:
    saved = torch.load(sys.argv[3])
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
watcher = watch(model, optimizer, run=sys.argv[1], every=2, resume=len(sys.argv) > 3)
for _ in range(30):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    watcher.log(train_loss=1.0)
    if watcher.step % 10 == 9:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, sys.argv[1] + ".pt")
    if watcher.step == 24:
        import os
        os.kill(os.getpid(), 9)
"""


def test_a_killed_training_resumes_from_its_checkpoint_file(tmp_path: Path, checkout: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, str(run)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    assert subprocess.run([*command, "0"], env=environment, check=False, timeout=100).returncode == -9
    assert Run(run).last_step == 24
    done = subprocess.run([*command, "1", f"{run}.pt"], env=environment, check=False, timeout=100)
    assert done.returncode == -9  # at step 24 again, of the second session
    log = Run(run)
    assert sorted(set(log.stats("weight")["step"])) == list(range(0, 25, 2))
    assert log.scalars("train_loss")["step"].tolist() == list(range(25))
    assert log.events().query("event == 'restart'")["step"].tolist() == [20]
    assert len(log.scalars("train_loss")) == 25
    assert len(Run(run, session=0).scalars("train_loss")) == 25
