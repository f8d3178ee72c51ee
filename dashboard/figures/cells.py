"""The cells of a heat map in few bytes: 16-bit integers where every cell is finite, 32-bit floats else.

A cell z stands for t = offset + factor * z, and for 10**t where `log` is set. Steps of a power of two around
an offset on a coarse grid: a run that grows keeps its old cells, and zero stays exactly zero.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from .base import packed

#: The largest cell. The other end is -LIMIT: one integer is left over.
LIMIT = 32767
#: Each row on its own is always spread over these cells (colours per layer).
LOW, HIGH = -16384.0, 16384.0
#: A quantum may be at most this share of what the colours have to tell apart.
ERROR = 1 / 500


def cells(
    values: np.ndarray, *, log: bool, what: str, unit: str = "", each: bool = False
) -> dict[str, dict[str, Any]]:
    """`z` and `meta` of a heat map trace of these values (rows, n), NaN where a cell is empty.

    Args:
        log: cells are logarithms; what is not positive is empty.
        what: the name of the quantity, for hover texts and downloads; `unit` comes after its numbers.
        each: every row spans LOW to HIGH, from its own lowest to its own highest value. `offset` and
            `factor` in `meta` are then lists with one number a row.
    """
    shown = to_log(values) if log else np.asarray(values, dtype=np.float64)
    shown = np.where(np.isfinite(shown), shown, np.nan)
    meta: dict[str, Any] = {"log": log, "what": what, "unit": unit}
    if each:
        offset, factor = _each(shown)
        z = np.where(factor > 0, (shown - offset) / np.where(factor > 0, factor, 1.0), shown * 0)
        meta |= {"offset": offset[:, 0].tolist(), "factor": factor[:, 0].tolist()}
        return {"z": _integers(z) if np.isfinite(z).all() else packed(z), "meta": meta}
    offset, factor = _steps(shown) if shown.size and np.isfinite(shown).all() else (0.0, 0.0)
    if factor > 0:
        return {
            "z": _integers((shown - offset) / factor),
            "meta": meta | {"offset": offset, "factor": factor},
        }
    return {"z": packed(shown), "meta": meta | {"offset": 0.0, "factor": 1.0}}


def to_z(meta: dict[str, Any], t: float) -> float:
    """Where t (a value, or its log10 where `log` is set) lies among the cells. Not for `each`."""
    return (t - meta["offset"]) / meta["factor"]


def values_of(trace: dict[str, Any]) -> np.ndarray:
    """What the cells of a trace stand for: (rows, n) float64, NaN where empty."""
    z, meta = _unpacked(trace["z"]), trace["meta"]
    offset, factor = (np.asarray(meta[key], dtype=np.float64) for key in ("offset", "factor"))
    if offset.ndim:
        offset, factor = offset[:, None], factor[:, None]
    t = np.where(np.isnan(z), np.nan, offset + factor * np.nan_to_num(z))
    return np.power(10.0, t) if meta["log"] else t


def to_log(values: np.ndarray) -> np.ndarray:
    """log10 of what is positive, NaN for the rest."""
    with np.errstate(invalid="ignore"):
        positive = np.asarray(values, dtype=np.float64) > 0
    return np.where(positive, np.log10(np.where(positive, values, 1.0)), np.nan)


def _steps(values: np.ndarray) -> tuple[float, float]:
    """Offset and factor that hold all values; (0, 0) when outliers would leave few steps to the others."""
    low, high = float(values.min()), float(values.max())
    span = max(high - low, abs(high + low) * 2.0**-10) or 1.0
    factor = 2.0 ** np.ceil(np.log2(span / 32768))
    offset = np.round((low + high) / 2 / (factor * 8192)) * factor * 8192
    inner = float(np.subtract(*np.percentile(values, (98, 2))))
    if high > low and factor > ERROR * inner:
        return 0.0, 0.0
    return float(offset), float(factor)


def _each(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offset and factor of every row, as columns; a row of one value is LOW to HIGH's middle."""
    finite = np.isfinite(values)
    low = np.where(finite, values, np.inf).min(axis=1, initial=np.inf)
    high = np.where(finite, values, -np.inf).max(axis=1, initial=-np.inf)
    low, high = (np.where(finite.any(axis=1), ends, 0.0) for ends in (low, high))
    factor = (high - low) / (HIGH - LOW)
    return (low - factor * LOW)[:, None], factor[:, None]


def _integers(z: np.ndarray) -> dict[str, Any]:
    data = np.ascontiguousarray(np.clip(np.round(z), -LIMIT, LIMIT), dtype=np.int16)
    bdata = base64.b64encode(data.tobytes()).decode()
    return {"dtype": "i2", "bdata": bdata, "shape": ", ".join(map(str, data.shape))}


def _unpacked(spec: dict[str, Any]) -> np.ndarray:
    """A typed array as float64."""
    flat = np.frombuffer(base64.b64decode(spec["bdata"]), dtype=f"<{spec['dtype']}")
    return flat.reshape([int(size) for size in spec["shape"].split(",")]).astype(np.float64)
