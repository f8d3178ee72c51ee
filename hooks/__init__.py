"""The training side: torch tensors become summaries in the log."""

from .live import StopTraining
from .watch import watch
from .watcher import Watcher

__all__ = ["StopTraining", "Watcher", "watch"]
