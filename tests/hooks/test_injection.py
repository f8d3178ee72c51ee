"""Every function of ours that the training enters, made to fail: the training does not notice.

Nothing is listed by hand: a first training shows which functions are called between `watch` and the end of
`close`, and each of them raises in a training of its own.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils.clip_grad import clip_grad_norm_
from trainings import batch, hooks_of

from layerwatch import Run, Watcher, watch

#: (module, function, first line)
Place = tuple[str, str, int]
Start = Callable[[nn.Module, Any], Watcher] | None

#: Errors here are for the user, who called: a value that is no number.
FOR_THE_USER = {("scalars", "number")}
#: What stands between the training and the guard, or is the guard: a few lines each, which nothing can guard.
THE_GUARD = {
    ("guard", "guarded"), ("guard", "forked"), ("guard", "untraced"), ("guard", "__call__"),
    ("cadence", "enter"), ("cadence", "leave"), ("cadence", "_used"),
    ("activations", "__call__"), ("functions", "__call__"),
    ("backward", "backward"), ("backward", "_begin"), ("backward", "_end"), ("backward", "<genexpr>"),
    ("gradients", "_grouping"), ("gradients", "_norm_of"),
    ("scaler", "scale"), ("scaler", "scaling"), ("scaler", "step"), ("scaler", "scaler_steps"),
    ("scaler", "scaler_stepped"), ("follower", "unless_alone"),
    ("watcher", "log"), ("watcher", "<dictcomp>"), ("watcher", "close"), ("watcher", "step"),
    ("watcher", "_fail"), ("live", "report"),
}  # fmt: skip
#: Functions that the training enters, those that they call, and what these call.
DEPTH = 3


class Boom(Exception):
    """On purpose."""


@functools.cache  # it is asked of every call of any function
def place_of(code: CodeType) -> Place | None:
    """Which of our functions it is; None for others'."""
    path = Path(code.co_filename)
    if path.parent.name not in ("hooks", "monitor") or path.parent.parent.name != "layerwatch":
        return None
    return path.stem, code.co_name, code.co_firstlineno


class Spy:
    """Counts our functions as they are called, and how far from the training; makes one raise."""

    def __init__(self, target: Place | None = None, call: int = 1) -> None:
        self.calls: Counter[Place] = Counter()
        self.depths: dict[Place, int] = {}
        self._target, self._call = target, call
        self._depth = 0
        self.raised = False

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event not in ("call", "return") or (place := place_of(frame.f_code)) is None:
            return
        self._depth += 1 if event == "call" else -1
        if event == "return":
            return
        self.calls[place] += 1
        self.depths[place] = min(self._depth, self.depths.get(place, self._depth))
        if place == self._target and self.calls[place] == self._call:
            self.raised = True
            raise Boom("on purpose")

    def watch(self, *args: Any, **how: Any) -> Watcher:
        """Look on from the end of `watch`."""
        watcher = watch(*args, **how)
        sys.setprofile(self)
        return watcher


# Trainings --------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A bit of everything that is looked at: units, recurrence, attention, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.relu = nn.ReLU()
        self.lstm = nn.LSTM(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.gate = nn.Sigmoid()
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lstm(self.relu(self.first(x)).view(4, -1, 8))[0]
        return self.last(self.gate(self.attention(x, x, x, need_weights=False)[0]))


def optimized(start: Start) -> nn.Module:
    """Clipping, a loss that becomes infinite, a module that comes later."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    watcher = start(model, optimizer) if start else None
    for step in range(6):
        optimizer.zero_grad()
        loss = (model(batch(step, 16)) - 1).square().mean()
        loss.backward()
        clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        if watcher is not None:
            watcher.log(train_loss=loss if step != 3 else torch.tensor(torch.inf))
        if step == 3:
            model.later = nn.Linear(2, 2)
            optimizer.add_param_group({"params": list(model.later.parameters())})
    if watcher is not None:
        watcher.close()
    return model


def scaled(start: Start) -> nn.Module:
    """A loss scaler that skips a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = GradScaler("cpu", init_scale=8.0)
    watcher = start(model, optimizer) if start else None
    for step in range(5):
        optimizer.zero_grad()
        loss = (model(batch(step, 16)) - 1).square().mean() * (torch.inf if step == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    if watcher is not None:
        watcher.close()
    return model


def by_hand(start: Start) -> nn.Module:
    """No torch optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    watcher = start(model, None) if start else None
    for step in range(5):
        (model(batch(step, 16)) - 1).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad  # type: ignore[operator]
                parameter.grad = None
    if watcher is not None:
        watcher.close()
    return model


TRAININGS: dict[str, tuple[Callable[[Start], nn.Module], dict[str, Any]]] = {
    "optimized": (optimized, {"every": 2, "anchors": 2, "step_norms": True}),
    "optimized, auto": (optimized, {"every": "auto", "reference_memory": 64}),
    "scaled": (scaled, {"every": 1}),
    "by hand": (by_hand, {"every": 1}),
}


def run_with(training: Callable[[Start], nn.Module], path: Path, how: dict[str, Any], spy: Spy) -> nn.Module:
    try:
        return training(lambda m, o: spy.watch(m, o, run=path, **how))
    finally:
        sys.setprofile(None)


def complaint(alone: nn.Module, model: nn.Module, path: Path) -> str:
    """What is wrong after a failure; empty when nothing is."""
    truth = alone.state_dict()
    if any(not torch.equal(truth[name], value) for name, value in model.state_dict().items()):
        return "the training is another one"
    if hooks_of(model):
        return "hooks were left behind"
    run = Run(path)
    if run.stats("weight", columns=["step", "tensor", "norm"]).duplicated(["step", "tensor"]).any():
        return "rows are there twice"
    if (run.events()["event"] == "error").sum() > 1:
        return "more than one error was reported"
    return ""


def failing_everywhere(path: Path, name: str, depth: float) -> dict[Place, str]:
    """What goes wrong when functions up to this depth fail, one after the other, at their third call."""
    training, how = TRAININGS[name]
    alone = training(None)
    seen = Spy()
    assert complaint(alone, run_with(training, path / "seen", how, seen), path / "seen") == ""
    wrong = {}
    tried = 0
    for number, (place, calls) in enumerate(seen.calls.items()):
        if place[:2] in FOR_THE_USER | THE_GUARD or seen.depths[place] > depth:
            continue
        tried += 1
        spy, at = Spy(place, min(calls, 3)), path / str(number)
        try:
            found = complaint(alone, run_with(training, at, how, spy), at)
        except Exception as error:
            found = f"{type(error).__name__} reached the training: {error}"
        if found or not spy.raised:
            wrong[place] = found or "was not called again"
    assert tried >= 15
    return wrong


@pytest.mark.parametrize("name", ["optimized", "scaled", "by hand"])
def test_a_failure_where_the_training_enters(tmp_path: Path, name: str) -> None:
    assert failing_everywhere(tmp_path, name, DEPTH) == {}


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", TRAININGS)
def test_a_failure_anywhere(tmp_path: Path, name: str) -> None:
    assert failing_everywhere(tmp_path, name, float("inf")) == {}
