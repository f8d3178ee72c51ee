"""`History`: what detectors see of a run, as arrays aligned by captured step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, SupportsInt, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..findings import Finding, Number, Severity
from .matrices import Matrices

if TYPE_CHECKING:
    from ..normal import Normal

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Answer = TypeVar("Answer")

#: Names under which the training and the validation loss are looked for, in this order.
TRAIN_LOSS = ("train_loss", "loss", "train/loss", "training_loss")
VAL_LOSS = ("val_loss", "eval_loss", "valid_loss", "validation_loss", "val/loss", "eval/loss")
#: Weights with two or more dimensions that multiply activations.
MATRICES = ("matrix", "conv", "output")
#: So many consecutive captures must agree before a mechanism counts (diagnosis practice: 3).
PERSISTENT = 3


class Series(NamedTuple):
    """A scalar by step."""

    step: Ints
    value: Floats


class Source(Protocol):
    """What a history is made from: a `Run`, or `Arrays`."""

    name: str
    info: dict[str, Any]

    def scalars(self, name: str) -> pd.DataFrame: ...
    def scalar_names(self) -> list[str]: ...
    def tensors(self) -> pd.DataFrame: ...
    def modules(self) -> pd.DataFrame: ...
    def stats(
        self, kind: str, tensor: str | None = None, columns: Sequence[str] | None = None
    ) -> pd.DataFrame: ...
    def drift(self) -> pd.DataFrame: ...
    def activity(self, kind: str, tensor: str) -> tuple[Ints, Bools]: ...
    def events(self) -> pd.DataFrame: ...
    def checksums(self) -> pd.DataFrame: ...


@dataclass
class Arrays:
    """A history's source from plain arrays, for tests and for logs of other tools.

    Attributes:
        losses: scalar name -> (steps, values). layers: one mapping per parameter (tensor, role, shape, ...).
        rows: kind -> tensor -> column -> values by step, with a column `step`.
        active: (kind, tensor) -> (steps (n,), bool (n, units)).
        copies: rows of `Run.checksums`.
    """

    name: str = "run"
    info: dict[str, Any] = field(default_factory=dict)
    losses: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    layers: Sequence[Mapping[str, Any]] = ()
    leaves: Sequence[Mapping[str, Any]] = ()
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    active: Mapping[tuple[str, str], tuple[Any, Any]] = field(default_factory=dict)
    happened: Sequence[Mapping[str, Any]] = ()
    copies: Sequence[Mapping[str, Any]] = ()

    def scalar_names(self) -> list[str]:
        return sorted(self.losses)

    def scalars(self, name: str) -> pd.DataFrame:
        steps, values = self.losses.get(name, ((), ()))
        return pd.DataFrame({"step": np.asarray(steps, np.int64), "value": np.asarray(values, np.float64)})

    def tensors(self) -> pd.DataFrame:
        defaults = {"state": "trainable", "trainable": True, "dtype": "float32", "shape": [], "module": ""}
        rows = [
            {**defaults, "names": [e["tensor"]], "elements": math.prod(e.get("shape", [1])), **e, "depth": i}
            for i, e in enumerate(self.layers)
        ]
        columns = "tensor names role shape elements dtype module depth trainable state"
        return pd.DataFrame(rows, columns=columns.split())

    def modules(self) -> pd.DataFrame:
        rows = [{**e, "depth": i} for i, e in enumerate(self.leaves)]
        return pd.DataFrame(rows, columns=["module", "type", "depth"])

    def stats(
        self, kind: str, tensor: str | None = None, columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        return self._frame(kind)

    def drift(self) -> pd.DataFrame:
        return self._frame("drift")

    def _frame(self, kind: str) -> pd.DataFrame:
        tensors = self.rows.get(kind, {})
        sizes = {name: len(columns["step"]) for name, columns in tensors.items()}
        found: dict[str, Any] = {"step": np.empty(0, np.int64)} if not tensors else {}
        for column in dict.fromkeys(c for columns in tensors.values() for c in columns):
            parts = [
                np.broadcast_to(columns.get(column, np.nan), sizes[name]) for name, columns in tensors.items()
            ]
            found[column] = np.concatenate(parts)
        return pd.DataFrame({**found, "tensor": np.repeat(list(sizes), list(sizes.values()))})

    def activity(self, kind: str, tensor: str) -> tuple[Ints, Bools]:
        steps, units = self.active.get((kind, tensor), ((), np.empty((0, 0))))
        return np.asarray(steps, np.int64), np.asarray(units, bool)

    def events(self) -> pd.DataFrame:
        return pd.DataFrame(list(self.happened), columns=["step", "time", "event", "message"])

    def checksums(self) -> pd.DataFrame:
        return pd.DataFrame(list(self.copies), columns=["step", "tensor", "part", "rank", "checksum"])


def _kept(method: Callable[..., Answer]) -> Callable[..., Answer]:
    """Compute a method's answer once per history."""

    @functools.wraps(method)
    def answer(self: History, *args: Any) -> Answer:
        key = (method.__name__, *args)
        if key not in self._answers:
            self._answers[key] = method(self, *args)
        return self._answers[key]

    return answer


class History:
    """A run as detectors see it. Everything is computed when first asked for, then kept.

    Per-tensor tables have one row per captured step (`steps`) and one column per tensor asked for; NaN where
    a tensor has no row. Steps where every captured gradient was skipped by a loss scaler are marked in
    `skipped`.
    """

    def __init__(self, source: Source, matrices: Matrices | None = None):
        self.source = source
        self._matrices = matrices or Matrices(source)
        self.name, self.info = source.name, source.info
        self.normal: Normal | None = None  # of its baselines
        self._answers: dict[tuple, Any] = {}

    # ---- the model

    @functools.cached_property
    def tensors(self) -> pd.DataFrame:
        """The parameters by name, in order of definition (`Run.tensors`)."""
        return self.source.tensors().set_index("tensor", drop=False)

    @functools.cached_property
    def modules(self) -> dict[str, str]:
        """Leaf modules in order of definition: name -> type."""
        frame = self.source.modules()
        return dict(zip(frame["module"], frame["type"], strict=True))

    @_kept
    def names(self, *roles: str) -> tuple[str, ...]:
        """Trainable tensors of these roles (all when none is given), in order of definition."""
        table = self.tensors
        keep = table["trainable"].astype(bool)
        if roles:
            keep &= table["role"].isin(roles)
        return tuple(table.index[keep])

    def of(self, tensor: str, column: str) -> Any:
        """One field of a tensor (`Run.tensors`): role, shape, module, depth, ..."""
        return self._fields[tensor][column]

    @functools.cached_property
    def _fields(self) -> dict[str, dict[str, Any]]:
        """`tensors` by name and column: a data frame is slow where single fields are asked for."""
        table = self.tensors
        rows = zip(*(table[column] for column in table.columns), strict=True)
        return {
            name: dict(zip(table.columns, row, strict=True))
            for name, row in zip(table.index, rows, strict=True)
        }

    def role(self, tensor: str) -> str:
        return str(self.of(tensor, "role")) if tensor in self.tensors.index else "other"

    @functools.cached_property
    def output(self) -> str | None:
        """The last matrix that receives gradient: as far as the order tells, it makes the predictions."""
        names = self.names(*MATRICES)
        reached = np.nan_to_num(self.table("gradient", "norm", names)) > 0
        used = [n for n, hit in zip(names, np.any(reached, axis=0), strict=True) if hit]
        return used[-1] if used else None

    # ---- captured steps

    @functools.cached_property
    def steps(self) -> Ints:
        """Captured steps, ascending: those with gradients, updates or activations; else with weights."""
        found = [self._matrices.grid(kind).steps for kind in ("gradient", "update", "activation")]
        steps = functools.reduce(np.union1d, found)
        return steps if steps.size else self._matrices.grid("weight").steps

    @property
    def captures(self) -> int:
        return int(self.steps.size)

    @functools.cached_property
    def slack(self) -> int:
        """Steps by which the order of two events is uncertain: the usual distance of captures."""
        return int(np.median(np.diff(self.steps))) if self.captures > 1 else 1

    def measured(self, kind: str) -> tuple[str, ...]:
        """The tensors or modules that have rows of this kind, in order of definition."""
        order = {name: place for place, name in enumerate([*self.tensors.index, *self.modules])}
        found = self._matrices.grid(kind).names
        return tuple(sorted(found, key=lambda name: (order.get(name, len(order)), name)))

    def table(self, kind: str, column: str, names: tuple[str, ...]) -> Floats:
        """A column of statistics as (captures, len(names)) float64. Shared: copy before changing it."""
        return self._matrices.grid(kind, column).take(column, names, self.steps)

    def has_state(self, names: tuple[str, ...], *states: str) -> Bools:
        """Where a tensor is in one of these states (in any when none is given): (captures, len(names))."""
        grid = self._matrices.grid("weight", "state")
        found = grid.take("state", names, self.steps)
        if not states:
            return ~np.isnan(found)
        hits = [found == grid.words[state] for state in states if state in grid.words]
        return functools.reduce(np.logical_or, hits, np.zeros(found.shape, bool))

    @_kept
    def states(self, names: tuple[str, ...]) -> NDArray[np.object_]:
        """The state of each tensor as (captures, len(names)); None where unknown. `has_state` is faster."""
        grid = self._matrices.grid("weight", "state")
        words = np.array([*grid.words, None], object)
        return words[np.nan_to_num(grid.take("state", names, self.steps), nan=-1).astype(np.int64)]

    @functools.cached_property
    def skipped(self) -> Bools:
        """Captures whose step a loss scaler skipped."""
        out = np.zeros(self.captures, bool)
        for kind in ("gradient", "weight"):
            out |= (self.table(kind, "skipped", self.measured(kind)) > 0).any(axis=1)
        return out

    @_kept
    def initial(self, column: str, names: tuple[str, ...]) -> Floats:
        """A statistic of the weights before the first step, (len(names),)."""
        grid = self._matrices.grid("initial_weight", column)
        found = grid.take(column, names, grid.steps)
        if not found.shape[0]:
            return np.full(len(names), np.nan)
        first = np.argmax(~np.isnan(found), axis=0)
        return found[first, np.arange(len(names))]

    # ---- scalars

    @_kept
    def scalar(self, *names: str) -> Series:
        """The first of these scalars that was logged; values logged at the same step are averaged."""
        known = set(self.source.scalar_names())
        name = next((n for n in names if n in known), None)
        if name is None:
            return Series(np.empty(0, np.int64), np.empty(0))
        frame = self.source.scalars(name)
        steps, values = frame["step"].to_numpy(np.int64), frame["value"].to_numpy(np.float64)
        unique, index = np.unique(steps, return_inverse=True)
        # A plain mean, not pandas': one NaN among the values of a step must show.
        return Series(
            unique, np.bincount(index, values, unique.size) / np.bincount(index, minlength=unique.size)
        )

    @property
    def train_loss(self) -> Series:
        return self.scalar(*TRAIN_LOSS)

    @property
    def val_loss(self) -> Series:
        return self.scalar(*VAL_LOSS)

    @functools.cached_property
    def last_step(self) -> int:
        ends = [int(s[-1]) for s in (self.steps, self.train_loss.step, self.val_loss.step) if len(s)]
        return max(ends, default=-1)

    @functools.cached_property
    def resumed(self) -> bool:
        """The training went on from a checkpoint of itself: its start is no start."""
        return bool((self.source.events()["event"] == "restart").any())

    # ---- results

    def finding(
        self,
        problem: str,
        severity: Severity,
        summary: str,
        *,
        first: SupportsInt,
        last: SupportsInt | None = None,
        layers: Iterable[str] = (),
        evidence: Mapping[str, Number] | None = None,
        advice: str = "",
        confidence: float = 0.9,
    ) -> Finding:
        """A finding about this run."""
        return Finding(
            run=self.name,
            problem=problem,
            severity=severity,
            layers=tuple(layers),
            first_step=int(first),
            last_step=int(self.last_step if last is None else last),
            summary=summary,
            evidence={k: v if isinstance(v, str) else _round(v) for k, v in (evidence or {}).items()},
            advice=advice,
            confidence=confidence,
        )


def _round(value: float) -> float | int:
    """Four significant digits: evidence is read by people."""
    if isinstance(value, int | np.integer):
        return int(value)
    return float(f"{float(value):.4g}")


def portion(value: float) -> str:
    """A share for a sentence: "35% of", or "210 times" when a percentage would be hard to read."""
    return f"{value:.0%} of" if value < 10 else f"{value:.2g} times"


def persistent(hits: Bools, least: int = PERSISTENT) -> int | None:
    """Index where the first stretch of at least `least` consecutive hits begins, or None.

    >>> persistent(np.array([True, False, True, True, True]))
    2
    """
    run = 0
    for index, hit in enumerate(hits):
        run = run + 1 if hit else 0
        if run >= least:
            return index - least + 1
    return None


def lasting(hits: Bools, least: int = PERSISTENT) -> int | None:
    """Index where the hits begin that hold until the end, at least `least` of them, or None.

    >>> lasting(np.array([True, False, True, True, True]))
    2
    """
    misses = np.flatnonzero(~hits)
    begin = int(misses[-1]) + 1 if misses.size else 0
    return begin if hits.size - begin >= least else None


def nanmedian(values: Floats, axis: int | None = None) -> Any:
    """Median of the finite values; NaN without a warning where there is none."""
    values = np.where(np.isfinite(values), values, np.nan)
    if axis is None:
        values = values[~np.isnan(values)]
        return float(np.median(values)) if values.size else math.nan
    if not values.shape[axis]:
        return np.full(np.delete(values.shape, axis), np.nan)
    values.sort(axis=axis)  # NaN goes to the end; much faster than numpy's nanmedian
    known = np.expand_dims(np.count_nonzero(~np.isnan(values), axis=axis), axis)
    low, high = (np.take_along_axis(values, np.maximum(at, 0), axis) for at in ((known - 1) // 2, known // 2))
    middle = np.where(known % 2 == 1, low, 0.5 * low + 0.5 * high)
    return np.where(known > 0, middle, np.nan).squeeze(axis)
