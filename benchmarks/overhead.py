"""What watching costs: a captured step, and one that is not captured, as shares of a step without layerwatch.

    python benchmarks/overhead.py [--rounds 6] [--models cnn gpt mlp]

One model each, with the hooks attached and detached in turn (two models built alike differ by up to 10 %),
all kinds of steps interleaved, one thread, process CPU time, medians of the differences within a round. "A/A"
compares detached steps with detached ones: what it shows is noise. "compaction" is the work that turns the
log into Parquet, which a background thread does while the training runs, per capture.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from layerwatch import Watcher, watch

KINDS = ("detached", "control", "idle", "capture", "no activations")


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


def resnet18() -> nn.Module:
    """With the stem for 32 x 32 images: 11.17 million parameters in 62 tensors."""
    widths = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [b for i, o, s in widths for b in (Block(i, o, s), Block(o, o, 1))]
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
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
    "gpt": Case(GPT, lambda: torch.randint(0, 128, (4, 128)), lambda: torch.randint(0, 128, (4, 128))),
    "mlp": Case(small_mlp, lambda: torch.randn(256, 64), lambda: torch.randint(0, 64, (256,))),
}


class Subject:
    """One model under watch, whose hooks we attach, detach and arm between the steps that are timed."""

    def __init__(self, case: Case, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = case.build()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        self.x, self.y = case.inputs(), case.targets()
        self.watcher: Watcher = watch(self.model, self.optimizer, run=folder / "run", every=1)
        self.capturing = True
        self.watcher._cadence.wants = lambda step: self.capturing  # type: ignore[method-assign]

    def step(self) -> float:
        """CPU seconds of one training step, with whatever is attached."""
        start = time.process_time()
        nn.functional.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start

    def timed(self, kind: str) -> float:
        """One step of this kind."""
        watcher, tap = self.watcher, self.watcher._capture.tap
        watcher._detach()
        self.capturing = kind in ("capture", "no activations")
        if kind not in ("detached", "control"):
            watcher._attach()
        if kind == "no activations":
            tap.disarm()
        return self.step()


def measure(case: Case, rounds: int) -> tuple[float, dict[str, float], float, int]:
    """CPU seconds: a detached step, what each kind of step adds, compaction per capture; parameters."""
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(case, Path(folder))
        for kind in ("capture", "idle", "detached"):
            subject.timed(kind)  # warm up
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for round_ in range(rounds):
            for kind in random.Random(round_).sample(KINDS, len(KINDS)):
                seconds[kind].append(subject.timed(kind))
        start = time.process_time()
        subject.watcher.close()
        compaction = (time.process_time() - start) / (2 * rounds + 1)
        assert not (Path(folder) / "run" / "errors.log").exists()
        parameters = sum(p.numel() for p in subject.model.parameters())
    plain = seconds["detached"]
    extra = {
        kind: statistics.median(a - b for a, b in zip(taken, plain, strict=True))
        for kind, taken in seconds.items()
    }
    return statistics.median(plain), extra, compaction, parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=6, help="steps of each kind (default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = (
        "model",
        "parameters",
        "step",
        "capture",
        "no activations",
        "compaction",
        "idle",
        "A/A",
        "auto",
    )
    widths = (6, 12, 9, 19, 19, 12, 8, 8, 6)
    print(
        "".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True)) + "  (every so many steps at 2 %)"
    )
    for name in options.models:
        step, extra, compaction, parameters = measure(CASES[name], options.rounds)
        both = [f"{1e3 * extra[k]:.1f} ms {extra[k] / step:7.1%}" for k in ("capture", "no activations")]
        shares = [f"{extra[k] / step:.1%}" for k in ("idle", "control")]
        every = max(1.0, (extra["capture"] + compaction) / step / 0.02)
        cells = [
            name,
            f"{parameters:,}",
            f"{1e3 * step:.0f} ms",
            *both,
            f"{1e3 * compaction:.1f} ms",
            *shares,
        ]
        print("".join(f"{c:>{w}}" for c, w in zip([*cells, f"{every:.0f}"], widths, strict=True)), flush=True)


if __name__ == "__main__":
    main()
