"""What judging a run costs: seconds and memory of `Run(path).findings()` in a fresh process.

    python benchmarks/detectors.py [--tensors 500] [--captures 2000] [--modules 100] [--folder DIR]

The log is made by the writer that a training uses; only the numbers in its rows are drawn: those of a healthy
training, so that no detector stops early. A quarter of the captures is left in write-ahead files with
--live, as a training leaves them that still runs. Wall time is that of two cores at most.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from layerwatch.monitor import LogWriter
from layerwatch.monitor.schema import STATS

WIDTH, BUCKETS, START, PERIOD = 64, 24, 1.7e9, 0.1
KINDS = ("gradient", "update", "weight", "drift")
#: Seconds and megabytes that judging 500 tensors x 2,000 captures may take.
MOST_SECONDS, MOST_MB = 2.0, 500


def described(tensors: int, modules: int) -> dict[str, Any]:
    """run.json of a stack of linear layers, of which so many and their ReLUs are seen at work."""
    entries = [
        {
            "tensor": f"{2 * i}.{part}", "names": [f"{2 * i}.{part}"], "shape": shape,
            "role": "bias" if part == "bias" else "output" if 2 * i == tensors - 2 else "matrix",
            "elements": int(np.prod(shape)), "dtype": "float32", "module": str(2 * i),
            "module_type": "Linear", "trainable": True, "state": "trainable",
        }
        for i in range(tensors // 2) for part, shape in (("weight", [WIDTH, WIDTH]), ("bias", [WIDTH]))
    ]  # fmt: skip
    leaves = [{"module": str(i), "type": "ReLU" if i % 2 else "Linear"} for i in range(modules)]
    optimizer = {"class": "AdamW", "groups": [{"lr": 1e-3, "weight_decay": 0.01, "eps": 1e-8}]}
    return {
        "name": "made", "host": "made", "pid": 1, "tensors": entries, "modules": leaves, "notes": [],
        "reference": "start", "optimizers": [optimizer],
    }  # fmt: skip


class Rows:
    """The rows of a capture: what is the same in all of them is made once."""

    def __init__(self, info: dict[str, Any]) -> None:
        places = [
            (kind, e["tensor"], e["elements"], WIDTH if e["role"] != "bias" else None)
            for kind in KINDS for e in info["tensors"]
        ] + [("activation", m["module"], 256 * WIDTH, WIDTH) for m in info["modules"]]  # fmt: skip
        kinds, names, counts, units = (np.array(c, object) for c in zip(*places, strict=True))
        self.count, self.rows = counts.astype(np.int64), len(places)
        self.kinds = {kind: kinds == kind for kind in (*KINDS, "activation")}
        self.relu = np.array([k == "activation" and int(n) % 2 == 1 for k, n, *_ in places])
        self.rng = np.random.default_rng(0)
        half = np.arange(400, 400 + BUCKETS // 2)
        buckets = np.tile(np.concatenate([-half[::-1], half]).astype(np.int16), self.rows)
        offsets = pa.array(np.arange(self.rows + 1, dtype=np.int32) * BUCKETS)
        share = np.repeat(self.count // BUCKETS, BUCKETS)
        zeros = np.zeros(self.rows, np.int64)
        has_units = self.kinds["gradient"] | self.kinds["activation"]
        self.bits = np.array([u is not None and bool(h) for u, h in zip(units, has_units, strict=True)])
        self.fixed: dict[str, Any] = {
            "tensor": pa.array(names, pa.string()), "kind": pa.array(kinds, pa.string()),
            "captures": zeros + 1, "count": self.count, "subnormals": zeros, "nans": zeros,
            "pos_infs": zeros, "neg_infs": zeros,
            "buckets": pa.ListArray.from_arrays(offsets, pa.array(buckets)),
            "counts": pa.ListArray.from_arrays(offsets, pa.array(share)),
            "samples": pa.array(zeros + 256, mask=~self.kinds["activation"]),
            "units": pa.array(zeros + WIDTH, mask=~self.bits),
            "stage": pa.array(np.where(self.kinds["gradient"], "at_step", None), pa.string()),
            "state": pa.array(np.full(self.rows, "trainable", object), pa.string()),
            "skipped": np.zeros(self.rows, bool),
        }  # fmt: skip

    def initial(self) -> pa.RecordBatch:
        """The weights before the first step."""
        batch = self.capture(0)
        rows = batch.filter(pa.array(self.kinds["weight"]))
        kind = pa.array(["initial_weight"] * rows.num_rows)
        return rows.set_column(batch.schema.get_field_index("kind"), "kind", kind).cast(STATS)

    def capture(self, step: int) -> pa.RecordBatch:
        """All rows of one step."""
        noise = np.exp(0.1 * self.rng.standard_normal(self.rows))
        # Root mean squares of a network that learns: its gradients shrink with the loss.
        falling = 0.3 + 0.7 * np.exp(-step / 3000)
        size = {"gradient": 2e-3 * falling, "update": 5e-4, "weight": 0.1 + step * 1e-7,
                "drift": 1e-3 * (1 + step) ** 0.5 / 10, "activation": 1.0}  # fmt: skip
        rms = np.sum([size[k] * mask for k, mask in self.kinds.items()], axis=0) * noise
        pair = self.kinds["update"] | self.kinds["drift"]
        bits = np.packbits(self.rng.random((int(self.bits.sum()), WIDTH)) < 0.7, axis=1)
        active = np.full(self.rows, None, object)
        active[self.bits] = [row.tobytes() for row in bits]
        sum_sq = rms**2 * self.count
        columns = {
            "step": np.full(self.rows, step), "time": np.full(self.rows, START + step * PERIOD),
            "sum": 0.1 * rms * self.count * self.rng.standard_normal(self.rows) + self.relu * self.count / 2,
            "sum_sq": sum_sq, "min": np.where(self.relu, 0.0, -3 * rms), "max": 3 * rms,
            "zeros": (self.relu * self.count * 0.5).astype(np.int64),
            "ref_sum_sq": pa.array(np.full(self.rows, 0.01) * self.count, mask=~pair),
            "dot": pa.array(1e-3 * self.rng.standard_normal(self.rows) * sum_sq, mask=~pair),
            "residual_sq": pa.array(np.zeros(self.rows), mask=~self.kinds["drift"]),
            "sign_flips": pa.array(np.full(self.rows, step), mask=~self.kinds["drift"]),
            "lost": pa.array(np.zeros(self.rows, np.int64), mask=~self.kinds["update"]),
            "active": pa.array(active, pa.binary()), **self.fixed,
        }  # fmt: skip
        return pa.RecordBatch.from_pydict({n: columns[n] for n in STATS.names}, schema=STATS)


def losses(captures: int, every: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Both losses and the learning rate, by step."""
    rng = np.random.default_rng(1)
    for step in range(captures * every):
        numbers = {"train_loss": 0.5 + 3.6 * np.exp(-step / 3000) + 0.05 * rng.standard_normal(), "lr": 1e-3}
        if step % 200 == 199:
            numbers["val_loss"] = 0.55 + 3.6 * np.exp(-step / 3000) + 0.01 * rng.standard_normal()
        yield step, numbers


def make(path: Path, tensors: int, captures: int, modules: int, every: int = 10, *, live: bool) -> None:
    """Write the run as a training does."""
    info = described(tensors, modules)
    log, rows = LogWriter(path, info), Rows(info)
    log.begin(0)
    log.stats(rows.initial())
    for step, numbers in losses(captures, every):
        if step % every == 0:
            with log.together():
                log.stats(rows.capture(step))
        log.scalars(step, START + step * PERIOD, numbers)
    if live:
        log._background.stop()
        log._journal.close()
    else:
        log.close()


WHOLE = """
import json, sys, time
from layerwatch.monitor import Run
from layerwatch.monitor.detectors import registered
registered()
start, used = time.perf_counter(), time.process_time()
found, notes = Run(sys.argv[1])._find(())
took, used = time.perf_counter() - start, time.process_time() - used
(peak,) = [l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")]
print(json.dumps([took, int(peak) / 1024, [f.problem for f in found], notes, used]))
"""

SPLIT = """
import json, sys, time
from layerwatch.monitor import Run
from layerwatch.monitor.detectors import History, registered
from layerwatch.monitor.detectors.thinned import sparing
from layerwatch.monitor.detectors.registry import Unjudged
table, _ = registered()
start = time.process_time()
run = Run(sys.argv[1])
source = sparing(run)
opening = time.process_time() - start
read = 0.0
class Timed:
    def __init__(self, source): self.source, self.inside = source, False
    def __getattr__(self, name):
        value = getattr(self.source, name)
        if not callable(value): return value
        def call(*a, **k):
            global read
            outer, self.inside = self.inside, True
            began = time.process_time()
            try: return value(*a, **k)
            finally:
                self.inside = outer
                if not outer: read += time.process_time() - began
        return call
history = History(Timed(source))
rows = [["opening the run", opening, 0.0]]
for problem, judge in table:
    began, before = time.process_time(), read
    try: judge(history)
    except Unjudged: pass
    reading = read - before
    rows.append([f"{problem} ({judge.__name__})", reading, time.process_time() - began - reading])
print(json.dumps(rows))
"""


def child(script: str, path: Path) -> Any:
    """What a script prints about the run, in a process of its own."""
    command = [sys.executable, "-c", script, str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def judged_training(seconds: float, folder: Path) -> None:
    """What judging takes of a real training: its time in the hooks, over all the time of the same run."""
    import torch
    from torch import nn

    from layerwatch import watch

    torch.set_num_threads(1)
    layers = [m for _ in range(20) for m in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x, y = torch.randn(256, 64), torch.randint(0, 10, (256,))
    watcher = watch(model, optimizer, run=folder, every=10, on_finding=lambda finding: None)
    start, step = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < seconds:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watcher.log(train_loss=loss)
        step += 1
    live = watcher._live
    print(f"live: {live.looks} looks in {taken:.0f} s and {step:,} steps took {live.seconds:.2f} s: "
          f"{live.seconds / taken:.2%} of the time (target < 1 %)")  # fmt: skip
    watcher.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tensors", type=int, default=500, help="(default: %(default)s)")
    parser.add_argument("--captures", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--modules", type=int, default=100, help="seen at work (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes (default: %(default)s)")
    parser.add_argument("--live", action="store_true", help="the training has not closed its log")
    parser.add_argument("--folder", type=Path, help="where the log is written, and found again")
    parser.add_argument("--training", type=float, default=60.0, help="seconds (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = (options.folder or Path(temporary)) / f"made-{options.tensors}-{options.captures}"
        path = path.with_name(path.name + "-live" * options.live)
        if not path.exists():
            began = time.perf_counter()
            make(path, options.tensors, options.captures, options.modules, live=options.live)
            print(f"the log was written in {time.perf_counter() - began:.0f} s")
        size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        print(f"{options.tensors} tensors x {options.captures:,} captures, {size / 1e6:,.0f} MB")
        rounds = [child(WHOLE, path) for _ in range(options.rounds)]
        seconds, peak = sorted(r[0] for r in rounds), max(r[1] for r in rounds)
        middle = seconds[len(seconds) // 2]
        print(f"findings(): {middle:.2f} s (best {seconds[0]:.2f}, target < {MOST_SECONDS:g} s), "
              f"CPU {min(r[4] for r in rounds):.2f} s, {peak:.0f} MB (target < {MOST_MB})")  # fmt: skip
        print(f"found: {', '.join(rounds[0][2]) or 'nothing'}; notes: {rounds[0][3]}")
        parts = child(SPLIT, path)
        reading, judging = (sum(p[i] for p in parts) for i in (1, 2))
        print(f"{'CPU time of':48} {'reading':>9} {'judging':>9}")
        for what, read, judged in sorted(parts, key=lambda p: -p[1] - p[2]):
            if read + judged > 0.005:
                print(f"{what:48} {read * 1e3:6.0f} ms {judged * 1e3:6.0f} ms")
        print(f"{'all detectors':48} {reading * 1e3:6.0f} ms {judging * 1e3:6.0f} ms")
        judged_training(options.training, Path(temporary) / "live")


if __name__ == "__main__":
    main()
