"""What a capture costs: against a step, against the floor, and against wandb and TensorBoard beside us.

    python benchmarks/overhead.py [--rounds 10] [--models cnn cnn_inet gpt mlp] [--no-peers]

One model each, with the hooks attached and detached in turn (two models built alike differ by up to 10 %),
all kinds of steps interleaved, one thread, medians of the differences within a round. "A/A" compares detached
steps with detached ones: what it shows is noise.

floor: one sum over every weight and every gradient, which reads them once and computes nothing else.
capture: weights, gradients, true updates and drift of every tensor, written to the log. all: with the outputs
of leaf modules. inside: the CPU time in the hooks of a capture: the noise of a long step does not touch it,
but the caches that it leaves cold are not in it. state: what optimizer state adds to every tenth capture.
compaction: what a background thread does later to turn the log into Parquet, per capture.
wandb: `wandb.watch(log="all", log_freq=1)`, offline; its service process is counted.
TensorBoard: `add_histogram` of every weight and every gradient.
auto: the cadence and the overhead that every="auto" comes to after --steps, as the log states them. The first
300 steps pay for the dense captures at the beginning.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwatch import Run, Watcher, watch
from layerwatch.hooks import optimizer_state

KINDS = ("detached", "control", "capture", "all", "wandb", "tensorboard")


class Block(nn.Module):
    """The basic block of ResNet-18."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        same = stride == 1 and channels == out
        shortcut = (nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Identity() if same else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def resnet18(imagenet: bool = False) -> nn.Module:
    """11.17 million parameters in 62 tensors; the stem for 32 x 32 images, or ImageNet's: cheap steps."""
    widths = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [b for i, o, s in widths for b in (Block(i, o, s), Block(o, o, 1))]
    stem: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    if imagenet:
        stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class GPT(nn.Module):
    """6 layers of width 384: 10.7 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 384)
        layer = nn.TransformerEncoderLayer(384, 6, 4 * 384, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(384, 128, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(128))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x), mask=self.mask, is_causal=True)).transpose(1, 2)


def small_mlp() -> nn.Module:
    """201 linear layers of 64 x 64: nothing but small tensors, the hard case for a cost per tensor."""
    return nn.Sequential(*[m for _ in range(201) for m in (nn.Linear(64, 64), nn.ReLU())])


@dataclass(frozen=True)
class Case:
    """A model and its batch."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    targets: Callable[[], Tensor]


CASES = {
    "cnn": Case(resnet18, lambda: torch.randn(16, 3, 32, 32), lambda: torch.randint(0, 10, (16,))),
    "cnn_inet": Case(
        lambda: resnet18(imagenet=True),
        lambda: torch.randn(16, 3, 32, 32),
        lambda: torch.randint(0, 10, (16,)),
    ),
    "gpt": Case(GPT, lambda: torch.randint(0, 128, (4, 128)), lambda: torch.randint(0, 128, (4, 128))),
    "mlp": Case(small_mlp, lambda: torch.randn(256, 64), lambda: torch.randint(0, 64, (256,))),
}


class Subject:
    """One model under watch, whose hooks we attach, detach and arm between the steps that are timed."""

    def __init__(self, case: Case, folder: Path, *, peers: bool) -> None:
        torch.manual_seed(0)
        self.model = case.build()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        self.x, self.y = case.inputs(), case.targets()
        self.peers = Peers(self.model, folder) if peers else None
        self.watcher: Watcher = watch(self.model, self.optimizer, run=folder / "run", every=1)
        self.follower = self.watcher._follower
        self.capturing = True
        self.follower._cadence.wants = lambda step: self.capturing  # type: ignore[method-assign]
        self.watcher._detach()
        self.inside = 0.0  # CPU seconds in the hooks of the last step
        for name in ("before_step", "after_step", "complete"):
            setattr(self.follower.capture, name, self._timing(getattr(self.follower.capture, name)))

    def _timing(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return hook(*args, **kwargs)
            finally:
                self.inside += time.process_time() - start

        return timed

    def step(self, before_step: Callable[[], None] | None = None) -> Cost:
        """One training step, with whatever is attached."""
        start = Cost.now()
        nn.functional.cross_entropy(self.model(self.x), self.y).backward()
        if before_step is not None:
            before_step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Cost.now() - start

    def timed(self, kind: str) -> Cost:
        """One step of this kind."""
        if self.peers is not None and kind in ("wandb", "tensorboard"):
            start = time.process_time()
            if kind == "wandb":
                with self.peers.wandb():
                    cost = self.step(self.peers.wandb_log)
            else:
                cost = self.step(self.peers.tensorboard)
            rest()
            return Cost(time.process_time() - start, cost.wall)
        self.capturing, self.inside = kind in ("capture", "all"), 0.0
        if self.capturing:
            self.follower.attach()
        if kind == "capture":
            self.follower.capture.tap.disarm()
        try:
            return self.step()
        finally:
            if self.capturing:
                self.follower.detach()

    def optimizer_state(self) -> float:
        """CPU seconds that its summaries take; the best of some."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        best = math.inf
        for _ in range(5):
            start = time.process_time()
            optimizer_state.summaries(self.optimizer, names)
            best = min(best, time.process_time() - start)
        return best

    def floor(self) -> float:
        """CPU seconds of one sum over each weight and each gradient; the best of some."""
        nn.functional.cross_entropy(self.model(self.x), self.y).backward()
        parameters = [p.detach() for p in self.model.parameters()]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        best = min(_sums(parameters, gradients) for _ in range(15))
        self.optimizer.zero_grad()
        return best


def rest() -> None:
    """Until no thread of this process works any more: what peers do in the background is theirs."""
    while True:
        start = time.process_time()
        time.sleep(0.1)
        if time.process_time() - start < 1e-3:
            return


def _sums(*tensors: list[Tensor]) -> float:
    start = time.process_time()
    for each in tensors:
        for tensor in each:
            tensor.sum()
    return time.process_time() - start


@dataclass(frozen=True)
class Cost:
    """Seconds."""

    cpu: float
    wall: float

    @classmethod
    def now(cls) -> Cost:
        return cls(time.process_time(), time.perf_counter())

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.cpu - other.cpu, self.wall - other.wall)


class Peers:
    """wandb, offline, and TensorBoard, in this process."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        import wandb
        from torch.utils.tensorboard.writer import SummaryWriter

        self._model = model
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
        self._run = wandb.init(project="overhead", mode="offline", dir=folder, settings=settings)
        self._writer = SummaryWriter(folder / "tensorboard")
        self._step = 0
        self._steps = 0
        self._served = self._service_seconds()

    def _service_seconds(self) -> float:
        """CPU seconds of wandb's own process, once it rests."""
        import psutil

        children = psutil.Process().children(recursive=True)
        now = -1.0
        while True:
            before, now = now, sum(sum(c.cpu_times()[:2]) for c in children)
            if now == before:
                return now
            time.sleep(0.5)

    @contextlib.contextmanager
    def wandb(self) -> Iterator[None]:
        """Watched by wandb."""
        self._steps += 1
        self._run.watch(self._model, log="all", log_freq=1)
        try:
            yield
        finally:
            self._run.unwatch(self._model)

    def wandb_log(self) -> None:
        """What the user's loop does: it sends the histograms as well."""
        self._run.log({"loss": 0.0})

    @property
    def wandb_service(self) -> float:
        """CPU seconds of wandb's own process for each step that was logged."""
        return (self._service_seconds() - self._served) / max(self._steps, 1)

    def tensorboard(self) -> None:
        """The loop that its users write."""
        self._step += 1
        for name, parameter in self._model.named_parameters():
            self._writer.add_histogram(name, parameter, self._step)
            if parameter.grad is not None:
                self._writer.add_histogram(name + ".grad", parameter.grad, self._step)

    def close(self) -> None:
        self._writer.close()
        self._run.finish()


def measure(case: Case, rounds: int, *, peers: bool) -> dict[str, Cost | float]:
    """Seconds: a detached step, the floor, and what each kind of step adds."""
    kinds = KINDS if peers else KINDS[:4]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        subject = Subject(case, Path(folder), peers=peers)
        for kind in reversed(kinds):
            subject.timed(kind)  # warm up
        taken: dict[str, list[Cost]] = {kind: [] for kind in kinds}
        inside = []
        for round_ in range(rounds):
            for kind in random.Random(round_).sample(kinds, len(kinds)):
                taken[kind].append(subject.timed(kind))
                inside += [subject.inside] if kind == "capture" else []
        found: dict[str, Cost | float] = {"floor": subject.floor(), "state": subject.optimizer_state()}
        found["inside"] = statistics.median(inside)
        if subject.peers is not None:
            found["service"] = subject.peers.wandb_service
            subject.peers.close()
        start = time.process_time()
        subject.watcher.close()
        found["compaction"] = (time.process_time() - start) / (2 * rounds + 2)
        assert not (Path(folder) / "run" / "errors.log").exists()
    plain = taken["detached"]
    for kind in kinds:
        extra = [a - b for a, b in zip(taken[kind], plain, strict=True)] if kind != "detached" else plain
        found[kind] = Cost(statistics.median(e.cpu for e in extra), statistics.median(e.wall for e in extra))
    return found


def automatic(case: Case, steps: int) -> tuple[float, float]:
    """The mean interval between captures, and the share of time that monitoring took."""
    torch.manual_seed(0)
    model = case.build()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    x, y = case.inputs(), case.targets()
    with tempfile.TemporaryDirectory() as folder:
        watcher = watch(model, optimizer, run=Path(folder) / "run")
        for _ in range(steps):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        watcher.close()
        cadence = Run(Path(folder) / "run").info["cadence"]
        return cadence["mean_interval"], cadence["overhead"]


def report(name: str, found: dict[str, Cost | float]) -> None:
    """One model's lines."""
    costs = {k: v for k, v in found.items() if isinstance(v, Cost)}
    floor, service = float(found["floor"]), float(found.get("service", 0.0))  # type: ignore[arg-type]
    step, ours = costs["detached"], costs["capture"].cpu
    print(f"{name}: step {1e3 * step.cpu:.0f} ms, A/A {costs['control'].cpu / step.cpu:+.1%}")
    print(f"  floor        {1e3 * floor:8.1f} ms")
    for kind in ("capture", "all", "wandb", "tensorboard"):
        if kind not in costs:
            continue
        cpu = costs[kind].cpu + (service if kind == "wandb" else 0.0)
        print(
            f"  {kind:12} {1e3 * cpu:8.1f} ms CPU, {1e3 * costs[kind].wall:8.1f} ms wall, "
            f"{cpu / step.cpu:7.1%} of a step, {cpu / floor:6.1f} x floor, {cpu / ours:6.1f} x capture",
            flush=True,
        )
    for kind in ("inside", "state", "compaction"):
        seconds = float(found[kind])  # type: ignore[arg-type]
        print(f"  {kind:12} {1e3 * seconds:8.1f} ms, {seconds / floor:6.1f} x floor", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="steps of each kind, 0: none (%(default)s)")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--no-peers", action="store_true", help="without wandb and TensorBoard")
    parser.add_argument("--steps", type=int, default=400, help="of every=auto, 0: none (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        if options.rounds:
            report(name, measure(CASES[name], options.rounds, peers=not options.no_peers))
        if options.steps:
            interval, share = automatic(CASES[name], options.steps)
            text = f"{options.steps} steps, one in {interval:.0f} captured, {share:.2%} of the time"
            print(f"  auto         {text}", flush=True)


if __name__ == "__main__":
    main()
