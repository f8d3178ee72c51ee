"""The training is judged while it runs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layerwatch import Finding, Run, StopTraining, watch
from layerwatch.hooks import cadence, live
from layerwatch.hooks.live import LiveCheck
from tests.dashboard.tiny import batch, mlp
from tests.prefixes import captures_until, first_alarms, judged_prefixes

STEPS = 80


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every capture is judged, whatever that costs."""
    monkeypatch.setattr(live, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(live, "CHECK_SHARE", float("inf"))


def train(
    folder: Path, lr: float = 0.1, steps: int = STEPS, *, break_at: int = -1, **options: Any
) -> list[float]:
    """A classifier; its losses. At `break_at` the loss is not a number any more."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net, generator, losses = mlp(nn.ReLU, 3), torch.Generator().manual_seed(0), []
    optimizer = torch.optim.SGD(net.parameters(), lr)
    with watch(net, optimizer, run=folder, **{"every": 5, **options}) as watcher:
        for step in range(steps):
            x, y = batch(32, generator)
            loss = nn.functional.cross_entropy(net(x), y) * (float("nan") if step == break_at else 1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watcher.log(train_loss=loss)
            losses.append(float(loss.detach()))
    return losses


def marks(folder: Path, event: str = "finding") -> list[tuple[int, str]]:
    frame = Run(folder).events()
    return [
        (s, m) for s, e, m in zip(frame["step"], frame["event"], frame["message"], strict=True) if e == event
    ]


@pytest.mark.usefixtures("at_once")
def test_a_new_problem_is_told_once_in_three_ways(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found: list[Finding] = []
    train(tmp_path / "run", break_at=42, on_finding=found.append)
    of_nan = [f for f in found if f.problem == "nonfinite"]
    assert [f.severity for f in of_nan] == ["critical"]
    lines = [r.getMessage() for r in caplog.records if "nonfinite" in r.getMessage()]
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert lines[0].startswith(f"{tmp_path / 'run'}, step 4")
    (mark,) = [(step, message) for step, message in marks(tmp_path / "run") if "nonfinite" in message]
    assert 42 <= mark[0] <= 50  # when it was noticed, not when it began
    assert mark[1].startswith("critical: nonfinite since step 42")
    assert mark[1] in lines[0]


@pytest.mark.usefixtures("at_once")
def test_a_healthy_training_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found: list[Finding] = []
    train(tmp_path / "run", on_finding=found.append)
    assert [f for f in found if f.alarm] == []
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("wanted", [True, False])
def test_without_a_callback(tmp_path: Path, caplog: pytest.LogCaptureFixture, wanted: bool) -> None:
    train(tmp_path / "run", break_at=20, live=wanted)
    assert bool(marks(tmp_path / "run")) == wanted
    assert any("nonfinite" in r.getMessage() for r in caplog.records) == wanted


def test_a_short_training_is_judged_at_its_end_when_somebody_listens(tmp_path: Path) -> None:
    found: list[Finding] = []
    train(tmp_path / "heard", break_at=20, on_finding=found.append)
    assert found
    assert {s for s, _ in marks(tmp_path / "heard")} == {STEPS - 1}
    train(tmp_path / "alone", break_at=20)
    assert marks(tmp_path / "alone") == []


@pytest.mark.usefixtures("at_once")
def test_a_callback_that_fails_is_not_called_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def angry(finding: Finding) -> None:
        calls.append(finding)
        raise ValueError("on purpose")

    losses = train(tmp_path / "run", lr=60.0, break_at=70, on_finding=angry)
    assert len(losses) == STEPS
    assert len(calls) == 1
    assert len([r for r in caplog.records if "on_finding failed" in r.getMessage()]) == 1
    assert len(marks(tmp_path / "run")) > 1  # it is judged on


@pytest.mark.usefixtures("at_once")
def test_stop_training_ends_the_loop_and_the_log_says_why(tmp_path: Path) -> None:
    def stop(finding: Finding) -> None:
        if finding.severity == "critical":
            raise StopTraining("that is enough")

    with pytest.raises(StopTraining, match="that is enough"):
        train(tmp_path / "run", break_at=40, on_finding=stop)
    run = Run(tmp_path / "run")
    assert run.info["closed"]
    assert run.events()["event"].iloc[-1] == "close"
    ((step, why),) = marks(tmp_path / "run", "stop")
    assert "StopTraining at nonfinite: that is enough" in why
    assert 40 <= step == run.last_step < STEPS - 1


CHILD = """
import torch
from torch import nn
from layerwatch import StopTraining, watch
from layerwatch.hooks import live
live.CHECK_SECONDS, live.CHECK_SHARE = 0.0, float("inf")

def stop(finding):
    if finding.severity == "critical":
        raise StopTraining(finding.problem)

torch.manual_seed(0)
net = nn.Linear(4, 2)
optimizer = torch.optim.SGD(net.parameters(), 0.01)
watcher = watch(net, optimizer, run="run", every=1, on_finding=stop)
for step in range(1000):
    loss = (net(torch.randn(8, 4)) - 1).square().mean() * (float("nan") if step == 30 else 1.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    watcher.log(train_loss=loss)
"""


def test_stop_training_in_a_program_that_does_not_expect_it(tmp_path: Path, checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "StopTraining: nonfinite" in done.stderr
    assert "critical: nonfinite since step 30" in done.stderr  # visible without any configuration
    run = Run(tmp_path / "run")
    assert run.info["closed"]
    assert 30 <= run.last_step <= 33
    assert run.events()["event"].iloc[-2:].tolist() == ["stop", "close"]


class Script:
    """Findings by look, as a growing run would have them."""

    def __init__(self, looks: list[list[str]]) -> None:
        self.looks = iter(looks)

    def find(self) -> tuple[list[Finding], list[str]]:
        severities = {"i": "info", "w": "warning", "c": "critical"}
        return [
            Finding("run", name[2:], severities[name[0]], (), 3, 9, "One sentence.")  # type: ignore[arg-type]
            for name in next(self.looks)
        ], []


class Events:
    """What a log is asked to write."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str, str]] = []

    def event(self, *row: Any) -> None:
        self.rows.append(row)


def test_what_is_news() -> None:
    """New, or worse than ever before; not what comes back."""
    told: list[tuple[str, str]] = []
    events = Events()
    tell: Callable[[Finding], None] = lambda f: told.append((f.problem, f.severity))  # noqa: E731
    check = LiveCheck(Path(), "run", events, tell, wanted=True)  # type: ignore[arg-type]
    looks = [["i a"], ["w a", "w b"], ["w b"], ["w a", "c b"], [], ["c a", "w b"]]
    check._growing = Script(looks)  # type: ignore[assignment]
    news = [check._report(step) for step in range(len(looks))]
    assert told == [("a", "info"), ("a", "warning"), ("b", "warning"), ("b", "critical"), ("a", "critical")]
    assert news == [True, True, False, True, False, True]
    assert [row[:2] for row in events.rows] == [(s, "finding") for s in (0, 1, 1, 3, 5)]


def test_judging_takes_its_share_of_the_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(live, "CHECK_SHARE", 0.2)
    clock = [0.0]
    monkeypatch.setattr(live.time, "perf_counter", lambda: clock[0])
    check = LiveCheck(tmp_path, "run", Events(), None, wanted=True)  # type: ignore[arg-type]

    class Slow:
        def find(self) -> tuple[list[Finding], list[str]]:
            clock[0] += 3.0
            return [], []

    check._growing = Slow()  # type: ignore[assignment]
    while clock[0] < 1000:
        clock[0] += 0.5
        check.report_if_due(0)
    assert 0.1 < check.seconds / clock[0] <= 0.2
    assert check.looks > 10


def test_judging_takes_no_captures_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its share is its own: two trainings have as many captures, one of them judged for long."""
    captured: list[list[int]] = []
    for judging in (0.0, 5.0):
        clock = [0.0]
        monkeypatch.setattr(cadence.time, "perf_counter", lambda clock=clock: clock[0])
        plan = cadence.Cadence("auto", 0.02)
        captured.append([])
        for step in range(3000):
            clock[0] += 0.01
            if plan.wants(step):
                plan.enter()
                clock[0] += 0.002
                if step > 100 and len(captured[-1]) % 5 == 0:
                    clock[0] += judging
                    plan.judged(judging)
                plan.captured(step, 0.002)
                plan.leave()
                captured[-1].append(step)
    assert len(captured[0]) > 100
    assert len(captured[1]) == pytest.approx(len(captured[0]), rel=0.02)  # rounding may shift one by a step


# ---- prefixes: what a look in the middle of a training would have said


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("prefixes") / "healthy"
    train(folder, steps=400, every=2)
    return Run(folder)


def test_a_healthy_training_is_healthy_at_every_moment(healthy: Run) -> None:
    looks = list(judged_prefixes(healthy, 5))
    assert len(looks) == 40
    assert [(step, f.problem) for step, found, _ in looks for f in found if f.alarm] == []


def test_the_last_prefix_is_the_run(healthy: Run) -> None:
    *_, (step, found, _) = judged_prefixes(healthy)
    assert step == healthy.last_step
    assert [f.to_dict() for f in found] == [f.to_dict() for f in healthy.findings()]


def test_a_fault_is_noticed_soon_and_dated_right(tmp_path: Path) -> None:
    """The learning rate rises a thousandfold at step 200."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net, generator = mlp(nn.ReLU, 3), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with watch(net, optimizer, run=tmp_path / "run", every=2) as watcher:
        for step in range(300):
            if step == 200:
                optimizer.param_groups[0]["lr"] = 100.0
            x, y = batch(32, generator)
            loss = nn.functional.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watcher.log(train_loss=loss)
    run = Run(tmp_path / "run")
    alarms = first_alarms(run, 10)
    step, finding = min(alarms.values(), key=lambda alarm: alarm[0])
    assert captures_until(run, step) <= captures_until(run, 200) + 20
    assert 198 <= finding.first_step <= 204
