"""A tracker for Hugging Face Accelerate.

from layerwatch.hooks.accelerate import LayerwatchTracker
tracker = LayerwatchTracker(run="runs/exp1")
accelerator = Accelerator(log_with=tracker)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
tracker.watch(model, optimizer)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .session import Session
from .watcher import Watcher

try:
    from accelerate.tracking import GeneralTracker
except ImportError as error:
    raise ImportError(
        f"layerwatch.hooks.accelerate needs accelerate: pip install 'layerwatch[accelerate]' ({error})"
    ) from None

logger = logging.getLogger("layerwatch")


class LayerwatchTracker(GeneralTracker):
    """Give it to `Accelerator(log_with=...)`, and call `watch` after `accelerator.prepare`, on every process.

    `accelerator.init_trackers(name, config)` fills the run's `config`. `accelerator.log` logs at the
    optimizer step that was just made, whatever `step` says: `loss` becomes `train_loss`, `eval_loss` becomes
    `val_loss`, other numbers keep their names, anything else is left out. `accelerator.end_training()`
    finishes the run.

    Args:
        run, every, options: as `layerwatch.watch` takes them.
    """

    name = "layerwatch"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self, run: str | Path | None = None, every: int | str = "auto", **options: Any) -> None:
        super().__init__()
        self._session = Session(run, every, options)
        self._config: dict[str, Any] = {}
        self._warned = False

    @property
    def tracker(self) -> Watcher | None:
        """The watcher, once `watch` was called."""
        return self._session.watcher

    def watch(
        self, model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer | Sequence[Optimizer] | None = None, *, step: int = 0,
    ) -> Watcher:  # fmt: skip
        """Start to watch what `accelerator.prepare` returned, one or several.

        Args:
            step: when `accelerator.load_state` has loaded a checkpoint: the optimizer steps made before it.

        Raises:
            ValueError, TypeError, RunError: see `layerwatch.watch`.
        """
        return self._session.begin(model, optimizer, self._config, step=step)

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Called by `Accelerator.init_trackers`."""
        self._config = dict(values)
        self._session.configure(self._config)

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Called by `Accelerator.log`."""
        if self._session.watcher is None and not self._warned:
            self._warned = True
            logger.warning(
                "nothing is logged yet: call watch(model, optimizer) of the LayerwatchTracker "
                "after accelerator.prepare(...)"
            )
        self._session.guarded(self._session.log, values)

    def finish(self) -> None:
        """Called by `Accelerator.end_training`."""
        self._session.end()
