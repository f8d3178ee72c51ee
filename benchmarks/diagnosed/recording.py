"""Training the cases once, each under a watcher and a probe, beside its twin."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from layerwatch.hooks import watch

from .family import CASES, Case
from .probe import PROOFS, Probe

#: Codes that name a change of the recipe or the data: true only where that was changed.
DECLARED = (
    "learning_rate_too_high", "learning_rate_too_low", "over_regularised", "data_fault", "excessive_drift",
    "gradient_underflow", "schedule_fault", "loss_scale_collapse",
)  # fmt: skip


class _Both:
    """A watcher and a probe at one training."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def log(self, **values: float) -> None:
        for part in self.parts:
            part.log(**values)

    def close(self) -> None:
        for part in self.parts:
            part.close()


class Recorder:
    """Trains cases into a folder. Twins are trained once for each seed."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self._twins: dict[str, Probe] = {}

    def record(self, name: str, seed: int) -> None:
        """Train a case, unless the folder has it, and write what was measured beside the run."""
        case, run = CASES[name], self.folder / f"{name}-seed{seed}"
        facts = run.with_suffix(".json")
        if facts.exists():
            return
        probe = _probed(case.train, seed, lambda m, o: watch(m, o, run=run, every=self.every, live=False))
        twin = self._twin(case, seed) if case.twin else None
        facts.write_text(json.dumps(measured(case, probe, twin)))

    def _twin(self, case: Case, seed: int) -> Probe:
        key = f"{case.twin}-{seed}"
        if key not in self._twins:
            assert case.twin is not None
            self._twins = {key: _probed(case.twin, seed)}  # cases of one twin follow each other
        return self._twins[key]


def _probed(train: Callable, seed: int, watcher: Callable[[Any, Any], Any] | None = None) -> Probe:
    made: list[Probe] = []

    def attach(model: Any, optimizer: Any) -> Any:
        made.append(Probe(model, optimizer))
        return _Both(watcher(model, optimizer), made[-1]) if watcher else made[-1]

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(attach, seed)
    return made[-1]


def measured(case: Case, probe: Probe, twin: Probe | None) -> dict[str, Any]:
    """The label of a run: its codes, what else is true of it, and the number that proves its fault."""
    label = {"codes": case.codes, "layers": case.layers, "onset": case.onset, "held_out": case.held_out,
             "steps": probe.step, "proved": True, "proof": None, "also": []}  # fmt: skip
    if twin is None:
        return label
    proved, number = PROOFS[case.codes[0]](probe, twin)
    also = [
        code for code, proof in PROOFS.items()
        if code not in case.codes and code not in DECLARED and proof(probe, twin)[0]
    ]  # fmt: skip
    number = round(float(number), 6) if math.isfinite(number) else None
    return label | {"proved": bool(proved), "proof": number, "also": also}
