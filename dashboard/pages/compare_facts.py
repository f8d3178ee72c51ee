"""What runs are compared by: their settings, their scalars, their layers; all as plain data."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ...monitor import Run
from ...monitor.parting import TOLERANCE, Pair, Parting, pair, part
from ..figures.compare import MAX_RUNS
from ..figures.grid import build
from ..queries import Library
from ..text import integer, number

#: Captures of all layers that are compared; of longer runs each holds several.
POINTS = 1024
FIRST = ("train_loss", "val_loss")
LOWER = re.compile(r"loss|error|perplexity|ppl|(^|[_/])(mae|mse|rmse|nll|wer|cer)($|[_/])", re.IGNORECASE)
HIGHER = re.compile(
    r"acc|f1|auc|bleu|rouge|precision|recall|iou|(^|[_/])(map|r2|psnr|ssim)($|[_/])", re.IGNORECASE
)


class Layers(NamedTuple):
    """One number of all layers over time."""

    tensors: list[str]
    steps: np.ndarray
    values: np.ndarray


def chosen(value: Any, library: Library, name: str) -> tuple[list[str], list[str]]:
    """The runs of a `with` (a list, or names with commas between) after the page's own, and unknown names."""
    known = library.runs()
    if isinstance(value, str):
        value = [value] if value in known else value.split(",")
    wanted = [one for one in dict.fromkeys(str(part) for part in value or []) if one and one != name]
    found = [name, *(one for one in wanted if one in known)]
    return found[:MAX_RUNS], [one for one in wanted if one not in known]


def pair_of(names: Sequence[str], one: str, two: str) -> tuple[str, str]:
    """A and B: the chosen ones if they are among the runs and two, else the first two."""
    first = one if one in names else names[0]
    second = two if two in names and two != first else next(n for n in names if n != first)
    return first, second


def settings(run: Run) -> dict[str, str]:
    """What was chosen for a run, flattened: config, optimizers, seed, versions, size."""
    info = run.info
    flat: dict[str, str] = {}
    for prefix, value in (("config", info.get("config")), ("optimizer", info.get("optimizers"))):
        _flatten(flat, prefix, value)
    for key in ("seed", "every", "git_commit", "host"):
        if info.get(key) is not None:
            flat[key] = str(info[key])
    _flatten(flat, "version", info.get("versions"))
    tensors = run.tensors()
    flat["parameters"] = integer(tensors["elements"].sum()) if len(tensors) else "0"
    flat["tensors"] = str(len(tensors))
    return flat


def _flatten(flat: dict[str, str], prefix: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(flat, f"{prefix}.{key}", inner)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, inner in enumerate(value):
            _flatten(flat, prefix if len(value) == 1 else f"{prefix}.{i}", inner)
    elif value is not None:
        flat[prefix] = value if isinstance(value, str) else json.dumps(value, default=str)


def differences(runs: Sequence[dict[str, str]]) -> tuple[list[tuple[str, ...]], int]:
    """(key, value in each run) where they differ, and how many are the same in all."""
    keys = list(dict.fromkeys(key for run in runs for key in run))
    rows = [
        (key, *(run.get(key, "–") for run in runs)) for key in keys if len({run.get(key) for run in runs}) > 1
    ]
    return rows, len(keys) - len(rows)


def scalar_names(library: Library, names: Sequence[str]) -> list[str]:
    """Scalars of any of these runs, the losses first."""
    found = {scalar for name in names for scalar in library.run(name).scalar_names()}
    return [name for name in FIRST if name in found] + sorted(found - set(FIRST))


class Ending(NamedTuple):
    """How a scalar of one run ended: its last value, and the best one with its step where best is known."""

    last: float | None
    best: float | None = None
    step: int | None = None


def direction(name: str) -> int:
    """-1: lower is better, 1: higher is; 0: nobody knows."""
    return -1 if LOWER.search(name) else 1 if HIGHER.search(name) else 0


def ending(run: Run, name: str) -> Ending:
    """How a scalar ended."""
    frame = run.scalars(name)
    if frame.empty:
        return Ending(None)
    last, sign = float(frame["value"].iloc[-1]), direction(name)
    finite = frame[np.isfinite(frame["value"])]
    if not sign or finite.empty:
        return Ending(last)
    row = finite.loc[(sign * finite["value"]).idxmax()]
    return Ending(last, float(row["value"]), int(row["step"]))


def common_layers(library: Library, names: Sequence[str]) -> list[str]:
    """The tensors of all runs, those first that every run has."""
    runs = [library.run(name).tensors()["tensor"].tolist() for name in names]
    in_all = set(runs[0]).intersection(*runs[1:])
    return sorted(dict.fromkeys(name for run in runs for name in run), key=lambda name: name not in in_all)


def norms(library: Library, run: Run, kind: str) -> Layers:
    """The norms of one kind, remembered until the run grows."""

    def make() -> Layers:
        found = run.overview(kind, "norm", POINTS)
        return Layers(found.tensors, found.steps, found.values)

    return library.memo(run, ("compare", kind), make)


def drifts(library: Library, run: Run) -> Layers:
    """Relative distances from the reference, remembered until the run grows."""

    def make() -> Layers:
        frame = run.drift(max_points=POINTS)
        found = build(frame, frame["relative_l2"].to_numpy())
        return Layers(found.names, found.steps, found.values)

    return library.memo(run, ("compare", "drift"), make)


def parting(library: Library, a: Run, b: Run) -> tuple[Parting, Pair]:
    """Where two runs part by their weight and gradient norms, and how their weights match."""
    kinds = ("weight", "gradient")
    tables = {kind: (norms(library, a, kind), norms(library, b, kind)) for kind in kinds}
    return part(tables), pair(*tables["weight"])


def parting_sentence(found: Parting, a: str, b: str) -> str:
    """What was found, in words."""
    if not found.compared:
        return (
            f"{a} and {b} have no layer of one name that was captured at about the same step, "
            "so where they part cannot be said."
        )
    if found.identical:
        return (
            f"{a} and {b} are identical: every weight norm and gradient norm is the same at all "
            f"{integer(found.compared)} common captures, until step {integer(found.identical_until)}."
        )
    limit = f"{number(100 * TOLERANCE)} %"
    if found.identical_until is None:
        start = f"{a} and {b} differ from the first common capture on."
    else:
        start = f"{a} and {b} are identical until step {integer(found.identical_until)}."
    if found.step is None:
        return f"{start} No norm of a layer differs by more than {limit} for good."
    return (
        f"{start} They part at step {integer(found.step)}, in {found.tensor}: from there on its {found.kind} "
        f"norm differs by more than {limit} for good ({number(found.a)} against {number(found.b)})."
    )


def matching_note(both: Pair, a: str, b: str) -> str:
    """Which layers have no counterpart, and how captures were matched."""
    parts = [f"{integer(len(both.tensors))} layers are in both."]
    for run, names in ((a, both.only_a), (b, both.only_b)):
        if names:
            more = f" and {integer(len(names) - 3)} more" if len(names) > 3 else ""
            parts.append(f"Only in {run}: {', '.join(names[:3])}{more}.")
    if len(both.steps) and not both.exact:
        pairs = integer(len(both.steps))
        parts.append(f"The runs were captured at different steps: {pairs} nearest pairs are compared.")
    return " ".join(parts)
