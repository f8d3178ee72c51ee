"""The training side: torch tensors become summaries in the log."""

from .watch import Watcher, watch

__all__ = ["Watcher", "watch"]
