"""The flight recorder: accidents are told in their own step, where they began, and healthy noise is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint
from trainings import batch, column, failures, gradients_of, loss_of, mlp, norm, weights_of

from layerwatch import Run, Watcher, watch
from layerwatch.hooks import scalars as scalars_module
from layerwatch.hooks.jumps import Jumps

BROKEN = 60


def accidents(run: Run) -> list[tuple[int, str]]:
    events = run.events()
    told = events[events["event"] == "accident"]
    return list(zip(told["step"].tolist(), told["message"].tolist(), strict=True))


def training(
    path: Path, model: nn.Module, loss_at: Callable[[int], Tensor], *, steps: int = 40, clip: bool = False,
    every: int | str = 1000, rate: float = 0.01, on_step: Callable[[int, Watcher], object] | None = None,
    **watching: Any,
) -> Run:  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), rate)
    with watch(model, optimizer, run=path, every=every, **watching) as watcher:
        for step in range(steps):
            optimizer.zero_grad()
            loss_at(step).backward()
            if clip:
                clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if on_step is not None:
                on_step(step, watcher)
        assert failures(watcher) == ""
    return Run(path)


def test_the_step_of_an_accident_is_captured_whole_and_so_are_the_next(tmp_path: Path) -> None:
    model = mlp()
    weights, losses = [weights_of(model)], []

    def loss_at(step: int) -> Tensor:
        loss = loss_of(model(batch(step))) * (float("inf") if step == BROKEN else 1.0)
        losses.append(float(loss.detach()))
        return loss

    def seen(step: int, _: Watcher) -> None:
        weights.append(weights_of(model))

    run = training(tmp_path / "run", model, loss_at, steps=75, on_step=seen)
    (step, message), *_ = accidents(run)
    assert (step, len(accidents(run))) == (BROKEN, 1)
    assert message.startswith("the loss is inf: ")
    for name in weights[0]:
        found = column(run, "weight", "norm", name)
        assert sorted(found) == [0, *range(BROKEN, BROKEN + 11), 74]
        # The weights before the step were copied in time: the true update is there.
        before = weights[BROKEN][name]
        update = run.stats("update", name)
        row = update[update["step"] == BROKEN].iloc[0]
        assert row["nans"] + row["infs"] == int((~torch.isfinite(weights[BROKEN + 1][name] - before)).sum())
    written = run.scalars("recorder/loss")
    assert written["step"].tolist() == list(range(BROKEN + 11))
    np.testing.assert_array_equal(written["value"].to_numpy(), np.array(losses[: BROKEN + 11]))
    assert run.scalars("recorder/lr")["value"].tolist() == [0.01] * (BROKEN + 11)
    assert run.scalars("recorder/loss_scale").empty
    (told,) = run.info["accidents"]
    assert (told["step"], told["kind"], told["value"]) == (BROKEN, "nonfinite_loss", None)


def test_the_total_norm_of_clipping_is_kept(tmp_path: Path) -> None:
    model = mlp()
    true = []

    def loss_at(step: int) -> Tensor:
        true.append(0.0)
        return loss_of(model(batch(step))) * (1e4 if step == BROKEN else 1.0)

    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with watch(model, optimizer, run=tmp_path / "run", every=1000):
        for step in range(70):
            optimizer.zero_grad()
            loss_at(step).backward()
            true[step] = sum(norm(g) ** 2 for g in gradients_of(model).values()) ** 0.5
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    run = Run(tmp_path / "run")
    assert {told["kind"] for told in run.info["accidents"]} == {"loss_spike", "gradient_jump"}
    assert {step for step, _ in accidents(run)} == {BROKEN}
    kept = run.scalars("recorder/grad_norm")
    assert kept["step"].tolist() == list(range(70))
    assert kept["value"].tolist() == pytest.approx(true, rel=1e-5)
    gradient = run.stats("gradient", "0.weight")
    assert gradient["stage"].tolist() == ["before_clip"] * len(gradient)  # known before it was clipped
    assert BROKEN in gradient["step"].tolist()


def test_the_buffer_keeps_the_last_200_steps_and_each_is_written_once(tmp_path: Path) -> None:
    model = mlp()

    def loss_at(step: int) -> Tensor:
        return loss_of(model(batch(step % 7))) * (float("nan") if step >= 400 else 1.0)

    run = training(tmp_path / "run", model, loss_at, steps=1500)
    written = run.scalars("recorder/loss")["step"].tolist()
    assert written == sorted(set(written))
    assert written[0] == 400 - 199 or written[0] == 400 - 200
    # 400, then after 100, 200, 400 more: a storm is a few events, however long it goes on.
    assert [step for step, _ in accidents(run)] == [400, 500, 700, 1100]
    captured = run.stats("weight", "0.weight")["step"].tolist()
    assert len(captured) == 2 + 4 * 11 + 1  # 0 and 1000, the accidents with ten steps each, the last


def test_a_loss_that_was_only_logged(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with watch(model, optimizer, run=tmp_path / "run", every=1000) as watcher:
        for step in range(60):
            optimizer.zero_grad()
            grads = torch.autograd.grad(loss_of(model(batch(step))), list(model.parameters()))
            for parameter, gradient in zip(model.parameters(), grads, strict=True):
                parameter.grad = gradient
            optimizer.step()
            watcher.log(train_loss=50.0 if step == 50 else 1.0 + 0.01 * (step % 5))
    run = Run(tmp_path / "run")
    assert [step for step, _ in accidents(run)] == [50]
    assert run.stats("weight", "0.weight")["step"].tolist() == [0, *range(51, 60)]
    assert run.scalars("recorder/loss")["value"].tolist()[50] == 50.0


def test_a_gradient_that_only_a_capture_sees(tmp_path: Path) -> None:
    model = mlp()

    def loss_at(step: int) -> Tensor:
        output = model(batch(step))
        return loss_of(output) + (torch.sqrt(output[0, 0] * 0) if step == 20 else 0.0)

    run = training(tmp_path / "run", model, loss_at, steps=21, every=5)
    ((step, message),) = accidents(run)
    assert step == 20
    assert message.startswith("the gradient norm is ")
    assert "2." in message


# Where it began --------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Three layers; what happens between them is the test's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.factor = 1.0
        self.around: Callable[..., Tensor] = lambda layer, x: layer(x)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.around(self.middle, x) * self.factor)
        return self.last(x)


def first_message(run: Run) -> tuple[str, dict[str, Any]]:
    return accidents(run)[0][1], run.info["accidents"][0]


def test_an_overflow_in_the_middle(tmp_path: Path) -> None:
    model = Net()

    def loss_at(step: int) -> Tensor:
        model.factor = 1e38 if step == 3 else 1.0
        return (model(batch(step)) * 1e3).square().mean()

    message, told = first_message(training(tmp_path / "run", model, loss_at, steps=4, rate=1e-9))
    assert told["layer"] == "last" or told["layer"] == "middle"
    model = Net()
    with torch.no_grad():
        model.middle.bias.fill_(3e38)  # times the factor: infinite after the middle layer

    def overflow(step: int) -> Tensor:
        model.factor = 10.0 if step == 3 else 1e-38
        return model(batch(step)).square().mean()

    message, told = first_message(training(tmp_path / "over", model, overflow, steps=4, rate=0.0))
    assert (told["step"], told["layer"], told["where"]) == (3, "middle", "output")
    assert "layer 'middle' (Linear)" in message


def test_a_logarithm_of_zero_in_the_loss(tmp_path: Path) -> None:
    model = Net()

    def loss_at(step: int) -> Tensor:
        p = torch.softmax(model(batch(step)), -1)
        return -torch.log(p * (0.0 if step == 3 else 1.0)).mean()

    message, told = first_message(training(tmp_path / "run", model, loss_at, steps=4))
    assert (told["layer"], told["where"]) == ("last", "loss")
    assert "logarithm of a number that is not positive after layer 'last'" in message


def test_an_input_that_is_not_finite(tmp_path: Path) -> None:
    model = Net()

    def loss_at(step: int) -> Tensor:
        x = batch(step)
        x[0, 0] = float("nan") if step == 3 else 0.0
        return loss_of(model(x))

    message, told = first_message(training(tmp_path / "run", model, loss_at, steps=4))
    assert (told["layer"], told["where"]) == ("first", "input")
    assert "look at this batch" in message


def test_weights_that_broke_in_an_earlier_step(tmp_path: Path) -> None:
    model = Net()

    def on_step(step: int, _: Watcher) -> None:
        if step == 2:
            with torch.no_grad():
                model.middle.weight[0, 0] = float("nan")

    run = training(tmp_path / "run", model, lambda s: loss_of(model(batch(s))), steps=4, on_step=on_step)
    message, told = first_message(run)
    assert (told["step"], told["layer"], told["where"]) == (3, "middle.weight", "weight")
    assert "not finite already" in message


@pytest.mark.parametrize("clip", [True, False])
def test_a_gradient_that_breaks_in_backward_only(tmp_path: Path, clip: bool) -> None:
    """sqrt at 0: its value is finite, its derivative is not. The layers before it get the damage."""
    model = Net()

    def around(layer: nn.Module, x: Tensor) -> Tensor:
        return torch.sqrt(layer(x).square() * model.factor)

    def loss_at(step: int) -> Tensor:
        model.factor = 0.0 if step == 3 else 1.0
        return loss_of(model(batch(step)))

    model.around = around
    run = training(tmp_path / "run", model, loss_at, steps=5, clip=clip)
    message, told = first_message(run)
    if clip:
        assert (told["step"], told["kind"]) == (3, "nonfinite_gradient")
        assert told["layer"] == "middle.bias"
        assert told["layers"] == ["first.weight", "first.bias", "middle.weight", "middle.bias"]
        assert "from middle.bias back to first.weight" in message
    else:  # nothing was free to see: the weights show it one step later
        assert (told["step"], told["where"]) == (4, "weight")
        assert told["layers"] == ["first.weight", "first.bias", "middle.weight", "middle.bias"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_nothing_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reentrant: bool
) -> None:
    model = Net()
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(torch._C._current_graph_task_id())
        return model.middle(x)

    model.around = lambda _, x: checkpoint(counted, x, use_reentrant=reentrant)

    def loss_at(step: int) -> Tensor:
        model.factor = float("inf") if step == 3 else 1.0
        return loss_of(model(batch(step)))

    message, _ = first_message(training(tmp_path / "run", model, loss_at, steps=4))
    assert message.startswith("the loss is ")
    assert len(calls) == 8  # one forward and one recomputation a step, the latter inside backward
    assert [c == -1 for c in calls] == [True, False] * 4
    if not reentrant:
        assert "checkpointed" in message


def test_packed_tensors_are_left_alone(tmp_path: Path) -> None:
    model = Net()
    unpacked = []

    def unpack(x: Tensor) -> Tensor:
        unpacked.append(torch._C._current_graph_task_id())
        return x

    def loss_at(step: int) -> Tensor:
        model.factor = float("inf") if step == 3 else 1.0
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            return loss_of(model(batch(step)))

    message, _ = first_message(training(tmp_path / "run", model, loss_at, steps=4))
    assert unpacked
    assert -1 not in unpacked
    assert "packed" in message


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model(tmp_path: Path) -> None:
    model = Net()
    fast = torch.compile(model, backend="aot_eager")

    def loss_at(step: int) -> Tensor:
        x = batch(step)
        x[0, 0] = float("inf") if step == 3 else 0.0
        return loss_of(fast(x))

    message, told = first_message(training(tmp_path / "run", model, loss_at, steps=4))
    assert told["step"] == 3
    assert message.startswith("the loss is ")


def test_an_attention_mask_is_no_accident(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(5)

    def loss_at(step: int) -> Tensor:
        x = batch(step, 20).reshape(4, 5, 8)
        out = model(x, x, x, attn_mask=mask, need_weights=False)[0]
        return loss_of(out) / (0.0 if step == 3 else 1.0)

    _, told = first_message(training(tmp_path / "run", model, loss_at, steps=4))
    assert told["where"] == "loss"


# Mixed precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale", [True, False])
def test_what_a_scaler_skips_is_no_accident_a_broken_loss_is(tmp_path: Path, unscale: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    grad_scaler = GradScaler("cpu", init_scale=2.0**10)
    losses, norms = [], []
    with watch(model, optimizer, run=tmp_path / "run", every=1000):
        for step in range(60):
            optimizer.zero_grad()
            loss = loss_of(model(batch(step))) * (float("nan") if step == 50 else 1.0)
            losses.append(float(loss.detach()))
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            norms.append(math.hypot(*(norm(g) for g in grads)))
            grad_scaler.scale(loss).backward()
            if step == 10:  # an overflow of the scaled gradient
                next(model.parameters()).grad[0] = float("inf")  # type: ignore[index]
            if unscale:
                grad_scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 1.0 if unscale else 1e9)
            grad_scaler.step(optimizer)
            grad_scaler.update()
    run = Run(tmp_path / "run")
    events = run.events()
    assert events.loc[events["event"] == "skipped", "step"].tolist() == [10, 50]
    assert [step for step, _ in accidents(run)] == [50]
    np.testing.assert_allclose(run.scalars("recorder/loss")["value"], losses)
    kept = run.scalars("recorder/grad_norm")["value"].to_numpy()
    whole = [i for i in range(60) if i not in (10, 50)]
    np.testing.assert_allclose(kept[whole], np.array(norms)[whole], rtol=1e-4)
    assert run.scalars("recorder/loss_scale")["value"].tolist() == [1024.0] * 11 + [512.0] * 40 + [256.0] * 9


# False alarms -----------------------------------------------------------------------------------------------


def _falling(rng: np.random.Generator, n: int) -> np.ndarray:
    return 2.3 * np.exp(-np.arange(n) / 300) + 0.3


HEALTHY: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "smooth": lambda r, n: _falling(r, n) * (1 + 0.02 * r.standard_normal(n)),
    "noisy": lambda r, n: _falling(r, n) * np.exp(0.3 * r.standard_normal(n)),
    "batches of one": lambda r, n: _falling(r, n) * r.exponential(1, n),
    "log-normal": lambda r, n: _falling(r, n) * np.exp(r.standard_normal(n)),
    "both signs, heavy tails": lambda r, n: r.standard_t(3, n),
    "down to nothing": lambda r, n: (2.3 * np.exp(-np.arange(n) / 200) + 1e-5) * r.exponential(1, n),
    "mostly zero": lambda r, n: np.maximum(0, r.standard_normal(n) - 1),
    "returns": lambda r, n: -np.abs(np.arange(n) * 0.01) * (1 + 0.5 * r.standard_normal(n))
    + 2 * r.standard_normal(n),
    "wandering": lambda r, n: np.exp(np.cumsum(0.03 * r.standard_normal(n)) + 0.1 * r.standard_normal(n)),
    "epochs": lambda r, n: (
        _falling(r, n) * np.exp(r.standard_normal(n) / 10) * (1 + (np.arange(n) % 99 < 5) / 3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEALTHY)
def test_healthy_noise_is_quiet(kind: str) -> None:
    """At most one in ten thousand steps, most series none."""
    hits = 0
    for seed in range(20):
        jumps = Jumps(1.4)
        hits += sum(jumps.add(float(v)) for v in HEALTHY[kind](np.random.default_rng(seed), 2000))
    assert hits <= 4


def test_real_jumps_are_told_at_once() -> None:
    found = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        series = HEALTHY["smooth"](rng, 1000)
        at = int(rng.integers(200, 900))
        series[at] *= 2
        jumps = Jumps(1.4)
        found += [i for i, v in enumerate(series) if jumps.add(float(v))] == [at]
    assert found == 40


def test_the_rule_against_a_slow_twin() -> None:
    """One value after 320 others, in numpy: just below the limit, and just above."""
    rng = np.random.default_rng(0)
    series = np.exp(0.2 * rng.standard_normal(320))
    jumps = Jumps(1.4)
    for value in series:
        assert not jumps.add(float(value))

    def usual(values: np.ndarray) -> float:
        return float(np.sort(values)[len(values) // 2])

    middle = scale = usual(series[-50:])
    excursions = [
        np.arcsinh(v / usual(series[:i][-50:])) - np.arcsinh(1.0)
        for i in range(16, 320, 16)  # the level is renewed after every 16 values
        for v in series[i : i + 16]
    ]
    limit = scale * np.sinh(np.arcsinh(middle / scale) + 2 * max(excursions))
    start = usual(series[:16])
    limit = max(limit, middle + 0.1 * (start - middle))
    assert not jumps.add(float(limit * 0.9))
    jumps = Jumps(1.4)
    for value in series:
        jumps.add(float(value))
    assert jumps.add(float(limit * 1.1))


@pytest.mark.parametrize("kind", ["warm-up", "restarts"])
def test_a_rising_learning_rate_is_no_accident(tmp_path: Path, kind: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    if kind == "warm-up":
        schedule: Any = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, 1.0, 150)
    else:
        schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 60)
    with watch(model, optimizer, run=tmp_path / "run", every=1000):
        for step in range(300):
            optimizer.zero_grad()
            rate = optimizer.param_groups[0]["lr"]
            level = 1 + 5 * rate / 0.05 if kind == "restarts" else 1.0  # the loss goes with the rate
            (loss_of(model(batch(step))) * level).backward()
            optimizer.step()
            schedule.step()
    assert accidents(Run(tmp_path / "run")) == []


def test_a_healthy_gan_and_a_policy_gradient_are_quiet(tmp_path: Path) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        critic = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
        of_g, of_c = (torch.optim.Adam(m.parameters(), 2e-3, (0.5, 0.999)) for m in (generator, critic))
        judge = nn.BCEWithLogitsLoss()
        with watch([generator, critic], [of_g, of_c], run=tmp_path / f"gan{seed}", every=10_000):
            for step in range(400):
                fake = generator(batch(step, 32, 4))
                real = batch(step + 7, 32, 2) * 0.5 + 1
                of_c.zero_grad()
                zeros, ones = torch.zeros(32, 1), torch.ones(32, 1)
                (judge(critic(fake.detach()), zeros) + judge(critic(real), ones)).backward()
                of_c.step()
                of_g.zero_grad()
                judge(critic(fake), ones).backward()
                of_g.step()
        assert accidents(Run(tmp_path / f"gan{seed}")) == []
        policy = nn.Linear(4, 2)
        optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
        with watch(policy, optimizer, run=tmp_path / f"rl{seed}", every=10_000):
            for _ in range(400):
                optimizer.zero_grad()
                chosen = torch.distributions.Categorical(logits=policy(torch.randn(16, 4)))
                action = chosen.sample()
                (-(chosen.log_prob(action) * (action.float() + torch.randn(16))).mean()).backward()
                clip_grad_norm_(policy.parameters(), 0.5)
                optimizer.step()
        assert accidents(Run(tmp_path / f"rl{seed}")) == []


# Accelerators -----------------------------------------------------------------------------------------------


def test_numbers_that_arrive_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: copies arrive two steps after they were started, and nothing waits for them."""
    model = mlp()
    started, waited = [], []

    class Event:
        def __init__(self) -> None:
            self.when = now[0]

        def query(self) -> bool:
            return now[0] >= self.when + 2

        def synchronize(self) -> None:
            waited.append(now[0])

    now = [0]

    def start_copy(value: Tensor) -> tuple[Tensor, Event]:
        started.append(float(value))
        return value.detach().clone(), Event()

    monkeypatch.setattr(scalars_module, "start_copy", start_copy)
    monkeypatch.setattr(
        "layerwatch.hooks.follower.number_in", lambda loss: None if loss is None else loss.detach()
    )

    def loss_at(step: int) -> Tensor:
        now[0] = step
        return loss_of(model(batch(step))) * (float("nan") if step == BROKEN else 1.0)

    run = training(tmp_path / "run", model, loss_at, steps=80)
    assert len(started) == 80
    assert set(waited) <= {79}  # at close only
    ((step, message),) = accidents(run)
    assert step == BROKEN
    assert "seen after its backward pass" in message or "not finite already" in message
    assert run.scalars("recorder/loss")["step"].tolist() == list(range(BROKEN + 11))
    assert BROKEN + 3 in run.stats("weight", "0.weight")["step"].tolist()
