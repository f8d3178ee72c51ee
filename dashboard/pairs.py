"""Which scalars belong together: the training and the validation value of one metric."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from ..monitor.losses import TRAIN, VAL

if TYPE_CHECKING:
    from ..monitor import Run

TRAINING = ("train", "training")
VALIDATION = ("val", "valid", "validation", "eval", "dev", "test")
#: Parts of names of metrics that are better when they are higher.
BETTER_HIGHER = (
    "acc", "f1", "auc", "bleu", "rouge", "iou", "precision", "recall", "r2", "score", "map", "psnr", "ssim",
)  # fmt: skip
_SPLIT = re.compile(r"[_/.\-]")


@dataclass(frozen=True)
class Pair:
    """A metric's two scalars; "" for one that was not logged."""

    name: str
    train: str
    val: str

    @property
    def falls(self) -> bool:
        """Whether lower is better."""
        parts = _SPLIT.split(self.name.lower())
        return not any(part.startswith(BETTER_HIGHER) for part in parts)


def pairs(names: Sequence[str]) -> list[Pair]:
    """The losses first, then every metric that was logged for validation, by name."""
    train, val = (next((name for name in known if name in names), "") for known in (TRAIN, VAL))
    found = [Pair("loss", train, val)] if train or val else []
    halves: dict[str, dict[str, str]] = {}
    for name in names:
        metric, half = metric_of(name)
        if half and name not in (train, val):
            halves.setdefault(metric, {}).setdefault(half, name)
    for metric in sorted(halves):
        two = halves[metric]
        if "val" in two:
            found.append(Pair(metric, two.get("train", ""), two["val"]))
    return found


def metric_of(name: str) -> tuple[str, str]:
    """The metric that a scalar's name is about, and "train", "val" or "" (neither)."""
    match = re.match(r"^([a-z]+)[_/.\-](.+)$", name, re.IGNORECASE)
    if match:
        first = match[1].lower()
        half = "train" if first in TRAINING else "val" if first in VALIDATION else ""
        return (match[2], half) if half else (name, "")
    return name, ""


def read(run: Run, pair: Pair) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both scalars: step, time, value; empty frames where one was not logged."""
    one, two = (run.scalars(name) if name else _nothing() for name in (pair.train, pair.val))
    return one, two


def _nothing() -> pd.DataFrame:
    return pd.DataFrame({"step": [], "time": [], "value": []}).astype({"step": "int64"})


def losses(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training and validation loss, under whatever name they were logged."""
    found = pairs(run.scalar_names())
    return read(run, found[0] if found and found[0].name == "loss" else Pair("loss", "", ""))
