"""When to capture: by a fake clock, and on a real loop."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn
from trainings import batch, loss_of

from layerwatch import Run, watch
from layerwatch.hooks import cadence as cadence_module
from layerwatch.hooks.cadence import Cadence


class Clock:
    """Time passes when we say so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(cadence_module.time, "perf_counter", lambda: self.now)

    def training(
        self, cadence: Cadence, steps: int, step: float, costs: list[float] | float,
        hook: float = 0.0, first: int = 0,
    ) -> list[int]:  # fmt: skip
        """Steps take `step`, captures `costs` (the last goes on), hooks `hook` seconds; what is captured."""
        queue = list(costs) if isinstance(costs, list) else [costs]
        captured = []
        for number in range(first, first + steps):
            self.now += step
            cadence.enter()
            self.now += hook
            if cadence.wants(number):
                cost = queue.pop(0) if len(queue) > 1 else queue[0]
                self.now += cost
                cadence.captured(number, cost)
                captured.append(number)
            cadence.leave()
        return captured


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("every", [1, 2, 7])
def test_every_nth(clock: Clock, every: int) -> None:
    cadence = Cadence(every, 0.02)
    assert clock.training(cadence, 30, 0.01, 5.0) == list(range(0, 30, every))


@pytest.mark.parametrize("budget", [0.005, 0.02, 0.1])
@pytest.mark.parametrize("ratio", [0.1, 1.0, 20.0])
def test_auto_keeps_the_budget_and_uses_it(clock: Clock, budget: float, ratio: float) -> None:
    step = 0.01
    steps = int(200 * max(1.0, ratio / budget))
    cadence = Cadence("auto", budget)
    captured = clock.training(cadence, steps, step, ratio * step)
    share = len(captured) * ratio / (len(captured) * ratio + steps)
    assert share <= budget * 1.1
    assert share >= budget * 0.45  # the interval is a whole number of steps
    assert cadence.overhead == pytest.approx(share, rel=0.05)
    assert captured[0] == 0


def test_an_expensive_first_capture_does_not_end_the_monitoring(clock: Clock) -> None:
    """Caches are cold, kernels are loaded: the first one may take a hundred times longer."""
    cadence = Cadence("auto", 0.02)
    captured = clock.training(cadence, 20_000, 0.001, [5.0, 0.02, 0.002])
    assert len(captured) > 12
    assert captured[-1] > 15_000


def test_a_pause_is_paid_back(clock: Clock) -> None:
    cadence = Cadence("auto", 0.02)
    first = clock.training(cadence, 2000, 0.01, 0.01)
    clock.now += 3600  # a validation, or a notebook left alone
    spent = cadence.overhead
    second = clock.training(cadence, 2000, 0.01, 0.01, first=2000)
    assert spent < 0.02
    assert len(second) <= 4 * len(first)


def test_cheaper_training_captures_less_often(clock: Clock) -> None:
    slow, fast = (clock.training(Cadence("auto", 0.02), 3000, step, 0.01) for step in (0.1, 0.01))
    assert len(slow) > 3 * len(fast)


def test_the_cost_of_uncaptured_hooks_is_counted(clock: Clock) -> None:
    cadence = Cadence("auto", 0.02)
    clock.training(cadence, 3000, 0.01, 0.01, hook=0.001)
    assert cadence.overhead > 0.09


@pytest.mark.parametrize("every", [0, -1, True, False, 1.5, "often", None, "10"])
def test_a_bad_interval_is_one_clear_line(every: object) -> None:
    with pytest.raises(ValueError, match=r'expected every="auto" or a whole number of steps') as caught:
        Cadence(every, 0.02)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("budget", [0, 1, -0.1, 1.5, float("nan"), float("inf"), True, "2%", None])
def test_a_bad_budget_is_one_clear_line(budget: object) -> None:
    with pytest.raises((ValueError, TypeError), match="expected a budget between 0 and 1") as caught:
        Cadence("auto", budget)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_auto_on_a_real_loop_stays_near_its_budget(tmp_path: Path) -> None:
    """Lenient: a loaded machine stretches single captures."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    data = batch(0, 512, 64)
    start = time.perf_counter()
    with watch(model, optimizer, run=tmp_path / "run", every="auto", budget=0.05) as watcher:
        while time.perf_counter() - start < 4.0:
            loss_of(model(data)).backward()
            optimizer.step()
            optimizer.zero_grad()
        overhead, steps = watcher._cadence.overhead, watcher.step
    run = Run(tmp_path / "run")
    captures = run.stats("gradient", "0.weight")["step"]
    assert 5 < len(captures) < steps / 5
    assert captures.iloc[-1] > steps / 2
    assert overhead < 0.10
    assert run.scalars("overhead")["value"].iloc[-1] == pytest.approx(overhead, abs=0.05)
