"""The browser side: Dash pages over a folder of runs. Imports monitor, never hooks, never torch.

Importing this package does not load dash: the process that judges runs (`judging`) does without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import create_app
    from .notebook import show
    from .security import Access
    from .serving import serve

_OWNERS = {"Access": "security", "create_app": "app", "serve": "serving", "show": "notebook"}
__all__ = ["Access", "create_app", "serve", "show"]


def __getattr__(name: str) -> Any:
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_OWNERS[name]}", __name__), name)
