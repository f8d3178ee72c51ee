"""Training monitoring and weight-drift dashboard for PyTorch.

    from layerwatch import watch                    # in the training program
    watcher = watch(model, optimizer, run="runs/exp1")

    from layerwatch import Run                      # wherever the log is read
    Run("runs/exp1").findings()

    from layerwatch import show                     # in a notebook
    show("runs")

Importing this package loads nothing heavy: torch, pandas and dash come with what is used of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparisons import compare
    from .dashboard import show
    from .fleet import scan
    from .hooks import StopTraining, Watcher, try_precision, watch
    from .monitor import Finding, Run, RunError, WeightsError, export, open_runs
    from .provenance import lineage, verify
    from .weights import drift, open_adapted, open_weights, precision

_OWNERS = {
    "Finding": "monitor",
    "Run": "monitor",
    "RunError": "monitor",
    "StopTraining": "hooks",
    "Watcher": "hooks",
    "WeightsError": "monitor",
    "compare": "comparisons",
    "drift": "weights",
    "export": "monitor",
    "lineage": "provenance",
    "open_adapted": "weights",
    "open_runs": "monitor",
    "open_weights": "weights",
    "precision": "weights",
    "scan": "fleet",
    "show": "dashboard",
    "try_precision": "hooks",
    "verify": "provenance",
    "watch": "hooks",
}

__version__ = "0.1.0"
__all__ = [
    "Finding",
    "Run",
    "RunError",
    "StopTraining",
    "Watcher",
    "WeightsError",
    "compare",
    "drift",
    "export",
    "lineage",
    "open_adapted",
    "open_runs",
    "open_weights",
    "precision",
    "scan",
    "show",
    "try_precision",
    "verify",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = importlib.import_module(f".{_OWNERS[name]}", __name__)
    value = getattr(room, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
