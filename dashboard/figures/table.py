"""A figure as a tidy table, one row a point or cell: what is downloaded is what is seen."""

from __future__ import annotations

import base64
import re
from typing import Any

import numpy as np
import pandas as pd

from .cells import values_of
from .theme import Figure

_TAG = re.compile(r"<[^>]*>")
STEP = "step"


def table_of(figure: Figure) -> pd.DataFrame:
    """Columns of lines: series, step (or what the axis is called), value. Of heat maps: what the rows are
    called, step, value, and `not_finite` where some cells are red. `panel`: with several value axes.

    Decoration, traces with {"meta": {"skip": True}}, is left out.
    """
    layout = figure["layout"]
    shown = [trace for trace in figure["data"] if not _meta(trace).get("skip")]
    parts = []
    for trace in shown:
        if trace.get("type") == "heatmap":
            frame = _cells(trace, layout, _mask(trace, figure["data"]))
            if len(shown) > 1:
                frame.insert(0, "series", _name(trace))
        else:
            frame = _points(trace, layout)
        frame.insert(0, "panel", _title(layout, _axis(trace, "y"), ""))
        parts.append(frame)
    if not parts:
        return pd.DataFrame({"series": [], STEP: [], "value": []})
    table = pd.concat(parts, ignore_index=True)
    if len({_axis(trace, "y") for trace in shown}) == 1:
        del table["panel"]
    if "not_finite" in table:
        table["not_finite"] = table["not_finite"].eq(True)
    if STEP in table and table[STEP].dtype.kind == "f" and (table[STEP].dropna() % 1 == 0).all():
        table[STEP] = table[STEP].astype("Int64" if table[STEP].isna().any() else "int64")
    first = [name for name in ("panel", "series") if name in table]
    last = [name for name in ("value", "not_finite") if name in table]
    return table[[*first, *(name for name in table.columns if name not in first + last), *last]]


def _points(trace: dict[str, Any], layout: dict[str, Any]) -> pd.DataFrame:
    """Of a line or of bars. Where names run upwards, the values lie along x."""
    x, y = _along(trace, "x", layout), _along(trace, "y", layout)
    across = trace.get("orientation") == "h" or _part(layout, _axis(trace, "y")).get("type") == "category"
    key, value = ("y", x) if across else ("x", y)
    text = trace.get("text")
    if isinstance(text, list) and len(text) == len(x) and all(isinstance(t, (int, float)) for t in text):
        value = np.array(text, dtype=np.float64)  # a ridge is drawn higher than its values
    name = _title(layout, _axis(trace, key), key)
    frame = pd.DataFrame({name: y if across else x, "value": _numbers(value)})
    frame.insert(0, "series", _name(trace))
    return frame


def _cells(trace: dict[str, Any], layout: dict[str, Any], mask: np.ndarray | None) -> pd.DataFrame:
    """Of a heat map: cells with a value, and those that are red."""
    values = values_of(trace)
    rows, steps = _along(trace, "y", layout), _along(trace, "x", layout)
    kept = np.isfinite(values) if mask is None else np.isfinite(values) | mask
    row, column = np.nonzero(kept)
    frame = pd.DataFrame(
        {
            _title(layout, _axis(trace, "y"), "row"): rows[row],
            _title(layout, _axis(trace, "x"), "x"): steps[column],
            "value": values[row, column],
        }
    )
    return frame if mask is None else frame.assign(not_finite=mask[row, column])


def _mask(trace: dict[str, Any], traces: list[dict[str, Any]]) -> np.ndarray | None:
    """Which cells another layer over the same map marks as not finite."""
    for other in traces:
        if (
            other.get("type") == "heatmap"
            and "says" in _meta(other)
            and _axis(other, "y") == _axis(trace, "y")
        ):
            found = _array(other["z"])
            if found.shape == _array(trace["z"]).shape:
                return np.nan_to_num(found) > 0
    return None


def _along(trace: dict[str, Any], letter: str, layout: dict[str, Any]) -> np.ndarray:
    """Places along an axis, as what they stand for: a signed logarithmic axis holds positions."""
    places = _array(trace.get(letter, []))
    floors = layout.get("meta", {}).get("floor") or {}
    floor = floors.get(_axis(trace, letter)) if isinstance(floors, dict) else None
    if floor is None or places.dtype == object:
        return places
    return np.where(places == 0, 0.0, np.sign(places) * np.power(10.0, np.abs(places) + floor))


def _array(values: Any) -> np.ndarray:
    """A list or a typed array of Plotly; names as objects, None as NaN."""
    if isinstance(values, dict):
        flat = np.frombuffer(base64.b64decode(values["bdata"]), dtype=f"<{values['dtype']}").astype(
            np.float64
        )
        return flat.reshape([int(n) for n in values["shape"].split(",")]) if "shape" in values else flat
    if any(isinstance(value, str) for value in values):
        return np.array([None if value is None else str(value) for value in values], dtype=object)
    return _numbers(values)


def _numbers(values: Any) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _meta(trace: dict[str, Any]) -> dict[str, Any]:
    meta = trace.get("meta")
    return meta if isinstance(meta, dict) else {}


def _name(trace: dict[str, Any]) -> str:
    """The true one: see `escape`."""
    return str(_meta(trace).get("name", trace.get("name", "")))


def _axis(trace: dict[str, Any], letter: str) -> str:
    """The key in the layout of the axis that a trace is drawn on."""
    return f"{letter}axis{str(trace.get(f'{letter}axis', letter))[1:]}"


def _part(layout: dict[str, Any], key: str) -> dict[str, Any]:
    return layout.get(key) or {}


def _title(layout: dict[str, Any], key: str, default: str) -> str:
    """What an axis is called, as the name of a column."""
    axis = _part(layout, key)
    title = axis.get("title")
    text = str(title.get("text", "") if isinstance(title, dict) else title or "")
    text = _TAG.sub(" ", text.partition(",")[0]).strip()
    if key.startswith("xaxis") and (text == "optimizer step" or axis.get("uirevision") == "steps"):
        return STEP
    return text or ("layer" if axis.get("type") == "category" else default)
