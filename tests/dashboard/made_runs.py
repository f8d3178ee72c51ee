"""Runs made without torch whose every number is known: what is compared, and names that bite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from layerwatch.monitor import LogWriter, Summary, summarise
from layerwatch.monitor.schema import STATS
from tests.monitor.made_logs import START, row

LAYERS = ("block.0.weight", "block.1.weight", "head.weight")
HOSTILE = "<img src=x onerror=window.hacked=1>"
NASTY = f"{HOSTILE}.weight"
STEPS = range(0, 200, 10)
LAST_EQUAL, PARTS_AT = 120, 150


def values_of(step: int, layer: str, kind: str) -> NDArray[np.float64]:
    """What a run holds that is as the others are."""
    rng = np.random.default_rng([step, len(layer), sum(layer.encode()), len(kind)])
    return rng.standard_normal(64) * (0.01 if kind == "gradient" else 1.0)


def drift_of(step: int, layer: str) -> Summary:
    reference = values_of(0, layer, "weight")
    now = reference * (1 + step / 1000)
    return Summary(
        count=64,
        sum_sq=float(np.square(now - reference).sum()),
        dot=float(now @ reference),
        ref_sum_sq=float(reference @ reference),
        sign_flips=0,
        residual_sq=None,
    )


def write_run(
    root: Path,
    name: str,
    *,
    parts: bool = False,
    layers: tuple[str, ...] = LAYERS,
    config: Any = None,
    shift: int = 0,
) -> None:
    """One run. `parts`: a trifle differs after LAST_EQUAL, a gradient is tripled from PARTS_AT on."""
    known = {"role": "matrix", "shape": [8, 8], "elements": 64, "dtype": "float32", "module_type": "Linear"}
    state = {"trainable": True, "state": "trainable"}
    tensors = [
        {"tensor": layer, "names": [layer], "module": layer.rpartition(".")[0], **known, **state}
        for layer in layers
    ]
    log = LogWriter(root / name, {"name": name, "tensors": tensors, "modules": [], "config": config or {}})
    rows = []
    for step in (step + shift for step in STEPS):
        for layer in layers:
            for kind in ("weight", "gradient"):
                values = values_of(step, layer, kind)
                if parts and step > LAST_EQUAL:
                    values = values * (1 + 1e-9)
                if parts and step >= PARTS_AT and layer == LAYERS[1] and kind == "gradient":
                    values = values * 3
                rows.append(row(step, layer, kind, summarise(values)))
            rows.append(
                row(step, layer, "drift", drift_of(2 * step if parts else step, layer), min=None, max=None)
            )
        log.scalars(
            step, START + step, {"train_loss": 1.0 / (1 + step) + 0.1 * parts, "accuracy": step / 200}
        )
    log.stats(pa.RecordBatch.from_pylist(rows, STATS))
    log.close()


def write_runs(root: Path) -> Path:
    """base; twin, which parts from it; other layers; shifted, captured at other steps; a name that bites."""
    write_run(root, "base", config={"lr": 0.1, "depth": 3})
    write_run(root, "twin", parts=True, config={"lr": 0.2, "depth": 3})
    write_run(root, "other", layers=("encoder.weight", NASTY), config={"lr": 0.1, "depth": 9})
    write_run(root, "shifted", shift=3)
    write_run(root, HOSTILE, layers=(*LAYERS, NASTY, "שלום 🙂.weight"))
    return root
