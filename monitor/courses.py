"""A run as courses: what is compared between runs, each number by step and smoothed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .schema import SYSTEM

if TYPE_CHECKING:
    from .detectors.history import Floats, History, Ints

#: What is compared of each layer: signal -> kind and column of `Run.stats`, and which tensors: matrices, or
#: vectors (biases, norms), which differ more between seeds.
LAYER_SIGNALS = {
    "gradient norm": ("gradient", "norm", "matrices"),
    "update ratio": ("update", "ratio", "matrices"),
    "weight norm": ("weight", "norm", "matrices"),
    "gradient norm of vectors": ("gradient", "norm", "vectors"),
    "update ratio of vectors": ("update", "ratio", "vectors"),
    "weight norm of vectors": ("weight", "norm", "vectors"),
    "activation rms": ("activation", "rms", "modules"),
}
#: A running median is taken over this share of the captures, and so many at least and at most: step noise
#: averages out, while a jump stays where it is.
SMOOTHED, WIDTHS = 1 / 20, (5, 51)
#: Below this a number counts as zero: its logarithm would be noise.
TINY = 1e-12
#: Words in the names of scalars that are no result of the training: clocks, memory, counters.
_IGNORED = {
    "time", "seconds", "sec", "ms", "speed", "throughput", "memory", "mem", "overhead", "epoch", "step",
    "steps", "loss_scale", "samples", "tokens",
}  # fmt: skip
_LOWER = {"loss", "error", "err", "perplexity", "ppl", "nll", "mse", "mae", "rmse", "wer", "cer"}
_HIGHER = {
    "acc", "accuracy", "auc", "f1", "bleu", "rouge", "precision", "recall", "reward", "return", "r2", "psnr",
}  # fmt: skip
#: Learning rates.
RATE = re.compile(r"lr(/\d+)?$")


@dataclass(frozen=True, eq=False)
class Course:
    """One signal of several layers (or one scalar) by step: values (n, len(names)), NaN where unknown."""

    names: tuple[str, ...]
    steps: Ints
    values: Floats


@dataclass(frozen=True, eq=False)
class Courses:
    """What is compared of one run.

    Attributes:
        shapes: tensor -> shape, the fingerprint of the model. last_step: of anything that was logged.
        layers: signal -> course, natural logarithms. scalars: name -> course, as logged. Both smoothed.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    last_step: int
    layers: dict[str, Course]
    scalars: dict[str, Course]


def courses(history: History) -> Courses:
    """Read what is compared; a small part of the run, so that many baselines fit in memory."""
    shapes = shapes_of(history)
    names = {
        "matrices": tuple(name for name, shape in shapes.items() if len(shape) > 1),
        "vectors": tuple(name for name, shape in shapes.items() if len(shape) < 2),
        "modules": tuple(history.modules),
    }
    layers = {}
    for signal, (kind, column, which) in LAYER_SIGNALS.items():
        found = _layer_course(history, kind, column, names[which])
        if found is not None:
            layers[signal] = found
    scalars = {name: c for name in history.source.scalar_names() if (c := _scalar_course(history, name))}
    return Courses(history.name, shapes, history.last_step, layers, scalars)


def shapes_of(history: History) -> dict[str, tuple[int, ...]]:
    table = history.tensors
    pairs = zip(table.index, table["shape"], strict=True)
    return {str(name): tuple(int(n) for n in shape) for name, shape in pairs}


def _layer_course(history: History, kind: str, column: str, names: tuple[str, ...]) -> Course | None:
    if not names:
        return None
    values = history.table(kind, column, names)
    values = np.where(history.skipped[:, None] | ~np.isfinite(values), np.nan, values)
    known = ~np.isnan(values)
    rows, columns = known.any(axis=1), known.any(axis=0)
    if not rows.any():
        return None
    logs = np.log(np.maximum(values[rows][:, columns], TINY))
    kept = tuple(name for name, keep in zip(names, columns, strict=True) if keep)
    return Course(kept, history.steps[rows], smooth(logs))


def _scalar_course(history: History, name: str) -> Course | None:
    if not is_result(name):
        return None
    steps, values = history.scalar(name)
    if RATE.match(name):  # logged when it changes: it holds until then
        steps, values = _held(steps, values, history.steps)
        return Course((name,), steps, values[:, None]) if steps.size else None
    keep = np.isfinite(values)
    if keep.sum() < 3:
        return None
    return Course((name,), steps[keep], smooth(values[keep][:, None], 3))


def _held(steps: Ints, values: Floats, at: Ints) -> tuple[Ints, Floats]:
    at = at[at >= steps[0]] if steps.size else at[:0]
    return at, values[np.searchsorted(steps, at, side="right") - 1]


def smooth(values: Floats, least: int = WIDTHS[0]) -> Floats:
    """Centred running median by column; ignores NaN."""
    width = int(np.clip(len(values) * SMOOTHED, least, WIDTHS[1])) | 1
    smoothed = pd.DataFrame(values).rolling(width, center=True, min_periods=1).median().to_numpy()
    return np.where(np.isnan(values), np.nan, smoothed)


def is_result(name: str) -> bool:
    """A scalar is a result of the training: no clock or counter, nothing of the machine, and not written
    around single steps only."""
    return not (_words(name) & _IGNORED or name.startswith(("recorder/", SYSTEM)))


def better(name: str) -> int:
    """-1: lower values of this scalar are better, 1: higher ones, 0: nobody knows."""
    words = _words(name)
    return -1 if words & _LOWER else 1 if words & _HIGHER else 0


def _words(name: str) -> set[str]:
    return {name.lower(), *re.split(r"[^a-z0-9]+", name.lower())}
