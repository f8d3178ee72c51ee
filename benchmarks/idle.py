"""What watching costs a step that is not captured: at most 20 microseconds, plus 20 nanoseconds per tensor.

    python benchmarks/idle.py [--rounds 300]

One model whose hooks are attached and detached in turn, short blocks of steps interleaved in random order,
one thread, process CPU time. Of each kind the tenth part with the fastest blocks counts: on a machine that
does other work too, the rest measures that work. "A/A" compares detached with detached: what it shows is
noise. A step calls backward (which reaches one tensor) and an optimizer that owns all tensors and changes
none: a whole step of the 402-tensor mlp would be noisier than what is measured here.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwatch import Watcher, watch

KINDS = ("detached", "control", "attached")
LIMIT, LIMIT_PER_TENSOR = 20e-6, 20e-9


def trivial() -> nn.Module:
    return nn.Linear(1, 1)


def small_mlp() -> nn.Module:
    return nn.Sequential(*[m for _ in range(201) for m in (nn.Linear(64, 64), nn.ReLU())])


class Still(torch.optim.Optimizer):
    """Hooks and nothing else."""

    def step(self, closure: Any = None) -> Any:
        """Change nothing."""


def steps_of(model: nn.Module, optimizer: Still, *, clip: bool) -> Callable[[], None]:
    """One training step."""
    parameters = list(model.parameters())
    first = parameters[0]

    def step() -> None:
        first.sum().backward()
        if clip:
            nn.utils.clip_grad_norm_(first, 1.0)
        optimizer.step()

    return step


def measure(build: Callable[[], nn.Module], rounds: int, block: int, *, clip: bool) -> dict[str, float]:
    """Seconds per step: detached, and what each kind adds."""
    torch.manual_seed(0)
    model = build()
    optimizer = Still(model.parameters(), {"lr": 0.1})
    step = steps_of(model, optimizer, clip=clip)
    with tempfile.TemporaryDirectory() as folder:
        watcher: Watcher = watch(model, optimizer, run=Path(folder) / "run", every=10**9)
        step()
        watcher._detach()
        taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for round_ in range(rounds):
            for kind in random.Random(round_).sample(KINDS, len(KINDS)):
                if kind == "attached":
                    watcher._attach()
                step()
                start = time.process_time()
                for _ in range(block):
                    step()
                taken[kind].append((time.process_time() - start) / block)
                if kind == "attached":
                    watcher._detach()
        assert not (Path(folder) / "run" / "errors.log").exists()
        watcher.close()
    fast = {kind: statistics.mean(sorted(each)[: max(1, rounds // 10)]) for kind, each in taken.items()}
    return {kind: each - fast["detached"] * (kind != "detached") for kind, each in fast.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=300, help="blocks of each kind (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'model':28}{'tensors':>8}{'step':>11}{'idle':>9}{'A/A':>9}{'limit':>9}")
    for name, build, block in (("trivial", trivial, 20), ("mlp", small_mlp, 20)):
        tensors = sum(1 for _ in build().parameters())
        for clip in (False, True):
            found = measure(build, options.rounds, block, clip=clip)
            limit = LIMIT + tensors * LIMIT_PER_TENSOR
            cells = [found["detached"], found["attached"], found["control"], limit]
            print(
                f"{name + (' with clip_grad_norm_' if clip else ''):28}{tensors:8}"
                + "".join(f"{1e6 * c:{w}.1f}us" for c, w in zip(cells, (9, 7, 7, 7), strict=True)),
                flush=True,
            )


if __name__ == "__main__":
    main()
