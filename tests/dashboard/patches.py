"""Patches applied in Python, as assets/live.js does it in the browser."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np


def apply(old: Any, patch: dict[str, Any] | None) -> Any:
    """What a patch of `difference` makes of a value."""
    if patch is None:
        return old
    if "set" in patch:
        return patch["set"]
    if "in" in patch:
        kept = {key: value for key, value in old.items() if key not in patch.get("gone", [])}
        return kept | {key: apply(old.get(key), inner) for key, inner in patch["in"].items()}
    if "at" in patch:
        return [apply(v, patch["at"].get(str(i))) for i, v in enumerate(old)] + patch.get("tail", [])
    if "from" in patch:
        return old[: patch["from"]] + patch["tail"]
    data = base64.b64decode(old["bdata"])
    if "bytes" in patch:
        return old | {"bdata": encoded(data[: patch["bytes"]] + base64.b64decode(patch["tail"]))}
    rows, columns = (int(size) for size in patch["shape"].split(","))
    cell = np.dtype(old["dtype"]).itemsize
    before = np.frombuffer(data, np.uint8).reshape(rows, -1, cell)
    keep = patch["columns"]
    new = np.zeros((rows, columns, cell), np.uint8)
    new[:, :keep] = before[:, :keep]
    new[:, keep:] = np.frombuffer(base64.b64decode(patch["block"]), np.uint8).reshape(rows, -1, cell)
    if "rows" in patch:
        band = np.frombuffer(base64.b64decode(patch["band"]), np.uint8)
        new[patch["rows"], :keep] = band.reshape(len(patch["rows"]), keep, cell)
    return old | {"shape": patch["shape"], "bdata": encoded(new.tobytes())}


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()
