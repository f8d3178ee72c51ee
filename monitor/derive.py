"""From rows of sufficient statistics to the columns that people read: means, norms, quantiles, ratios."""

from __future__ import annotations

from collections.abc import Sequence
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
#: The columns of the `stats` table that `stats_frame` needs.
NEEDED = [
    "step", "time", "tensor", "captures", "count", "sum", "sum_sq", "min", "max", "zeros", "subnormals",
    "nans", "pos_infs", "neg_infs", "buckets", "counts", "ref_sum_sq", "dot", "lost", "samples", "units",
    "active", "stage", "state", "skipped",
]  # fmt: skip


def columns_of(kind: str) -> list[str]:
    """The columns of `Run.stats(kind)`."""
    return COMMON + EXTRA.get(kind, [])


def needed(columns: Sequence[str]) -> list[str]:
    """What these derived columns need of the `stats` table. Histograms, most of a log, only when they must
    tell."""
    spared = set()
    if not FROM_HISTOGRAM & set(columns):
        spared |= {"buckets", "counts"}
    if "active_units" not in columns:
        spared.add("active")
    return [name for name in NEEDED if name not in spared]


def stats_frame(table: pa.Table, kind: str) -> pd.DataFrame:
    """Derived statistics, one row per row of `table` (columns `needed`), in the same order.

    mean, std, norm, rms and the quantiles cover the finite elements and are NaN when there is none. std
    divides by n. norm is the L2 norm, rms is norm / sqrt(finite elements). `Run.stats` describes the rest.
    """
    raw = {name: _numbers(table, name) for name in table.column_names if _is_number(table, name)}
    finite = raw["count"] - raw["nans"] - raw["pos_infs"] - raw["neg_infs"]
    some = finite > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(some, raw["sum"] / finite, np.nan)
        variance = np.where(some, raw["sum_sq"] / finite - mean**2, np.nan)
        norm = np.where(some, np.sqrt(raw["sum_sq"] / np.maximum(raw["captures"], 1)), np.nan)
        frame = pd.DataFrame(
            {
                "step": raw["step"],
                "time": raw["time"],
                "tensor": table["tensor"].to_pandas(),
                "count": raw["count"],
                "mean": mean,
                "std": np.sqrt(np.maximum(variance, 0.0)),
                "norm": norm,
                "rms": np.where(some, np.sqrt(raw["sum_sq"] / finite), np.nan),
                "min": raw["min"],
                "max": raw["max"],
                **_quantiles(table, raw),
                "zeros": raw["zeros"],
                "subnormals": raw["subnormals"],
                "nans": raw["nans"],
                "infs": raw["pos_infs"] + raw["neg_infs"],
                "skipped": raw["skipped"].astype(bool),
                "state": table["state"].to_pandas(),
            }
        )
        for name, column in _of_kind(table, raw, kind).items():
            frame[name] = column
    return frame[columns_of(kind)]


def _of_kind(table: pa.Table, raw: dict[str, NDArray], kind: str) -> dict[str, Any]:
    """The columns in `EXTRA`; to be called with numpy's warnings off."""
    if kind == "update":
        total, before = np.sqrt(raw["sum_sq"]), np.sqrt(raw["ref_sum_sq"])
        pooled = np.sqrt(np.maximum(raw["captures"], 1))
        parallel = raw["dot"] / before
        return {
            "lost": raw["lost"],
            "lost_share": raw["lost"] / raw["count"],
            "ratio": total / before,
            "along": parallel / total,
            "parallel": parallel / pooled,
            "perpendicular": np.sqrt(np.maximum(raw["sum_sq"] - parallel**2, 0.0)) / pooled,
        }
    if kind == "second_moment":
        return {
            "rms_ratio": np.sqrt(raw["dot"] / raw["count"]),
            "below_epsilon": raw["lost"] / raw["count"],
        }
    found: dict[str, Any] = {}
    if kind in ("gradient", "activation"):
        found["units"] = raw["units"]
        found["active_units"] = _active_units(table) if "active" in table.column_names else np.nan
    if kind == "activation":
        found["samples"] = raw["samples"]
    if kind == "gradient":
        found["stage"] = table["stage"].to_pandas()
        found["underflow"], found["overflow"] = _beyond_fp16(table, raw)
    return found


def drift_frame(table: pa.Table) -> pd.DataFrame:
    """Distance of each tensor from the reference; see `Run.drift` for the columns."""
    raw = {name: _numbers(table, name) for name in ("step", "time", "count", "sum_sq", "ref_sum_sq", "dot")}
    residual, flips = _numbers(table, "residual_sq"), _numbers(table, "sign_flips")
    # Of an unmoved tensor nothing is left but the rounding of two sums of doubles.
    moved_sq = raw["sum_sq"] - np.nan_to_num(residual)
    moved_sq = np.where(moved_sq < SUM_ROUNDING * np.nan_to_num(residual), 0.0, moved_sq)
    distance = np.sqrt(np.maximum(moved_sq, 0.0))
    reference = np.sqrt(raw["ref_sum_sq"])
    # |w|^2 = |w - r|^2 - |r|^2 + 2 <w, r>
    now = np.sqrt(np.maximum(raw["sum_sq"] - raw["ref_sum_sq"] + 2 * raw["dot"], 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return pd.DataFrame(
            {
                "step": raw["step"],
                "time": raw["time"],
                "tensor": table["tensor"].to_pandas(),
                "relative_l2": np.where(reference > 0, distance / reference, np.nan),
                "cosine": np.clip(raw["dot"] / (now * reference), -1.0, 1.0),
                "sign_flips": flips,
                "count": raw["count"],
                "distance": distance,
                "reference_norm": reference,
            }
        )


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
    bits = table["active"].to_pylist()
    return np.array([np.nan if b is None else int.from_bytes(b, "big").bit_count() for b in bits], np.float64)


def _beyond_fp16(table: pa.Table, raw: dict[str, NDArray]) -> tuple[NDArray, NDArray]:
    """Shares of the elements that a conversion to float16 would make zero, and infinite."""
    rows = table.num_rows
    if "buckets" not in table.column_names:
        return np.full(rows, np.nan), np.full(rows, np.nan)
    row, bucket, count = _sparse(table)
    small = np.bincount(row, count * (np.abs(bucket) < FP16_ZERO), rows) + raw["subnormals"]
    large = np.bincount(row, count * (np.abs(bucket) >= FP16_INFINITE), rows)
    return small / raw["count"], (large + raw["pos_infs"] + raw["neg_infs"]) / raw["count"]


def _quantiles(table: pa.Table, raw: dict[str, NDArray]) -> dict[str, NDArray]:
    if "buckets" not in table.column_names:
        return dict.fromkeys(QUANTILES, np.full(table.num_rows, np.nan))
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


def _is_number(table: pa.Table, name: str) -> bool:
    kind = table.schema.field(name).type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _numbers(table: pa.Table, name: str) -> NDArray:
    """A column as float64, or int64 when it cannot be null (and is whole); null becomes NaN."""
    column = table[name]
    if table.schema.field(name).nullable or pa.types.is_floating(column.type):
        return column.cast(pa.float64()).to_numpy()
    return column.cast(pa.int64()).to_numpy()
