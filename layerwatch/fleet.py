"""`layerwatch.scan`: every run below a root as one table, which is kept."""

from __future__ import annotations

from .monitor.fleet import scan_and_keep as scan

__all__ = ["scan"]
