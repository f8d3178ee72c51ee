"""What recording a checkpoint costs: the call, the steps while it is read, the reading, and memory.

    python benchmarks/lineage.py [--gigabytes 1]

reading: SHA-256 of the file, then of every tensor; the file is in the system's cache. call:
`watcher.checkpoint`, in the training's thread, of small files. steps: an MLP's, before and while the large
file is read in the background. memory: by how much the process's peak grew by that.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from layerwatch import Watcher, watch
from layerwatch.hooks.torch_file import TorchFile
from layerwatch.monitor.weights.digests import digests_of, sha256_of_file
from layerwatch.weights import open_weights

MAKE = """
import sys, safetensors.torch, torch
state = {f"layers.{number}.weight": torch.randn(2048, 4096) for number in range(int(sys.argv[1]))}
safetensors.torch.save_file(state, "large.safetensors")
torch.save(state, "large.pt")
"""


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_file(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        sha256_of_file(file)


def read_tensors(path: Path) -> None:
    with TorchFile(path) if path.suffix == ".pt" else open_weights(path) as weights:
        digests_of(weights)


class Training:
    """An MLP under watch, without captures."""

    def __init__(self) -> None:
        layers = [torch.nn.Linear(256, 256) for _ in range(6)]
        self.model = torch.nn.Sequential(*layers)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.watcher: Watcher = watch(self.model, self.optimizer, run="run", every=10**6, activations=False)
        self.steps(100)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(64, 256)).square().mean().backward()
        self.optimizer.step()

    def steps(self, count: int) -> float:
        """Median, in milliseconds."""
        return 1e3 * statistics.median(timed(self.step) for _ in range(count))

    def call(self, number: int) -> float:
        """Milliseconds of one `checkpoint` of the MLP."""
        path = f"small-{number}.pt"
        torch.save(self.model.state_dict(), path)
        return 1e3 * timed(lambda: self.watcher.checkpoint(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        count = max(1, round(options.gigabytes * 1e9 / (2048 * 4096 * 4)))
        subprocess.run([sys.executable, "-c", MAKE, str(count)], check=True)  # its memory is none of ours
        for path in (Path("large.safetensors"), Path("large.pt")):
            size = path.stat().st_size / 1e9
            whole, tensors = (size / timed(lambda w=work, p=path: w(p)) for work in (read_file, read_tensors))
            print(
                f"reading {path}, {size:.2f} GB: {whole:.2f} GB/s for the file, {tensors:.2f} for its tensors"
            )
        training = Training()
        calls = [training.call(number) for number in range(20)]
        print(f"call: median {statistics.median(calls):.2f} ms, slowest {max(calls):.2f} ms")
        time.sleep(1)  # the small ones are done
        alone, peak = training.steps(200), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        large = 1e3 * timed(lambda: training.watcher.checkpoint("large.pt"))
        beside = training.steps(100)
        print(f"call for the large file: {large:.2f} ms")
        print(f"steps: median {alone:.2f} ms, {beside:.2f} ms while it is read")
        took = timed(training.watcher.close)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
        print(f"close waited {took:.1f} s for the rest; the process's peak grew by {grown:.0f} MB")
        os.chdir("/")


if __name__ == "__main__":
    main()
