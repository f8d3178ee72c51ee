"""One run as one row: the function that every engine maps over runs. It needs none of them."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import fs

from ..alerts.records import alerted
from ..findings import Finding, plain
from ..ranks import world_of
from ..remote import Address, RemoteStore
from ..results import ending
from ..run import Run
from ..schema import SYSTEM
from ..store import Store, store_of
from ..weights.names import block_of
from .numbers import flat, furthest, last_drift, last_losses
from .places import Place, places, storable
from .table import COLUMNS, unknown

Row = dict[str, Any]
#: What one row holds of each at most: a table of ten thousand runs must stay small.
MOST_LAYERS, MOST_NOTES, MOST_SCALARS, MOST_BLOCKS, MOST_TEXT = 8, 20, 100, 200, 600


def scan_run(path: str | Path, filesystem: fs.FileSystem | None = None) -> pa.Table:
    """One run as a table of one row, with the columns of `table.COLUMNS`.

    Args:
        path: the run's folder, or its URL. filesystem: where `path` lies; None: as the URL says.

    Raises nothing because of the run: what is wrong with it is in the column `error`.
    """
    store = _store(path, filesystem)
    try:
        found = [place for place in places(store) if not place.run]
    except (ValueError, OSError) as error:
        return pa.Table.from_pylist(
            [unreadable(Place("", store.name, store.url, "", 0.0, 0), error)], COLUMNS
        )
    place = found[0] if found else Place("", store.name, store.url, "", 0.0, 0)
    return pa.Table.from_pylist([read(store, place)], COLUMNS)


def _store(path: str | Path, filesystem: fs.FileSystem | None) -> Store:
    if filesystem is None:
        return store_of(path)
    if isinstance(filesystem, fs.LocalFileSystem):
        return Store(Path(path))
    where = str(path).partition("://")[2] or str(path)
    return RemoteStore(Address(filesystem.type_name, where.rstrip("/"), ""), (filesystem, where.rstrip("/")))


def read_below(root: str, place: Place) -> Row:
    """The row of a run below a root; a worker keeps its connection to it."""
    return read(_root(root).at(place.run), place)


@functools.lru_cache(maxsize=4)
def _root(root: str) -> Store:
    return store_of(root)


def read(store: Store, place: Place) -> Row:
    """The row of a run: whatever is wrong with it is in the row."""
    began = time.perf_counter()
    try:
        row = _row(Run(store), place)
        pa.Table.from_pylist([row], COLUMNS)  # one that no table can hold would take the others along
    except Exception as error:  # a log can be damaged in any way, and a detector may raise anything
        row = unreadable(place, error)
    return row | {"seconds": time.perf_counter() - began}


def unreadable(place: Place, error: Exception | str) -> Row:
    """The row of a run that cannot be read. It is tried again by the next scan."""
    reason = error if isinstance(error, str) else str(error) or type(error).__name__
    if not isinstance(error, str | ValueError | OSError):
        reason = f"{type(error).__name__}: {reason}"
    return {
        **_empty(place),
        "health": "unreadable",
        "error": storable(_short(reason)) or "it cannot be read",
        "key": None,
    }


def _empty(place: Place) -> Row:
    return unknown() | {
        "run": place.name, "url": place.url, "key": place.key, "wrote": place.wrote, "bytes": place.bytes,
        "closed": False, "live": False, "alarms": 0, "scanned": time.time(),
    }  # fmt: skip


def _row(run: Run, place: Place) -> Row:
    drift = last_drift(run)
    moved, layer = furthest(drift)
    losses = last_losses(run)
    return {
        **_empty(place),
        **_identity(run),
        **_verdict(run),
        "damaged": [_short(f"{name}: {what}") for name, what in run.problems.items()][:MOST_NOTES],
        "steps": run.last_step + 1,
        "alerted": alerted(run.events()),
        "scalars": _scalars(run),
        "train_loss": losses.train,
        "val_loss": losses.val,
        "gap": losses.gap,
        "drift": moved,
        "drift_layer": layer or None,
        "blocks": _blocks(drift),
    }


def _identity(run: Run) -> Row:
    """What run.json tells. Somebody may have written anything there."""
    info = run.info
    tensors = [t for t in info.get("tensors") or [] if isinstance(t, dict)]
    config, versions, cadence = (_mapping(info.get(name)) for name in ("config", "versions", "cadence"))
    return {
        "id": _id(info),
        "created": _number(info.get("created")),
        "ended": _number(info.get("ended")),
        "closed": bool(info.get("closed")),
        "live": run.live,
        "owner": _text(info.get("owner")),
        "tags": _texts(info.get("tags")),
        "note": _text(info.get("note")),
        "model": ", ".join(_texts(info.get("model"))) or None,
        "host": _text(info.get("host")),
        "world": world_of(info),
        "git_commit": _text(info.get("git_commit")),
        "layerwatch": _text(versions.get("layerwatch")),
        "config": json.dumps(plain(flat(config))),
        "tensors": len(tensors),
        "parameters": sum(int(t.get("elements") or 0) for t in tensors),
        "alerts": _texts(info.get("alerts")),
        "cost": _number(cadence.get("overhead")),
    }


def _id(info: dict[str, Any]) -> str | None:
    """The training's own, or of an older log what no two trainings share."""
    if own := _text(info.get("id")):
        return own
    if not info.get("created"):
        return None
    told = [info["created"], info.get("host")]
    return hashlib.blake2b(repr(told).encode(), digest_size=8).hexdigest()


def _verdict(run: Run) -> Row:
    """What the detectors say. One that fails is a note; all of them failing leaves the health unknown."""
    try:
        findings, notes = run.findings(), run.notes()
    except Exception as error:
        failed = f"the detectors failed: {type(error).__name__}: {error}"
        return {"health": "unknown", "notes": [_short(failed)]}
    alarms = [f for f in findings if f.alarm]
    worst = next((f for s in ("critical", "warning") for f in alarms if f.severity == s), None)
    if run.last_step < 0:
        return {"health": "unknown", "notes": ["nothing is captured yet"]}
    return {
        "health": worst.severity if worst else "healthy",
        "problem": worst.problem if worst else None,
        "alarms": len(alarms),
        "findings": [_finding(f) for f in findings],
        "notes": [_short(note) for note in notes[:MOST_NOTES]],
    }


def _finding(finding: Finding) -> Row:
    return {
        "problem": finding.problem,
        "severity": finding.severity,
        "first_step": finding.first_step,
        "last_step": finding.last_step,
        "layers": list(finding.layers[:MOST_LAYERS]),
        "summary": _short(finding.summary),
        "advice": _short(finding.advice),
    }


def _scalars(run: Run) -> list[Row]:
    found = []
    names = [name for name in run.scalar_names() if not name.startswith(SYSTEM)]
    for name in names[:MOST_SCALARS]:
        end = ending(run, name)
        found.append({"name": name, "last": end.last, "best": end.best, "best_step": end.step})
    return found


def _blocks(drift: pd.DataFrame) -> list[Row]:
    """Squares add: the distance of a block is the root of its tensors' sums."""
    if drift.empty:
        return []
    squares = pd.DataFrame(
        {
            "block": [block_of(name) for name in drift["tensor"]],
            "moved": drift["distance"].to_numpy(float) ** 2,
            "length": drift["reference_norm"].to_numpy(float) ** 2,
        }
    )
    sums = squares.groupby("block", sort=False).agg(
        moved=("moved", "sum"), length=("length", "sum"), tensors=("moved", "size")
    )
    with np.errstate(all="ignore"):
        relative = np.sqrt(sums["moved"] / sums["length"])
    return [
        {"block": block, "relative_l2": _finite(value), "tensors": int(count)}
        for block, value, count in zip(sums.index[:MOST_BLOCKS], relative, sums["tensors"], strict=False)
    ]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _number(value: Any) -> float | None:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= MOST_TEXT else f"{words[: MOST_TEXT - 1]}…"
