"""When to capture: by a fake clock, and on a real loop."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from trainings import batch, loss_of

from layerwatch import Run, watch
from layerwatch.hooks import cadence as cadence_module
from layerwatch.hooks.cadence import Cadence
from layerwatch.monitor import LogWriter


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


@pytest.mark.parametrize("budget", [0.01, 0.02, 0.1])
@pytest.mark.parametrize("ratio", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("steps", [320, 500, 900])
def test_the_budget_holds_over_some_hundred_steps(
    clock: Clock, budget: float, ratio: float, steps: int
) -> None:
    """Everything counts, the first capture and the hooks of idle steps too."""
    cadence = Cadence("auto", budget)
    captured = clock.training(cadence, steps, 0.1, 0.1 * ratio, hook=2e-5)
    first_two = 2 * ratio / (steps + 2 * ratio)  # cannot be avoided: what a capture costs has to be seen
    assert cadence.overhead <= 1.05 * max(budget, first_two)
    assert len(captured) >= 2


def test_early_steps_are_captured_denser(clock: Clock) -> None:
    cadence = Cadence("auto", 0.02)
    captured = clock.training(cadence, 2000, 0.1, 0.02)
    assert captured[:9] == list(range(9))  # 0.2 steps each: one in ten would keep the budget
    early, late = (sum(a <= s < a + 50 for s in captured) for a in (0, 1500))
    assert early > 2 * late
    gaps = [b - a for a, b in itertools.pairwise(captured[:20])]
    assert gaps == sorted(gaps)


@pytest.mark.parametrize("now", [True, False])
def test_what_matters_is_looked_at_closer_and_paid_back(clock: Clock, now: bool) -> None:
    cadence = Cadence("auto", 0.02)
    clock.training(cadence, 3000, 0.1, 0.02)
    before = cadence.captures
    cadence.look_closer(3000, now=now)
    dense = clock.training(cadence, 40, 0.1, 0.02, first=3000)
    assert set(range(3001, 3011)) <= set(dense)
    assert 3000 in dense or not now
    later = clock.training(cadence, 300, 0.1, 0.02, first=3040)
    assert cadence.captures == before + len(dense) + len(later)
    assert cadence.overhead <= 0.02 * 1.05


def test_looking_closer_does_not_break_the_bank(clock: Clock) -> None:
    """A capture that costs fifty steps: the accident's own step is captured, ten more are not."""
    cadence = Cadence("auto", 0.02)
    clock.training(cadence, 30_000, 0.1, 5.0)
    cadence.look_closer(30_000, now=True)
    assert clock.training(cadence, 300, 0.1, 5.0, first=30_000) == [30_000]


def test_every_nth_and_closer(clock: Clock) -> None:
    cadence = Cadence(100, 0.02)
    cadence.look_closer(150, now=True)
    assert clock.training(cadence, 301, 0.1, 0.1) == [0, 100, *range(150, 161), 200, 300]
    cadence = Cadence(100, 0.02)
    cadence.look_closer(150, now=False)
    assert clock.training(cadence, 301, 0.1, 0.1) == [0, 100, *range(151, 161), 200, 300]


def test_what_came_of_it_is_in_the_log(tmp_path: Path) -> None:
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with watch(model, optimizer, run=tmp_path / "run", every=5):
        for step in range(21):
            loss_of(model(batch(step))).backward()
            optimizer.step()
    run = Run(tmp_path / "run")
    said = run.info["cadence"]
    assert (said["captures"], said["mean_interval"]) == (5, 5.0)
    assert 0 < said["overhead"] < 1
    message = run.events()["message"].iloc[-1]
    assert message.endswith("5 captures, one in 5 steps")


def test_a_new_finding_brings_captures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerwatch.hooks import live

    monkeypatch.setattr(live, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(live, "CHECK_SHARE", 1e9)
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    seen = []
    with watch(model, optimizer, run=tmp_path / "run", every=50, on_finding=lambda f: seen.append(f.problem)):
        for step in range(120):
            loss = loss_of(model(batch(step)))
            if step == 50:
                loss = loss * float("nan")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert "nonfinite" in seen
    captured = Run(tmp_path / "run").stats("gradient", "weight")["step"].tolist()
    assert set(range(50, 61)) <= set(captured)


def test_auto_on_a_real_loop_stays_near_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processor time: what others do on the machine stretches single captures."""
    monkeypatch.setattr(time, "perf_counter", time.thread_time)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    data = batch(0, 4096, 64)
    with watch(model, optimizer, run=tmp_path / "run", every="auto", budget=0.05) as watcher:
        start = time.perf_counter()  # on a new machine the call has compiled
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


# The log as a limit -----------------------------------------------------------------------------------------


def test_what_other_threads_take_counts(clock: Clock) -> None:
    """Compaction beside the training is paid from the same budget."""
    alone, beside = Cadence("auto", 0.02), Cadence("auto", 0.02)
    few: list[int] = []
    captured = clock.training(alone, 4000, 0.01, 0.002)
    assert alone.overhead == pytest.approx(0.02, rel=0.1)
    total = 0.0
    for number in range(4000):
        if beside.wants(number):
            total += 0.006  # for each capture three times what it took itself
            beside.worked_beside(total)
        few += clock.training(beside, 1, 0.01, 0.002, first=number)
    assert beside.overhead == pytest.approx(0.02, rel=0.1)
    assert len(captured) / len(few) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("every", [1, "auto"])
def test_steps_for_which_the_log_has_no_room_are_not_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | str
) -> None:
    """They cost nothing: no copy of a weight, no hook on a module."""
    asked: list[int] = []

    def has_room(self: LogWriter, step: int) -> bool:
        asked.append(step)
        return not 4 <= step <= 9

    monkeypatch.setattr(LogWriter, "has_room", has_room)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    hooked = {}
    with watch(model, optimizer, run=tmp_path / "run", every=every, budget=0.9) as watcher:
        for _ in range(14):
            loss = model(torch.randn(4, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            hooked[watcher.step + 1] = bool(model[0]._forward_hooks)
    run = Run(tmp_path / "run")
    for kind in ("weight", "gradient", "update", "activation"):
        steps = set(run.stats(kind)["step"])
        assert not steps & set(range(4, 10)), kind
        assert {0, 1, 2, 3, 10} <= steps or every == "auto", kind
    assert not any(hooked[step] for step in range(4, 10))
    assert set(range(4, 10)) <= set(asked)
