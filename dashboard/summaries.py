"""What a table of runs shows of each: cheap to read, and small enough to be remembered for thousands."""

from __future__ import annotations

from typing import Any

from ..monitor import Run
from ..monitor.fleet.numbers import flat, furthest, last_drift, last_losses

#: Numbers of one run; None where there is none, NaN or infinite as they were logged:
#: read (False: only what run.json says is here yet), error (why the run cannot be read, else absent),
#: step (the last one, -1: none), train, val, gap (validation minus training loss at the last validation),
#: drift (the largest relative L2 distance at the last capture), drift_layer (whose it is), live (a process is
#: writing), created, ended (unix seconds), closed, tags (texts), config ("optimizer.lr" -> number, text,
#: bool or None), owner, note, model ("": none).
Summary = dict[str, Any]


def facts(run: Run) -> Summary:
    """What run.json says, and whether a process is writing."""
    info = run.info
    tags = info.get("tags")
    config = info.get("config")
    return {
        "live": run.live,
        "created": _time(info.get("created")),
        "ended": _time(info.get("ended")),
        "closed": bool(info.get("closed")),
        "tags": [str(tag) for tag in tags] if isinstance(tags, list) else [],
        "config": flat(config) if isinstance(config, dict) else {},
        "owner": str(info.get("owner") or ""),
        "note": str(info.get("note") or ""),
        "model": ", ".join(str(name) for name in info.get("model") or ()),
    }


def summarise(run: Run) -> Summary:
    """Everything. Raises what reading the log raises."""
    losses = last_losses(run)
    moved, layer = furthest(last_drift(run))
    numbers = losses._asdict() | {"drift": moved, "drift_layer": layer}
    return {"read": True, "step": run.last_step, **numbers, **facts(run)}


def _time(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
