"""Two states of a model compared tensor by tensor: what moved, what is not in both, what is unusual."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import WeightsError
from .adapted import Adapted
from .moving import Change, change_of, changes, coded
from .names import Matched, block_of, matched, role_of
from .output import output_layers
from .source import COMPLEX, Entry, Weights
from .spectrum import spectra
from .yardstick import Reach, judge

if TYPE_CHECKING:
    import pandas as pd

BY = ("layer", "block", "role")


@dataclass
class Drift:
    """How far one state of a model is from another.

    Attributes:
        a, b: what was compared.
        rows: of each tensor in both, of one shape, in the order of b: see `tensors`.
        only_in_a, only_in_b: stored names without a counterpart.
        reshaped: tensor, shape_a, shape_b; where only the first dimension differs also rows and relative_l2:
            of the rows that both have.
        retyped: tensor, dtype_a, dtype_b; they are compared all the same.
        not_compared: tensor, why: integers, packed or damaged tensors, missing shards; of integers of one
            shape also how many `differ`.
        output: what the output layers' biases imply, see `output.output_layers`.
        notes: what else is to know.
    """

    a: str
    b: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    reshaped: list[dict[str, Any]] = field(default_factory=list)
    retyped: list[dict[str, Any]] = field(default_factory=list)
    not_compared: list[dict[str, Any]] = field(default_factory=list)
    output: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changes: dict[str, Change] = field(default_factory=dict, repr=False)

    @property
    def tensors(self) -> pd.DataFrame:
        """One row for each tensor: tensor, role, block, shape, dtype_a, dtype_b, elements, not_finite,
        relative_l2 = |b - a| / |a|, distance = |b - a|, cosine, max_abs_change, sign_flips, share_changed,
        norm_a, norm_b, mean_a, ..., std_b, error (of relative_l2, where it is estimated), like, times_like,
        random_walk, times_random_walk, unusual; singular values where they were asked for. NaN: not
        defined."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def histogram(self, tensor: str) -> pd.DataFrame:
        """The change of a tensor: low, high, count; elements that did not change are the row (0, 0).

        Raises:
            KeyError: no such tensor was compared element by element.
        """
        import pandas as pd

        return pd.DataFrame(dict(zip(("low", "high", "count"), self.changes[tensor].buckets(), strict=True)))

    def groups(self, by: str = "block") -> list[dict[str, Any]]:
        """The same numbers of all tensors of a layer, block or role together, as if they were one tensor.

        Of estimated tensors distances only.

        Raises:
            ValueError: `by` is none of the three.
        """
        if by not in BY:
            raise ValueError(f"expected by as one of {', '.join(BY)}, got {by!r}")
        members: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            layer = row["tensor"].rpartition(".")[0] or row["tensor"]
            members.setdefault(layer if by == "layer" else row[by], []).append(row)
        found = []
        for name, rows in members.items():
            parts = [self.changes[row["tensor"]] for row in rows if row["tensor"] in self.changes]
            facts = sum(parts, Change()).facts() if len(parts) == len(rows) else _together(rows)
            found.append({by: name, "tensors": len(rows), **facts})
        return found

    def to_dict(self, by: str | None = None, histograms: bool = False) -> dict[str, Any]:
        """What `layerwatch drift --format json` prints: plain values, None for what is not defined."""
        names = (
            "a", "b", "only_in_a", "only_in_b", "reshaped", "retyped", "not_compared", "output", "notes",
        )  # fmt: skip
        rows = self.rows
        if histograms:
            rows = [row | {"histogram": self._histogram(row["tensor"])} for row in rows]
        found = {"version": 1, "tensors": rows, **{name: getattr(self, name) for name in names}}
        if by is not None:
            found["groups"] = self.groups(by)
        return _plain(found)

    def to_json(self, by: str | None = None, histograms: bool = False) -> str:
        return json.dumps(self.to_dict(by, histograms), indent=1, allow_nan=False)

    def write_parquet(self, path: str | Path) -> None:
        """One row for each tensor, with its histogram as the lists low, high, count."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, list[Any]] = {}
        for name in dict.fromkeys(key for row in self.rows for key in row):
            columns[name] = [_plain(row.get(name)) for row in self.rows]
        buckets = [self.changes.get(row["tensor"], Change()).buckets() for row in self.rows]
        for place, name in enumerate(("low", "high", "count")):
            columns[name] = [found[place].tolist() for found in buckets]
        table = pa.table({name: pa.array(values) for name, values in columns.items()})
        words = ("like", "unusual")
        empty = {
            f.name: pa.string() if f.name in words else pa.float64()
            for f in table.schema
            if f.type == pa.null()
        }
        schema = pa.schema([pa.field(f.name, empty.get(f.name, f.type)) for f in table.schema])
        pq.write_table(table.cast(schema), path)

    def _histogram(self, tensor: str) -> dict[str, Any] | None:
        if tensor not in self.changes:
            return None
        low, high, count = self.changes[tensor].buckets()
        return {"low": low.tolist(), "high": high.tolist(), "count": count.tolist()}


def _together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Distances of tensors of which only those are known."""
    known = [row for row in rows if row["distance"] is not None and row["norm_a"] is not None]
    distance = math.sqrt(sum(row["distance"] ** 2 for row in known))
    norm = math.sqrt(sum(row["norm_a"] ** 2 for row in known))
    after = math.sqrt(sum(row["norm_b"] ** 2 for row in known if row["norm_b"] is not None))
    flips = [row["sign_flips"] for row in rows]
    return {
        "elements": sum(row["elements"] for row in rows),
        "relative_l2": distance / norm if norm else None,
        "distance": distance,
        "cosine": (norm**2 + after**2 - distance**2) / (2 * norm * after) if norm and after else None,
        "sign_flips": None if None in flips else sum(flips),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare_weights(
    a: Weights,
    b: Weights,
    *,
    spectrum: bool = False,
    seconds: float = 60.0,
    reaches: Mapping[str, Reach] | None = None,
    advance: Callable[[str], None] | None = None,
) -> Drift:
    """Compare two states element by element, reading both once.

    Args:
        spectrum: also singular values and vectors of matrices, those that moved furthest first, for so many
            `seconds`.
        reaches: what the logged updates could reach, by canonical name.
        advance: called with the name of each tensor that is done.
    """
    same = matched(a.entries, b.entries)
    drift = Drift(a.label, b.label, only_in_a=same.only_in_a, only_in_b=same.only_in_b)
    names = {pair: name for name, pair in same.pairs.items()}
    list_problems(drift, a, b)
    comparable = [pair for name, pair in same.pairs.items() if _comparable(drift, a, b, name, pair)]
    for pair, change in changes(a, b, comparable):
        name = names[pair]
        if isinstance(change, Change):
            drift.changes[name] = change
            drift.rows.append(_row(name, a.entries[pair[0]], b.entries[pair[1]], change))
        else:
            drift.not_compared.append({"tensor": name, "why": str(change)})
        if advance is not None:
            advance(name)
    judge(drift.rows, reaches)
    if isinstance(b, Adapted):
        _add_ranks(drift, b, same)
    if spectrum:
        _add_spectra(drift, a, b, same, seconds)
    try:
        drift.output = output_layers(a, b, same)
    except WeightsError as error:
        drift.notes.append(str(error))
    return drift


def _row(name: str, old: Entry, new: Entry, change: Change) -> dict[str, Any]:
    facts = change.facts()
    if old.dtype.startswith("complex"):
        facts |= {"sign_flips": None}  # of no meaning
    return {
        "tensor": name,
        "role": role_of(name, old.shape),
        "block": block_of(name),
        "shape": list(old.shape),
        "dtype_a": old.dtype,
        "dtype_b": new.dtype,
        **facts,
        "error": 0.0,
    }


def list_problems(drift: Drift, *states: Weights) -> None:
    """List what cannot be read; its counterpart is not said to be in the other state only."""
    for weights in states:
        for name, why in weights.problems.items():
            drift.not_compared.append({"tensor": name, "why": f"{weights.label}: {why}"})
        for left in (drift.only_in_a, drift.only_in_b):
            left[:] = [name for name in left if name not in weights.problems]


def _comparable(drift: Drift, a: Weights, b: Weights, name: str, pair: tuple[str, str]) -> bool:
    old, new = a.entries[pair[0]], b.entries[pair[1]]
    if old.dtype != new.dtype:
        drift.retyped.append({"tensor": name, "dtype_a": old.dtype, "dtype_b": new.dtype})
    if old.shape != new.shape:
        drift.reshaped.append(
            {"tensor": name, "shape_a": list(old.shape), "shape_b": list(new.shape)}
            | _common_rows(a, b, pair, old, new)
        )
        return False
    if old.is_float and new.is_float and old.numbers == new.numbers:
        return True
    found: dict[str, Any] = {"tensor": name, "why": _why_not(old, new)}
    if old.numbers == new.numbers and not (old.is_float or new.is_float):
        try:
            found["differ"] = sum(
                int((x != y).sum()) for x, y in zip(a.blocks(pair[0]), b.blocks(pair[1]), strict=True)
            )
        except WeightsError as error:
            found["why"] = str(error)
    drift.not_compared.append(found)
    return False


def _why_not(old: Entry, new: Entry) -> str:
    kinds = old.dtype if old.dtype == new.dtype else f"{old.dtype} and {new.dtype}"
    if old.is_float and new.is_float:
        return f"{kinds}: complex and real numbers"
    return f"{kinds}: no weights to measure a distance between; quantised ones must be dequantised first"


def _common_rows(a: Weights, b: Weights, pair: tuple[str, str], old: Entry, new: Entry) -> dict[str, Any]:
    """Embeddings and output layers grow by rows: how far those moved that both have."""
    grown = len(old.shape) == len(new.shape) >= 1 and old.shape[1:] == new.shape[1:]
    if not (grown and old.is_float and new.is_float and (old.dtype in COMPLEX) == (new.dtype in COMPLEX)):
        return {}
    rows = min(old.shape[0], new.shape[0])
    numbers = min(old.numbers, new.numbers)
    found = Change()
    try:
        for start in range(0, numbers, 1 << 20):
            stop = min(start + (1 << 20), numbers)
            found += change_of(coded(a, pair[0], start, stop), coded(b, pair[1], start, stop))
    except WeightsError:
        return {}
    return {"rows": rows, "relative_l2": found.facts()["relative_l2"]}


def _add_ranks(drift: Drift, b: Adapted, same: Matched) -> None:
    """The rank of what an adapter adds, from its factors."""
    for row in drift.rows:
        product = b.product(same.pairs[row["tensor"]][1])
        if product is not None:
            row |= {"rank_change": product.rank, "stable_rank_change": product.stable_rank}


def _add_spectra(drift: Drift, a: Weights, b: Weights, same: Matched, seconds: float) -> None:
    """Singular values of as many matrices as there is time for, those that moved furthest first."""
    matrices = [row for row in drift.rows if _is_matrix(row)]
    matrices.sort(key=lambda row: -(row["relative_l2"] or 0.0))
    until = time.monotonic() + seconds
    for place, row in enumerate(matrices):
        try:
            row |= spectra(a, b, same.pairs[row["tensor"]], until)
        except TimeoutError:
            left = f"{len(matrices) - place} of {len(matrices)} matrices"
            drift.notes.append(
                f"singular values of {left} were not computed within {seconds:g} s, those that moved least: "
                "allow more time"
            )
            return
        except WeightsError as error:
            drift.notes.append(str(error))


def _is_matrix(row: dict[str, Any]) -> bool:
    shape = row["shape"]
    sides = (shape[0], math.prod(shape[1:])) if len(shape) >= 2 else (0, 0)
    return min(sides) > 1 and not row["dtype_a"].startswith("complex")
