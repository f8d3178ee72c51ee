"""The training side: torch tensors become summaries in the log."""

from .live import StopTraining
from .precision_trial import PrecisionTrial, try_precision
from .watch import watch
from .watcher import Watcher

__all__ = ["PrecisionTrial", "StopTraining", "Watcher", "try_precision", "watch"]
