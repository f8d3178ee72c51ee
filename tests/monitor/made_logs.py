"""Small logs made without torch, for the tests of writing and reading."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from layerwatch.monitor import LogWriter, Run, Summary, summarise
from layerwatch.monitor.schema import STATS

TENSORS = ("0.weight", "0.bias", "2.weight")
START = 1_700_000_000.0  # unix seconds of step 0
PERIOD = 0.5


def values_at(step: int, tensor: str) -> NDArray[np.float64]:
    """What `tensor` held at `step`: any reader can compute it again."""
    rng = np.random.default_rng([step, TENSORS.index(tensor)])
    return rng.standard_normal(12) * (1 + step)


def row(step: int, tensor: str, kind: str, summary: Summary, **columns: Any) -> dict[str, Any]:
    """One row of the `stats` table."""
    fields = {name: getattr(summary, name) for name in STATS.names if hasattr(summary, name)}
    place = {"step": step, "time": START + step * PERIOD, "tensor": tensor, "kind": kind}
    return {**fields, **place, "stage": None, "state": "trainable", "skipped": False, **columns}


def stats_batch(steps: list[int], kind: str = "weight") -> pa.RecordBatch:
    """Every tensor at every one of these steps."""
    rows = [row(s, t, kind, summarise(values_at(s, t))) for s in steps for t in TENSORS]
    return pa.RecordBatch.from_pylist(rows, STATS)


def info(**more: Any) -> dict[str, Any]:
    """The content of run.json."""
    tensors = [
        {
            "tensor": t, "names": [t], "role": "bias" if t.endswith("bias") else "matrix",
            "shape": [3, 4], "elements": 12, "dtype": "float32",
            "module": t.partition(".")[0], "module_type": "Linear",
            "trainable": True, "state": "trainable",
        }
        for t in TENSORS
    ]  # fmt: skip
    modules = [{"module": "0", "type": "Linear"}, {"module": "1", "type": "ReLU"}]
    return {
        "name": "made",
        "host": "elsewhere",
        "pid": 1,
        "tensors": tensors,
        "modules": modules,
        "notes": [],
        **more,
    }


def write_step(log: LogWriter, step: int) -> None:
    """One capture with rows in every table."""
    when = START + step * PERIOD
    log.stats(stats_batch([step]))
    log.values([(step, when, "0.bias", "weight", values_at(step, "0.bias"))])
    log.scalars(step, when, {"train_loss": 1.0 / (1 + step), "lr": 0.1})
    log.event(step, "note", f"step {step}")


def make_run(path: Path, steps: int = 5, *, close: bool = True, **more: Any) -> Path:
    """A run with so many captured steps, compacted unless `close` is off."""
    log = LogWriter(path, info(**more))
    for step in range(steps):
        write_step(log, step)
    if close:
        log.close()
    return path


def counted(run: Run) -> Counter[tuple[int, str]]:
    """How often each (step, tensor) is in `stats("weight")`."""
    frame = run.stats("weight")
    return Counter(zip(frame["step"].tolist(), frame["tensor"].tolist(), strict=True))


def assert_complete(path: Path, steps: int) -> None:
    """Every row of every table is readable exactly once."""
    run = Run(path)
    assert counted(run) == {(s, t): 1 for s in range(steps) for t in TENSORS}
    assert run.scalars("train_loss")["step"].tolist() == list(range(steps))
    assert run.values("0.bias")[0].tolist() == list(range(steps))
    assert (run.events()["event"] == "note").sum() == steps


def restarted_run(path: Path, *, first: int = 40, again_from: int = 30, upto: int = 60) -> Path:
    """A run of two sessions: the first one closed, the second one killed. Its rows lie in Parquet parts, in
    roll-ups and in a write-ahead file; the steps from `again_from` on were done twice."""
    make_session(LogWriter(path, info()), range(first)).close()
    log = LogWriter(path, info(), resume=True)
    make_session(log, range(again_from, upto), scale=2.0)
    log.close(quick=True)
    return path


def make_session(log: LogWriter, steps: range, scale: float = 1.0) -> LogWriter:
    """Captures with weights, updates and values; every capture is written at once."""
    log.begin(steps[0])
    for step in steps:
        when = START + step * PERIOD
        rows = []
        for tensor in TENSORS:
            before, after = values_at(step, tensor), scale * values_at(step + 1, tensor)
            pair = {"dot": float(before @ (after - before)), "ref_sum_sq": float(before @ before), "lost": 1}
            rows += [
                row(step, tensor, "weight", summarise(after)),
                row(step, tensor, "update", summarise(after - before), **pair),
            ]
        with log.together():
            log.stats(pa.RecordBatch.from_pylist(rows, STATS))
            log.values([(step, when, "0.bias", "weight", values_at(step, "0.bias"))])
            log.scalars(step, when, {"train_loss": scale / (1 + step), "lr": 0.1})
    return log
