"""Runs as states to compare: what their logs hold of the weights at a step, against another run or a file.

A log holds no weights, but: norm, mean and std of every tensor at captured steps; the values of small ones;
sketches at anchors (`watch(anchors=...)`), from which distances follow with a stated error; and at every
capture the distance from the reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..errors import RunError, WeightsError
from ..sketch import COUNTERS, add_sketch, anchor, relative_error
from .moving import Change, change_of
from .names import block_of, matched, role_of
from .report import Drift, list_problems
from .source import Entry, Weights
from .yardstick import Reach, judge, reaches

if TYPE_CHECKING:
    from ..run import Run

INITIAL, REFERENCE = "initial", "reference"
_NO_TABLE = np.empty(0, np.float32)


@dataclass(frozen=True)
class Known:
    """What is known of one tensor: its shape, and of its elements what there is.

    `values`: all elements, flat; or `sketch`: (COUNTERS,); or neither.
    """

    entry: Entry
    role: str
    norm: float
    mean: float
    std: float
    values: NDArray[np.float64] | None = None
    sketch: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class RunAt:
    """A run after one of its captured steps; "initial": before the first; "reference": what its drift is
    measured from.

    Raises:
        RunError: no capture is so early, or the weights before the first step were not logged.
    """

    run: Run
    step: int | str

    @classmethod
    def of(cls, run: Run, step: int | str | None = None) -> RunAt:
        """The last capture up to `step`; None: the last of all; "initial" or "start": before the first
        step; "reference"."""
        if step in (INITIAL, "start"):
            return cls(run, INITIAL)
        if step == REFERENCE:
            if not run.info.get("reference"):
                raise RunError(f"expected a run with a reference, but {run.name} measured no drift")
            return cls(run, REFERENCE)
        if step not in (None, "last", "end") and not str(step).isdigit():
            raise RunError(
                f"expected a step of {run.name} as a number, start, reference or last, got {step!r}"
            )
        last = None if step in (None, "last", "end") else int(step)  # type: ignore[arg-type]
        captured = run.stats("weight", columns=["step"], steps=(None, last))["step"]
        if captured.empty:
            upto = "" if last is None else f" up to step {last}"
            raise RunError(f"expected a run with captured weights{upto}, but {run.name} has none")
        return cls(run, int(captured.max()))

    @property
    def label(self) -> str:
        if self.step == REFERENCE:
            return str(self.run.info["reference"])
        return f"{self.run.name} at {'the start' if self.step == INITIAL else f'step {self.step}'}"

    def check_logged(self) -> None:
        """The log holds weights of this state, as far as it ever does.

        Raises:
            RunError: it is the reference.
        """
        if self.step == REFERENCE:
            raise RunError(
                f"expected {self.run.name} at a captured step: of its reference the log has the distance only"
            )

    def known(self) -> dict[str, Known]:
        """Tensor -> what the log holds of it at this step."""
        self.check_logged()
        kind = "initial_weight" if self.step == INITIAL else "weight"
        columns = ["step", "tensor", "count", "norm", "mean", "std"]
        stats = self.run.stats(kind, columns=columns)
        if self.step != INITIAL:
            stats = stats[stats["step"] == self.step]
        if stats.empty:
            raise RunError(f"expected {self.label}, but those weights were not logged")
        stats = stats.drop_duplicates("tensor").set_index("tensor")
        table = {t["tensor"]: t for t in self.run.info.get("tensors", [])}
        values, sketches = self._values(), self._sketches()
        found = {}
        for name, line in stats.iterrows():
            told = table.get(str(name), {})
            shape = tuple(told.get("shape") or (int(line["count"]),))
            entry = Entry(str(name), shape, str(told.get("dtype", "float32")))
            sketch = sketches.get(str(name))
            whole = values.get(str(name))
            if sketch is not None and entry.numbers <= COUNTERS:
                whole, sketch = sketch, None
            role = str(told.get("role") or role_of(str(name), shape))
            numbers = (float(line[column]) for column in ("norm", "mean", "std"))
            found[str(name)] = Known(entry, role, *numbers, whole, sketch)
        return found

    def _values(self) -> dict[str, NDArray[np.float64]]:
        if self.step == INITIAL:
            return {}
        found = {}
        for name in self.run.names("weight"):
            steps, values = self.run.values(name)
            at = np.flatnonzero(steps == self.step)
            if len(at):
                found[name] = values[at[-1]]
        return found

    def _sketches(self) -> dict[str, NDArray[np.float64]]:
        try:
            rows = anchor(self.run, self.run._log, self.step)
        except ValueError:  # no anchor
            return {}
        return {
            str(t): np.asarray(v, np.float64) for t, v in zip(rows["tensor"], rows["values"], strict=True)
        }


def known_of(weights: Weights, like: Mapping[str, Known]) -> tuple[dict[str, Known], list[str]]:
    """The same of a file's tensors, sketched under the names that the run has for them; and the stored names
    of those that it has not."""
    found = {}
    same = matched(weights.entries, {name: known.entry for name, known in like.items()})
    for here, there in same.pairs.values():
        entry = weights.entries[here]
        if not entry.is_float:
            continue
        small = entry.numbers <= COUNTERS
        counters, total, squares, start = np.zeros(COUNTERS), 0.0, 0.0, 0
        blocks = []
        for block in weights.blocks(here):
            if small:
                blocks.append(block.astype(np.float64))
            if like[there].sketch is not None:
                add_sketch(np.ascontiguousarray(block), there, counters, start=start)
            start += len(block)
            total += float(block.sum(dtype=np.float64))
            squares += float(np.square(block, dtype=np.float64).sum())
        mean = total / max(start, 1)
        std = math.sqrt(max(squares / max(start, 1) - mean * mean, 0.0))
        whole = np.concatenate(blocks) if small else None
        found[there] = Known(entry, like[there].role, math.sqrt(squares), mean, std, whole, counters)
    return found, same.only_in_a


def compare_runs(a: RunAt | Weights, b: RunAt | Weights, reached: Mapping[str, Reach] | None = None) -> Drift:
    """Compare two states of which at least one is a run's.

    Args:
        reached: see `compare_weights`; None: what the updates of b's run between the two states could reach,
            where both are of one run, or a is its reference.
    """
    if reached is None and isinstance(b, RunAt):
        reached = _updates_between(a, b)
    exact = _from_reference(a, b)
    if exact is not None:
        judge(exact.rows, reached)
        return exact
    known_a, known_b, more_a, more_b = _known(a, b)
    drift = Drift(a.label, b.label)
    same = matched({n: k.entry for n, k in known_a.items()}, {n: k.entry for n, k in known_b.items()})
    drift.only_in_a, drift.only_in_b = same.only_in_a + more_a, same.only_in_b + more_b
    list_problems(drift, *(state for state in (a, b) if isinstance(state, Weights)))
    for name, (here, there) in same.pairs.items():
        _compare(drift, name, known_a[here], known_b[there])
    if any(row["relative_l2"] is None and row["norm_a"] for row in drift.rows):
        drift.notes.append(
            "norms, means and deviations only where no distance is given: the log holds no sketch of these "
            "weights. watch(anchors=...) stores sketches; a weight file has everything; RUN@reference is "
            "what the run itself measured its drift from"
        )
    judge(drift.rows, reached)
    return drift


def _known(
    a: RunAt | Weights, b: RunAt | Weights
) -> tuple[dict[str, Known], dict[str, Known], list[str], list[str]]:
    """What is known of both, and what each has besides."""
    if isinstance(a, RunAt) and isinstance(b, RunAt):
        return a.known(), b.known(), [], []
    if isinstance(a, RunAt) and isinstance(b, Weights):
        known = a.known()
        other, more = known_of(b, known)
        return known, other, [], more
    if isinstance(a, Weights) and isinstance(b, RunAt):
        known = b.known()
        other, more = known_of(a, known)
        return other, known, more, []
    raise WeightsError("expected at least one run; compare_weights compares two files")


def _compare(drift: Drift, name: str, a: Known, b: Known) -> None:
    if a.entry.dtype != b.entry.dtype:
        drift.retyped.append({"tensor": name, "dtype_a": a.entry.dtype, "dtype_b": b.entry.dtype})
    if a.entry.shape != b.entry.shape:
        drift.reshaped.append(
            {"tensor": name, "shape_a": list(a.entry.shape), "shape_b": list(b.entry.shape)}
        )
        return
    facts: dict[str, Any] = dict.fromkeys(Change().facts())
    facts |= {"elements": a.entry.elements, "not_finite": None}
    error: float | None = None
    if a.values is not None and b.values is not None and len(a.values) == len(b.values):
        change = change_of((a.values, _NO_TABLE), (b.values, _NO_TABLE))
        drift.changes[name], error = change, 0.0
        facts = change.facts()
    elif a.sketch is not None and b.sketch is not None:
        distance, error = float(np.linalg.norm(b.sketch - a.sketch)), relative_error(COUNTERS)
        both = 2 * a.norm * b.norm
        facts |= {"distance": distance, "relative_l2": distance / a.norm if a.norm > 0 else None}
        facts["cosine"] = min(1.0, (a.norm**2 + b.norm**2 - distance**2) / both) if both > 0 else None
    facts |= {
        f"{what}_{side}": getattr(k, what)
        for side, k in (("a", a), ("b", b))
        for what in ("norm", "mean", "std")
    }
    drift.rows.append(
        _head(name, a.role, a.entry.shape, a.entry.dtype, b.entry.dtype) | facts | {"error": error}
    )


def _head(name: str, role: str, shape: tuple[int, ...], old: str, new: str) -> dict[str, Any]:
    facts = {"tensor": name, "role": role, "block": block_of(name), "shape": list(shape)}
    return facts | {"dtype_a": old, "dtype_b": new}


def _from_reference(a: RunAt | Weights, b: RunAt | Weights) -> Drift | None:
    """The logged distance from the reference, where a is it: of every captured step, with sign flips."""
    if not isinstance(b, RunAt) or not isinstance(b.step, int) or not _is_reference(a, b.run):
        return None
    frame = b.run.drift(steps=(b.step, b.step))
    if frame.empty:
        return None
    drift = Drift(a.label, b.label)
    table = {t["tensor"]: t for t in b.run.info.get("tensors", [])}
    norms = b.run.stats("weight", columns=["step", "tensor", "norm", "mean", "std"], steps=(b.step, b.step))
    norms = norms.drop_duplicates("tensor").set_index("tensor")
    known = b.run.info.get("references", {})
    for line in frame.to_dict("records"):
        name = line["tensor"]
        told = table.get(name, {})
        shape, kind = tuple(told.get("shape", ())), told.get("dtype", "float32")
        facts = dict.fromkeys(Change().facts()) | {
            "elements": int(line["count"]),
            "norm_a": line["reference_norm"],
            "sign_flips": None if pd.isna(line["sign_flips"]) else int(line["sign_flips"]),
            **{
                key: None if pd.isna(line[key]) else line[key]
                for key in ("relative_l2", "distance", "cosine")
            },
        }
        if name in norms.index:
            facts |= {f"{what}_b": float(norms.at[name, what]) for what in ("norm", "mean", "std")}  # type: ignore[arg-type]
        role = told.get("role") or role_of(name, shape)
        error = known.get(name, {}).get("error", 0.0)
        drift.rows.append(_head(name, role, shape, kind, kind) | facts | {"error": error})
    return drift


def _is_reference(a: RunAt | Weights, run: Run) -> bool:
    reference = run.info.get("reference")
    if isinstance(a, RunAt):
        wanted = (INITIAL, REFERENCE) if reference == "start" else (REFERENCE,)
        return bool(reference) and a.step in wanted and a.run.path == run.path
    try:
        return bool(reference) and Path(str(reference)).resolve() == Path(a.label).resolve()
    except (OSError, ValueError):
        return False


def _updates_between(a: RunAt | Weights, b: RunAt) -> dict[str, Reach] | None:
    if b.step == INITIAL:
        return None
    if isinstance(a, RunAt):
        if a.run.path != b.run.path:
            return None
        first = int(a.step) + 1 if isinstance(a.step, int) else None
        return reaches(b.run, first, int(b.step))
    return reaches(b.run, None, int(b.step)) if _is_reference(a, b.run) else None
