"""What `Run` answers, put together from the tables of its log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from .derive import codes_of, needed, stats_frame, unpack_active
from .levels import factor_for, rows
from .reader import LogReader
from .scan import Between, Where

#: What `overview` can show, and which column tells its highest value of a single capture.
OVERVIEW = {
    "norm": "norm_max",
    "ratio": "ratio_max",
    "rms": "rms",
    "mean": "mean",
    "std": "std",
    "min": "max",
    "max": "max",
    "zeros": "zeros",
    "nans": "nans",
    "infs": "infs",
}


class Overview(NamedTuple):
    """All tensors over all steps, in few columns.

    Attributes:
        steps, last_steps: int64 (n,), the first and the last step of each column.
        tensors: names, in order of definition.
        values: float64 (tensors, n), of all captures in a column together; NaN where a tensor has none.
        highest: float64 (tensors, n), the highest value of a single capture where the log keeps it: of norm,
            ratio and max. Counts are those of all captures. Else as `values`.
    """

    steps: NDArray[np.int64]
    last_steps: NDArray[np.int64]
    tensors: list[str]
    values: NDArray[np.float64]
    highest: NDArray[np.float64]


def finest_table(
    log: LogReader, columns: Sequence[str], where: Where, steps: Between | None, max_points: int | None
) -> pa.Table:
    """The rows of `levels.rows` that `Run.stats` shows."""
    factor = 1 if max_points is None else factor_for(log, _probe(log, where), steps, max_points)
    return rows(log, columns, where, factor, steps)


def _probe(log: LogReader, where: Where) -> Where:
    """The same of one tensor: the first one that has rows."""
    if "tensor" in where:
        return {**where, "tensor": list(where["tensor"])[:1]}  # type: ignore[arg-type]  # names
    return {**where, "tensor": log.first_of("stats", "tensor", where)}


def overview(log: LogReader, kind: str, number: str, max_points: int, order: Sequence[str]) -> Overview:
    """See `Run.overview`. order: names in order of definition."""
    if number not in OVERVIEW:
        raise ValueError(f"expected one of {', '.join(OVERVIEW)}, got {number!r}: choose among them")
    columns = [number, OVERVIEW[number]]
    raw = list(dict.fromkeys([*needed(columns), "last_step"]))
    table = finest_table(log, raw, {"kind": [kind]}, None, max_points)
    frame = stats_frame(table, kind, columns)
    codes, words = codes_of(table["tensor"])
    present = np.flatnonzero(np.bincount(codes, minlength=len(words)))
    place = _places(words, order)
    names = sorted((words[c] for c in present), key=lambda name: place[name])
    line = np.zeros(len(words), np.int64)
    depth = {name: number for number, name in enumerate(names)}
    line[present] = [depth[words[code]] for code in present]
    step, last = table["step"].to_numpy(), table["last_step"].to_numpy()
    column, steps = pd.factorize(step, sort=True)
    last_steps = steps.copy()
    np.maximum.at(last_steps, column, last)
    shown = np.full((2, len(names), len(steps)), np.nan)
    for layer, name in enumerate(columns):
        shown[layer, line[codes], column] = frame[name].to_numpy(np.float64)
    return Overview(steps, last_steps, names, shown[0], shown[1])


def _places(names: Sequence[str], order: Sequence[str]) -> dict[str, tuple[int, str]]:
    """What to sort names by: order of definition, then name."""
    depth = {name: place for place, name in reversed(list(enumerate(order)))}
    return {name: (depth.get(name, len(order)), name) for name in names}


def in_order(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Names in order of definition, what is not defined behind them."""
    found = list(names)
    place = _places(found, order)
    return sorted(found, key=lambda name: place[name])


def by_tensor(table: pa.Table, order: Sequence[str]) -> NDArray[np.int64]:
    """The order of rows by tensor (in order of definition), then step."""
    codes, words = codes_of(table["tensor"])
    place = _places(words, order)
    rank = np.empty(len(words), np.int64)
    rank[sorted(range(len(words)), key=lambda code: place[words[code]])] = np.arange(len(words))
    return np.lexsort((table["step"].to_numpy(), rank[codes]))


def sessions(log: LogReader) -> pd.DataFrame:
    """See `Run.sessions`."""
    starts = log.starts
    found = []
    for session in sorted(starts):
        later = [starts[s].step for s in starts if s > session]
        lost = min(later) if later else math.nan
        found.append((session, starts[session].step, starts[session].time, lost))
    frame = pd.DataFrame(found, columns=["session", "first_step", "time", "superseded_from"])
    return frame.astype({"session": "int64", "first_step": "int64", "superseded_from": "Int64"})


def thinned(frame: pd.DataFrame, max_steps: int | None) -> pd.DataFrame:
    """The rows of about evenly chosen steps: at most so many, the first and the last among them."""
    steps = np.sort(frame["step"].unique())
    if max_steps is None or len(steps) <= max_steps:
        return frame
    kept = steps[np.unique(np.linspace(0, len(steps) - 1, max_steps).round().astype(int))]
    return frame[frame["step"].isin(kept)].reset_index(drop=True)


def stored_values(
    log: LogReader, tensor: str, kinds: list[str]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """See `Run.values`. Of two kinds at one step the last by name counts: the weights after step 0."""
    table = log.table("values", ["step", "kind", "values"], {"tensor": [tensor], "kind": kinds})
    frame = table.sort_by([("step", "ascending"), ("kind", "ascending")]).to_pandas()
    frame = frame.drop_duplicates("step", keep="last")
    if frame.empty:
        return np.empty(0, np.int64), np.empty((0, 0))
    sizes = frame["values"].map(len)
    frame = frame[sizes == sizes.iloc[-1]]  # a module may be replaced by a wider one
    return frame["step"].to_numpy(np.int64), np.stack(list(frame["values"])).astype(np.float64)


def unit_means(log: LogReader, kind: str, order: Sequence[str]) -> pd.DataFrame:
    """See `Run.unit_means`."""
    table = log.table("values", ["tensor", "step", "values"], {"kind": [kind]}, coded=True)
    table = table.take(pa.array(by_tensor(table, order)))
    lists = table["values"].combine_chunks()
    sizes = lists.value_lengths().to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(sizes)), sizes)
    sums = np.bincount(row, lists.flatten().to_numpy(zero_copy_only=False), len(sizes))
    means = np.where(sizes > 0, sums / np.maximum(sizes, 1), np.nan)
    return table.select(["tensor", "step"]).to_pandas().assign(value=means)


def active_units(table: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """See `Run.activity`. table: step, units, active."""
    rows = table.sort_by("step").to_pandas().dropna()
    if rows.empty:
        return np.empty(0, np.int64), np.empty((0, 0), bool)
    units = int(rows["units"].iloc[-1])
    rows = rows[rows["units"] == units]
    return rows["step"].to_numpy(np.int64), np.stack([unpack_active(bits, units) for bits in rows["active"]])


def found_tensors(log: LogReader) -> list[dict[str, Any]]:
    """What the rows tell of the parameters when run.json does not, in order of name."""
    table = log.table("stats", ["tensor", "count"], {"kind": ["weight", "initial_weight"]})
    sizes = dict(zip(table["tensor"].to_pylist(), table["count"].to_pylist(), strict=True))
    unknown = {"role": "unknown", "dtype": "unknown", "module_type": "unknown", "trainable": True}
    return [
        {
            "tensor": name, "names": [name], "shape": [size], "elements": size,
            "module": name.rpartition(".")[0], **unknown, "state": None,
        }
        for name, size in sorted(sizes.items())
    ]  # fmt: skip


def latest_states(log: LogReader, tensors: Sequence[str]) -> dict[str, str]:
    """The state of each tensor in its latest row of kind weight; nearly always that of the latest capture."""
    where: dict[str, Any] = {"kind": ["weight"]}
    step = log.latest("stats", where)
    states = _states(log, {**where, "step": Between(step, step)})
    missing = [name for name in tensors if name not in states]
    return (_states(log, {**where, "tensor": missing}) if missing else {}) | states


def _states(log: LogReader, where: Where) -> dict[str, str]:
    frame = log.table("stats", ["tensor", "step", "state"], where).sort_by("step").to_pandas()
    frame = frame.dropna(subset=["state"]).drop_duplicates("tensor", keep="last")
    return dict(zip(frame["tensor"], frame["state"], strict=True))
