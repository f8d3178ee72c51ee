"""What is normal, as a JSON file: documented in docs/baselines.md."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .courses import LAYER_SIGNALS
from .envelopes import Envelope
from .errors import RunError
from .normal import Normal

FORMAT, VERSION = "layerwatch-normal", 1


def write_normal(normal: Normal, path: str | Path) -> None:
    """Write the file at once: a reader sees the old or the new one."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "runs": list(normal.runs),
        "last_step": normal.last_step,
        "shapes": {name: list(shape) for name, shape in normal.shapes.items()},
        "layers": {signal: _layers(envelope) for signal, envelope in normal.layers.items()},
        "scalars": {name: _scalar(envelope) for name, envelope in normal.scalars.items()},
    }
    text = json.dumps(document, indent=1, allow_nan=False)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)  # one line for a list
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def read_normal(path: str | Path) -> Normal:
    """Read such a file.

    Raises:
        RunError: it is none, it is damaged, or a newer layerwatch wrote it.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(_wrong(path, f"is no JSON ({error})")) from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise RunError(_wrong(path, f'has no "format": "{FORMAT}"'))
    if not isinstance(document.get("version"), int) or document["version"] > VERSION:
        raise RunError(
            f"{path} has version {document.get('version')!r}, and this layerwatch reads {VERSION}: "
            "update layerwatch, or calibrate again"
        )
    try:
        return _normal(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(_wrong(path, f"is damaged ({type(error).__name__}: {error})")) from None


def _wrong(path: str | Path, what: str) -> str:
    return f"expected a file of `layerwatch calibrate`, but {path} {what}: calibrate again"


def _normal(document: dict[str, Any]) -> Normal:
    layers = {str(signal): _read_layers(found) for signal, found in document["layers"].items()}
    scalars = {str(name): _read_scalar(name, found) for name, found in document["scalars"].items()}
    runs = tuple(str(name) for name in document["runs"])
    if not runs or not set(layers) <= set(LAYER_SIGNALS):
        raise ValueError("it names no runs, or unknown signals")
    shapes = {str(name): tuple(int(n) for n in shape) for name, shape in document["shapes"].items()}
    return Normal(runs, shapes, int(document["last_step"]), layers, scalars)


def _layers(envelope: Envelope) -> dict[str, Any]:
    columns = enumerate(envelope.names)
    return {
        "limit": _short(envelope.limit),
        "steps": envelope.steps.tolist(),
        "layers": {
            name: {"centre": _list(envelope.centre[:, at]), "spread": _list(envelope.spread[:, at])}
            for at, name in columns
        },
    }


def _read_layers(found: dict[str, Any]) -> Envelope:
    names = tuple(str(name) for name in found["layers"])
    steps = _steps(found["steps"])
    centre = [_array(found["layers"][name]["centre"], steps.size) for name in names]
    spread = _positive(np.stack([_array(found["layers"][n]["spread"], steps.size) for n in names], axis=1))
    return Envelope(names, steps, np.stack(centre, axis=1), spread, _limit(found))


def _scalar(envelope: Envelope) -> dict[str, Any]:
    return {
        "limit": _short(envelope.limit),
        "logarithms": envelope.log,
        "scale": envelope.scale,
        "steps": envelope.steps.tolist(),
        "centre": _list(envelope.centre[:, 0]),
        "spread": _list(envelope.spread[:, 0]),
        "runs": [_list(values) for values in envelope.each],
    }


def _read_scalar(name: str, found: dict[str, Any]) -> Envelope:
    steps = _steps(found["steps"])
    centre, spread = (_array(found[key], steps.size)[:, None] for key in ("centre", "spread"))
    each = np.stack([_array(values, steps.size) for values in found["runs"]])
    if np.isnan(each).all(axis=1).any():
        raise ValueError(f"no numbers of a run in {name}")
    scale = float(found["scale"])
    if not scale > 0:
        raise ValueError(f"the scale of {name} is {scale}")
    return Envelope(
        (name,), steps, centre, _positive(spread), _limit(found), bool(found["logarithms"]), scale, each
    )


def _steps(values: Any) -> NDArray[np.int64]:
    steps = np.array(values, np.int64)
    if steps.ndim != 1 or not steps.size or (np.diff(steps) <= 0).any():
        raise ValueError("steps must ascend")
    return steps


def _array(values: Any, size: int) -> NDArray[np.float64]:
    found = np.array([math.nan if v is None else v for v in values], np.float64)
    if found.shape != (size,):
        raise ValueError(f"expected {size} numbers, got {found.size}")
    return found


def _positive(spread: NDArray[np.float64]) -> NDArray[np.float64]:
    if (spread <= 0).any():
        raise ValueError("spreads must be above zero")
    return spread


def _limit(found: dict[str, Any]) -> float:
    limit = float(found["limit"])
    if not 0 < limit < math.inf:
        raise ValueError(f"a limit is {limit}")
    return limit


def _list(values: NDArray[np.float64]) -> list[float | None]:
    return [None if math.isnan(v) else _short(v) for v in values.tolist()]


def _short(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")
