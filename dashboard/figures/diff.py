"""What changed between two states of a figure, so that a live update sends that and nothing else.

A patch is plain JSON, applied by assets/live.js to the figure that the browser holds. One of:

    {"set": value}                        the value is new
    {"in": {key: patch}, "gone": [key]}   a dict, changed at some keys
    {"at": {index: patch}, "tail": [..]}  a list, changed at some places and longer by a tail
    {"from": n, "tail": [..]}             a list: its first n values, then these
    {"bytes": n, "tail": base64}          a typed array: its first n bytes, then these
    {"columns": n, "block": base64, "shape": "r, c", "rows": [..], "band": base64}
                                          a typed matrix: its first n columns with some rows exchanged there,
                                          then these columns
"""

from __future__ import annotations

import base64
from itertools import takewhile
from typing import Any

import numpy as np

Patch = dict[str, Any]
#: As many columns at the end may change together with a new one: the bin that fills, the capture under way.
FILLING = 2
#: A shorter list of numbers is sent whole: Plotly writes into the ranges of axes, so their parts may differ.
SHORT = 9


def difference(old: Any, new: Any) -> Patch | None:
    """The patch that makes `new` of `old`, both plain JSON; None when they are the same."""
    if isinstance(old, dict) and isinstance(new, dict):
        if "bdata" in old and "bdata" in new:
            return _typed(old, new)
        return _dict(old, new)
    if isinstance(old, list) and isinstance(new, list):
        return _list(old, new)
    return None if type(old) is type(new) and old == new else {"set": new}


def _dict(old: dict[str, Any], new: dict[str, Any]) -> Patch | None:
    inner = {key: difference(old[key], value) for key, value in new.items() if key in old}
    changed: dict[str, Any] = {key: patch for key, patch in inner.items() if patch is not None}
    changed |= {key: {"set": value} for key, value in new.items() if key not in old}
    gone = [key for key in old if key not in new]
    if not changed and not gone:
        return None
    return {"in": changed, "gone": gone} if gone else {"in": changed}


def _list(old: list[Any], new: list[Any]) -> Patch | None:
    same = sum(1 for _ in takewhile(lambda pair: difference(*pair) is None, zip(old, new, strict=False)))
    if same == len(old) == len(new):
        return None
    if len(new) < len(old) or not any(isinstance(item, dict | list) for item in (*old, *new)):
        return {"from": same, "tail": new[same:]} if same >= SHORT else {"set": new}
    inner = ((i, difference(*pair)) for i, pair in enumerate(zip(old, new, strict=False)))
    changed = {str(i): patch for i, patch in inner if patch is not None}
    tail = new[len(old) :]
    return {"at": changed, "tail": tail} if tail else {"at": changed}


def _typed(old: dict[str, Any], new: dict[str, Any]) -> Patch | None:
    """Typed arrays {"dtype", "bdata", "shape"}, compared byte by byte: NaN is equal to itself."""
    if old == new:
        return None
    if old["dtype"] != new["dtype"] or set(old) != set(new):
        return {"set": new}
    before, after = base64.b64decode(old["bdata"]), base64.b64decode(new["bdata"])
    if "shape" in new:
        return _matrix(_shaped(before, old), _shaped(after, new), new) or {"set": new}
    short = min(len(before), len(after))
    left, right = (np.frombuffer(data, np.uint8, short) for data in (before, after))
    differ = np.flatnonzero(left != right)
    same = int(differ[0]) if len(differ) else short
    return {"bytes": same, "tail": _encoded(after[same:])} if same else {"set": new}


def _matrix(old: np.ndarray, new: np.ndarray, spec: dict[str, Any]) -> Patch | None:
    """None when sending the whole is as good."""
    if len(old) != len(new) or new.shape[1] < old.shape[1] or not old.size:
        return None
    width = old.shape[1]
    differ = (old != new[:, :width]).any(axis=2)
    columns = np.flatnonzero(differ.any(axis=0))
    keep = int(columns[0]) if len(columns) and columns[0] >= width - FILLING else width
    if len(columns) and keep == width:
        keep = max(width - FILLING, 0)
    rows = np.flatnonzero(differ[:, :keep].any(axis=1))
    if keep == 0 or len(rows) > len(new) / 2:
        return None
    block = _encoded(new[:, keep:].tobytes())
    patch: Patch = {"columns": keep, "block": block, "shape": spec["shape"]}
    if len(rows):
        patch |= {"rows": rows.tolist(), "band": _encoded(new[rows, :keep].tobytes())}
    return patch


def _shaped(data: bytes, spec: dict[str, Any]) -> np.ndarray:
    """(rows, columns, bytes of a cell)."""
    rows, columns = (int(size) for size in str(spec["shape"]).split(","))
    cell = np.dtype(spec["dtype"]).itemsize
    return np.frombuffer(data, np.uint8).reshape(rows, columns, cell)


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()
