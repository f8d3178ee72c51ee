"""The browser side: Dash pages over a folder of runs. Imports monitor, never hooks, never torch."""

from __future__ import annotations

from .app import create_app, serve

__all__ = ["create_app", "serve"]
