"""The training side: torch tensors become summaries in the log."""

from .watch import watch
from .watcher import Watcher

__all__ = ["Watcher", "watch"]
