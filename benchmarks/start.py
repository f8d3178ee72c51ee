"""What a training pays once, in a fresh process each: importing, the first capture, and memory.

    python benchmarks/start.py [--parameters 11]

import: `import layerwatch`, which loads neither torch nor pandas. watch: the call, which loads compiled loops
from a cache; "compiled" when they are not in it yet. first step: the first captured step, with the
initial weights and the reference, less the same step without us.

memory: resident memory at the end of ten steps, less that of the same training without us, after steps of
warming up; peak: the most at any time. A model of --parameters million elements in one layer, SGD, every=1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

IMPORT = """
import time
start = time.perf_counter()
import layerwatch
print(time.perf_counter() - start)
"""

TRAIN = """
import resource, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
width, how = int(sys.argv[1]), sys.argv[3]
options = {"no reference": {"reference": None}, "no updates": {"updates": False}, "no activations":
           {"activations": False}, "4 MB reference": {"reference_memory": 4 << 20}}.get(how, {})
model = torch.nn.Linear(width, width, bias=False)
optimizer = torch.optim.SGD(model.parameters(), 1e-3)
x = torch.randn(4, width)
def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024
def step():
    start = time.perf_counter()
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start
plain = min(step() for _ in range(3))
called = first = 0.0
import layerwatch, layerwatch.hooks  # imported in both, as is numba: what is measured is what watching takes
from layerwatch.hooks.statistics import warm_up
if how != "nothing":
    start = time.perf_counter()
    watcher = layerwatch.watch(model, optimizer, run=Path(sys.argv[2]) / "run", every=1, **options)
    called = time.perf_counter() - start
    first = step() - plain
else:
    warm_up()
for _ in range(10):
    step()
print(called, first, status("VmRSS"), status("VmHWM"))
"""


def run(code: str, *arguments: str, **environment: str) -> list[float]:
    """The numbers that a fresh process prints."""
    command, env = [sys.executable, "-c", code, *arguments], {**os.environ, **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return [float(number) for number in done.stdout.split()]


def train(width: int, how: str, **environment: str) -> list[float]:
    """Seconds of the call and of the first captured step, MiB at the end and at most."""
    with tempfile.TemporaryDirectory() as folder:
        return run(TRAIN, str(width), folder, how, **environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parameters", type=float, default=11.0, help="in millions (default: %(default)s)")
    width = int((parser.parse_args().parameters * 1e6) ** 0.5)
    train(64, "everything")
    imports = [run(IMPORT)[0] for _ in range(5)]
    print(f"import layerwatch    {1e3 * statistics.median(imports):8.0f} ms")
    small = [train(64, "everything") for _ in range(3)]
    print(f"watch                {1e3 * min(s[0] for s in small):8.0f} ms")
    print(f"first step           {1e3 * min(s[1] for s in small):8.0f} ms")
    with tempfile.TemporaryDirectory() as cache:
        print(f"watch, compiled      {train(64, 'everything', NUMBA_CACHE_DIR=str(Path(cache)))[0]:8.1f} s")
    _, _, resident, peak = train(width, "nothing")
    print(f"{width * width / 1e6:.1f} million parameters, {4 * width * width / 2**20:.0f} MiB of weights:")
    for how in ("everything", "no reference", "4 MB reference", "no updates", "no activations"):
        _, _, now, most = train(width, how)
        print(f"  {how:18} {now - resident:+8.0f} MiB at the end, peak {most - peak:+8.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
