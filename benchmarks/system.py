"""What system metrics cost: one reading of the machine, and a training beside which it is read.

    python benchmarks/system.py [--rounds 40]

The training is watched once without and once with the thread that reads the machine, in turns of short blocks
in random order, one thread for torch, wall time. The machine is read every 0.1 s there, a hundred times as
often as in earnest, so that there is something to see; "A/A" compares two halves of the blocks without: what
it shows is noise.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from layerwatch.hooks import system
from layerwatch.hooks.machine import Machine

OFTEN = 0.1
BLOCK_SECONDS = 0.5


def reading(times: int = 200) -> tuple[float, float]:
    """Wall and processor seconds of one reading."""
    machine = Machine(Path.cwd())
    machine.read()
    wall, used = time.perf_counter(), time.thread_time()
    for _ in range(times):
        machine.read()
    return (time.perf_counter() - wall) / times, (time.thread_time() - used) / times


def steps_per_second(model: nn.Module, optimizer: torch.optim.Optimizer, data: torch.Tensor) -> float:
    """Of a plain training, for half a second."""
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < BLOCK_SECONDS:
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()
        steps += 1
    return steps / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40, help="blocks of each kind (default: %(default)s)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    wall, used = reading()
    print(f"one reading: {1e3 * wall:.2f} ms, {1e3 * used:.2f} ms of a processor")
    print(f"every {system.PERIOD:.0f} s: {100 * used / system.PERIOD:.4f} % of a processor")
    system.PERIOD = OFTEN
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(20) for m in (nn.Linear(64, 64), nn.ReLU())])
    optimizer, data = torch.optim.SGD(model.parameters(), 1e-3), torch.randn(32, 64)
    found: dict[str, list[float]] = {"A": [], "A'": [], "sampled": []}
    steps_per_second(model, optimizer, data)
    with tempfile.TemporaryDirectory() as folder:
        for round_ in range(rounds):
            for kind in random.Random(round_).sample(list(found), len(found)):
                sampler = system.Sampler(Machine(Path(folder))) if kind == "sampled" else None
                if sampler is not None:
                    sampler.start()
                found[kind].append(steps_per_second(model, optimizer, data))
                if sampler is not None:
                    sampler.close()
    middle = {kind: statistics.median(rates) for kind, rates in found.items()}
    print(
        f"steps a second: {middle['A']:.0f} without, {middle['sampled']:.0f} beside a reading every {OFTEN} s"
    )
    for name, kind in (("A/A", "A'"), ("sampled", "sampled")):
        print(f"{name}: {100 * (middle['A'] / middle[kind] - 1):+.2f} % time a step")


if __name__ == "__main__":
    main()
