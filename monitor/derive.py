"""From rows of sufficient statistics to the columns that people read: means, norms, quantiles, ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from .kernels import histogram_quantiles
from .summary import bucket_edges, quantiles

#: Columns of `Run.stats` and the share of each quantile.
QUANTILES = {"p01": 0.01, "p05": 0.05, "p25": 0.25, "p50": 0.50, "p75": 0.75, "p95": 0.95, "p99": 0.99}
#: Columns that only the histogram can tell: reading it is most of the work, so they cost when asked for.
FROM_HISTOGRAM = {*QUANTILES, "underflow", "overflow"}
#: A float16 rounds to zero up to 2^-25 (half of its smallest subnormal) and to infinity from 65,520 on. The
#: buckets' edges that are met by these: everything below 2^-25, everything from 2^16 on.
FP16_ZERO, FP16_INFINITE = 4 * (-25 + 127), 4 * (16 + 127)
#: Relative error of a sum of squares of up to 2^40 doubles, generously.
SUM_ROUNDING = 1e-9
#: Above so many rows the compiled quantiles are worth the second that their compiler takes to load.
COMPILED_ROWS = 20_000
COMMON = [
    "step", "time", "tensor", "count", "mean", "std", "norm", "rms", "min", "max", *QUANTILES,
    "zeros", "subnormals", "nans", "infs", "skipped", "state",
]  # fmt: skip
#: Extra columns by kind.
EXTRA = {
    "gradient": ["stage", "units", "active_units", "underflow", "overflow"],
    "update": ["lost", "ratio", "along", "parallel", "perpendicular", "lost_share"],
    "second_moment": ["rms_ratio", "below_epsilon"],
    "activation": ["samples", "units", "active_units"],
}
#: Of roll-ups: last step, number of captures, extremes over single captures. Only when asked for.
POOLED = ["last_step", "captures", "norm_min", "norm_max", "ratio_max"]
_ONES = np.array([byte.bit_count() for byte in range(256)], np.uint8)
_SIZE = ("count", "nans", "pos_infs", "neg_infs")
_LISTS = ("buckets", "counts", "zeros", "subnormals")
#: What each derived column needs of the table; every other column is stored as it is.
_NEEDS: dict[str, tuple[str, ...]] = {
    "mean": ("sum", *_SIZE),
    "std": ("sum", "sum_sq", *_SIZE),
    "norm": ("sum_sq", "captures", *_SIZE),
    "rms": ("sum_sq", *_SIZE),
    **dict.fromkeys(QUANTILES, (*_LISTS, "min", "max")),
    "infs": ("pos_infs", "neg_infs"),
    "active_units": ("active",),
    "underflow": (*_LISTS, "count"),
    "overflow": (*_LISTS, "count", "pos_infs", "neg_infs"),
    "ratio": ("sum_sq", "ref_sum_sq"),
    "along": ("sum_sq", "ref_sum_sq", "dot"),
    "parallel": ("ref_sum_sq", "dot", "captures"),
    "perpendicular": ("sum_sq", "ref_sum_sq", "dot", "captures"),
    "lost_share": ("lost", "count"),
    "rms_ratio": ("dot", "count"),
    "below_epsilon": ("lost", "count"),
    "norm_min": ("sum_sq_min",),
    "norm_max": ("sum_sq_max",),
    "ratio_max": ("ratio_sq_max",),
}


def columns_of(kind: str) -> list[str]:
    """The columns of `Run.stats(kind)`."""
    return COMMON + EXTRA.get(kind, [])


def needed(columns: Sequence[str]) -> list[str]:
    """What these derived columns need of the `stats` table. Histograms, most of a log, only when they must
    tell."""
    return list(dict.fromkeys(raw for name in columns for raw in _NEEDS.get(name, (name,))))


class _Raw:
    """The columns of a table as arrays, and what several derived columns share; computed when asked for."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self._kept: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        return self._once(name, lambda: _column(self.table, name))

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]

    @property
    def finite(self) -> NDArray:
        """How many elements are finite; NaN where none is."""
        return self._once("finite", self._finite)

    def _finite(self) -> NDArray:
        size = self["count"] - self["nans"] - self["pos_infs"] - self["neg_infs"]
        return np.where(size > 0, size, np.nan)

    @property
    def pooled(self) -> NDArray:
        return np.maximum(self["captures"], 1)

    @property
    def before(self) -> NDArray:
        return np.sqrt(self["ref_sum_sq"])

    def quantile(self, name: str) -> NDArray:
        return self._once("quantiles", lambda: _quantiles(self.table, self))[name]

    def beyond(self, place: int) -> NDArray:
        return self._once("beyond", lambda: _beyond_fp16(self.table, self))[place]


_FORMULAS: dict[str, Callable[[_Raw], Any]] = {
    "mean": lambda r: r["sum"] / r.finite,
    "std": lambda r: np.sqrt(np.maximum(r["sum_sq"] / r.finite - (r["sum"] / r.finite) ** 2, 0.0)),
    "norm": lambda r: np.where(np.isnan(r.finite), np.nan, np.sqrt(r["sum_sq"] / r.pooled)),
    "rms": lambda r: np.sqrt(r["sum_sq"] / r.finite),
    **{name: lambda r, name=name: r.quantile(name) for name in QUANTILES},
    "infs": lambda r: r["pos_infs"] + r["neg_infs"],
    "skipped": lambda r: r["skipped"].astype(bool),
    "active_units": lambda r: _active_units(r.table),
    "underflow": lambda r: r.beyond(0),
    "overflow": lambda r: r.beyond(1),
    "ratio": lambda r: np.sqrt(r["sum_sq"]) / r.before,
    "along": lambda r: r["dot"] / r.before / np.sqrt(r["sum_sq"]),
    "parallel": lambda r: r["dot"] / r.before / np.sqrt(r.pooled),
    "perpendicular": lambda r: np.sqrt(
        np.maximum(r["sum_sq"] - (r["dot"] / r.before) ** 2, 0.0)
    ) / np.sqrt(r.pooled),
    "lost_share": lambda r: r["lost"] / r["count"],
    "rms_ratio": lambda r: np.sqrt(r["dot"] / r["count"]),
    "below_epsilon": lambda r: r["lost"] / r["count"],
    "norm_min": lambda r: np.sqrt(r["sum_sq_min"]),
    "norm_max": lambda r: np.sqrt(r["sum_sq_max"]),
    "ratio_max": lambda r: np.sqrt(r["ratio_sq_max"]),
}  # fmt: skip


def stats_frame(table: pa.Table, kind: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Derived statistics, one row per row of `table` (columns `needed`), in the same order.

    mean, std, norm, rms and the quantiles cover the finite elements and are NaN when there is none. std
    divides by n. norm is the L2 norm, rms is norm / sqrt(finite elements). `Run.stats` describes the rest.
    """
    return pd.DataFrame(stats_arrays(table, columns or columns_of(kind)))


def stats_arrays(table: pa.Table, columns: Sequence[str]) -> dict[str, Any]:
    """`stats_frame` as an array, or a series of strings, for each column."""
    raw = _Raw(table)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: _FORMULAS[name](raw) if name in _FORMULAS else raw[name] for name in columns}


#: What `drift_arrays` needs of the table, and what it gives besides step and time.
DRIFT_NEEDS = (
    "step", "time", "captures", "count", "sum_sq", "ref_sum_sq", "dot", "residual_sq", "sign_flips",
)  # fmt: skip
DRIFT_COLUMNS = ("relative_l2", "cosine", "sign_flips", "count", "distance", "reference_norm")


def drift_frame(table: pa.Table) -> pd.DataFrame:
    """Distance of each tensor from the reference; see `Run.drift` for the columns."""
    found = drift_arrays(table)
    order = ["step", "time", "tensor", *DRIFT_COLUMNS]
    return pd.DataFrame({**found, "tensor": _column(table, "tensor")}, columns=order)


def drift_arrays(table: pa.Table) -> dict[str, NDArray]:
    """`drift_frame` as arrays, without the tensors' names."""
    names = ("step", "time", "captures", "count", "sum_sq", "ref_sum_sq", "dot")
    raw = {name: _numbers(table, name) for name in names}
    residual, flips = _numbers(table, "residual_sq"), _numbers(table, "sign_flips")
    # Of an unmoved tensor nothing is left but the rounding of two sums of doubles.
    moved_sq = raw["sum_sq"] - np.nan_to_num(residual)
    moved_sq = np.where(moved_sq < SUM_ROUNDING * np.nan_to_num(residual), 0.0, moved_sq)
    distance = np.sqrt(np.maximum(moved_sq, 0.0) / raw["captures"])
    reference = np.sqrt(raw["ref_sum_sq"] / raw["captures"])
    # |w|^2 = |w - r|^2 - |r|^2 + 2 <w, r>
    now = np.sqrt(np.maximum(raw["sum_sq"] - raw["ref_sum_sq"] + 2 * raw["dot"], 0.0) / raw["captures"])
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "step": raw["step"],
            "time": raw["time"],
            "relative_l2": np.where(reference > 0, distance / reference, np.nan),
            "cosine": np.clip(raw["dot"] / raw["captures"] / (now * reference), -1.0, 1.0),
            "sign_flips": flips,
            "count": raw["count"],
            "distance": distance,
            "reference_norm": reference,
        }


def histogram_rows(table: pa.Table) -> tuple[NDArray, NDArray, NDArray]:
    """All histograms of `table` flattened: row index, bucket number, count; zeros and subnormals are in
    bucket 0.

    Sorted by row, then bucket.
    """
    row, bucket, count = _sparse(table)
    small = (_numbers(table, "zeros") + _numbers(table, "subnormals")).astype(np.int64)
    where = np.flatnonzero(small)
    row = np.concatenate([row, where])
    bucket = np.concatenate([bucket, np.zeros(where.size, np.int64)])
    count = np.concatenate([count, small[where]])
    order = np.lexsort((bucket, row))
    return row[order], bucket[order], count[order]


def _sparse(table: pa.Table) -> tuple[NDArray, NDArray, NDArray]:
    """The stored entries of all histograms: row index, bucket number, count."""
    rows = table.num_rows
    lists = table["buckets"].combine_chunks()
    lengths = np.diff(lists.offsets.to_numpy()) if rows else np.empty(0, np.int64)
    bucket = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    count = table["counts"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    return np.repeat(np.arange(rows), lengths), bucket, count


def histogram_frame(table: pa.Table) -> pd.DataFrame:
    """step, low, high, count per non-empty bucket; zeros are (0, 0), subnormals (-2^-126, 2^-126)."""
    step = _numbers(table, "step").astype(np.int64)
    zeros, subnormals = (
        _numbers(table, "zeros").astype(np.int64),
        _numbers(table, "subnormals").astype(np.int64),
    )
    row, bucket, count = histogram_rows(table)
    low, high = bucket_edges(bucket)
    count = np.where(bucket == 0, zeros[row], count)
    tiny = np.flatnonzero(subnormals)
    edge = np.full(tiny.size, 2.0**-126)
    frame = pd.DataFrame(
        {
            "row": np.concatenate([row, tiny]),
            "step": np.concatenate([step[row], step[tiny]]),
            "low": np.concatenate([low, -edge]),
            "high": np.concatenate([high, edge]),
            "count": np.concatenate([count, subnormals[tiny]]),
        }
    )
    frame = frame[frame["count"] > 0].sort_values(["row", "low", "high"], kind="stable", ignore_index=True)
    return frame[["step", "low", "high", "count"]]


def unpack_active(packed: bytes, units: int) -> NDArray[np.bool_]:
    """The bit set of a row as bool (units,)."""
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=units).astype(bool)


def _active_units(table: pa.Table) -> NDArray:
    bits = table["active"].combine_chunks()
    if isinstance(bits, pa.ChunkedArray):  # of no rows
        return np.empty(0)
    _, offsets, data = bits.buffers()
    if not len(bits) or data is None:
        return np.full(len(bits), np.nan)
    ends = np.frombuffer(offsets, np.int32)[bits.offset : bits.offset + len(bits) + 1].astype(np.int64)
    ones = _ONES[np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]]
    until = np.concatenate([[0], np.cumsum(ones, dtype=np.int64)])[ends - ends[0]]
    return np.where(bits.is_null().to_numpy(zero_copy_only=False), np.nan, np.diff(until))


def _beyond_fp16(table: pa.Table, raw: _Raw) -> tuple[NDArray, NDArray]:
    """Shares of the elements that a conversion to float16 would make zero, and infinite."""
    rows = table.num_rows
    row, bucket, count = _sparse(table)
    small = np.bincount(row, count * (np.abs(bucket) < FP16_ZERO), rows) + raw["subnormals"]
    large = np.bincount(row, count * (np.abs(bucket) >= FP16_INFINITE), rows)
    if "pos_infs" in table.column_names:
        large = large + raw["pos_infs"] + raw["neg_infs"]
    return small / raw["count"], large / raw["count"]


def _quantiles(table: pa.Table, raw: _Raw) -> dict[str, NDArray]:
    if table.num_rows > COMPILED_ROWS:
        found = _compiled_quantiles(table, (raw["zeros"] + raw["subnormals"]).astype(np.int64))
    else:
        row, bucket, count = histogram_rows(table)
        found = quantiles(row, bucket, count, table.num_rows, QUANTILES.values())
    clipped = np.clip(found, raw["min"][:, None], raw["max"][:, None])
    return dict(zip(QUANTILES, clipped.T, strict=True))


def _compiled_quantiles(table: pa.Table, small: NDArray) -> NDArray:
    buckets, counts = (table[name].combine_chunks() for name in ("buckets", "counts"))
    found = np.empty((table.num_rows, len(QUANTILES)))
    histogram_quantiles(
        buckets.offsets.to_numpy(),
        buckets.values.to_numpy(zero_copy_only=False),
        counts.values.to_numpy(zero_copy_only=False),
        small,
        np.array(list(QUANTILES.values())),
        found,
    )
    return found


def _column(table: pa.Table, name: str) -> Any:
    """A column as an array of numbers, or as a series of strings."""
    kind = table.schema.field(name).type
    if pa.types.is_dictionary(kind) or pa.types.is_string(kind):
        return table[name].cast(pa.string()).to_pandas()
    return _numbers(table, name)


def codes_of(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str]]:
    """A column of strings as places in a list of words; null is -1."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    words: dict[str, int] = {}
    codes = [np.empty(0, np.int64)]
    for chunk in column.chunks:
        place = np.array([*(words.setdefault(w, len(words)) for w in chunk.dictionary.to_pylist()), -1])
        codes.append(place[chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False)])
    return np.concatenate(codes), list(words)


def _numbers(table: pa.Table, name: str) -> NDArray:
    """A column as float64, or int64 when it cannot be null (and is whole); null becomes NaN."""
    column = table[name]
    if table.schema.field(name).nullable or pa.types.is_floating(column.type):
        return column.cast(pa.float64()).to_numpy()
    return column.cast(pa.int64()).to_numpy()
