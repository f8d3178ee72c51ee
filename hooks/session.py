"""What framework callbacks share: the watcher of each training, and the numbers that frameworks report."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..monitor import Run, RunError
from .scalars import number
from .watch import Models, Optimizers, watch
from .watcher import Watcher

#: What frameworks call losses -> what layerwatch does.
RENAMED = {"loss": "train_loss", "eval_loss": "val_loss"}


class Session:
    """The trainings of one callback, one after the other.

    A model that is trained once more goes on in its run, after its last step. Another model gets a run of its
    own, with a number behind the name.

    Args:
        run, every, options: as `watch` takes them; options without model and optimizer.
    """

    def __init__(self, run: str | Path | None, every: int | str, options: Mapping[str, Any]) -> None:
        self.watcher: Watcher | None = None
        self._run, self._options = run, {"every": every, **options}
        self._runs = 0
        self._model: weakref.ref[nn.Module] | None = None

    def begin(
        self, model: Models, optimizer: Optimizers, config: Mapping[str, Any], *, step: int = 0,
        run: str | None = None,
    ) -> Watcher:  # fmt: skip
        """Watch a training.

        Args:
            config: the framework's hyperparameters; those that the user gave in `config` win.
            step: the optimizer steps that were made before, as the framework counts them: of a checkpoint.
            run: the checkpoint's run, in which a training goes on whose callback was given none.

        Raises:
            ValueError, TypeError, RunError: see `watch`.
        """
        self.end()
        options = {"run": self._run, **self._options, "config": self._config(config)}
        if self._run is None and step and _exists(run):
            options["run"] = run
        first = model if isinstance(model, nn.Module) else model[0]
        before = self.watcher
        if before is not None and self._model is not None and self._model() is first:
            options["run"], options["resume"] = before.run, step or before.next_step
        elif before is not None and self._run is not None:
            options["run"] = f"{self._run}-{self._runs + 1}"
        elif step and "resume" not in options and _exists(options["run"]):
            options["resume"] = step
        self.watcher = watch(model, optimizer, **options)
        if before is None or before.run != self.watcher.run:
            self._runs += 1
        self._model = weakref.ref(first)
        return self.watcher

    def limit(self, **options: Any) -> None:
        """What cannot be seen is switched off, whatever the user chose."""
        self._options |= options

    def configure(self, config: Mapping[str, Any]) -> None:
        """The framework's hyperparameters are known only now."""
        if self.watcher is not None:
            self.watcher.configure(self._config(config))

    def _config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**plain(config), **(self._options.get("config") or {})}

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Log what the framework reports, as far as it is numbers.

        Its `grad_norm` is left out where the log has one already, of the same gradients.
        """
        if self.watcher is None:
            return
        numbers = {RENAMED.get(k, k): v for k, v in metrics.items() if _is_number(k, v)}
        if self.watcher.captured:
            numbers.pop("grad_norm", None)
        self.watcher.log(**numbers)

    def guarded(self, work: Callable[..., None], *args: Any) -> None:
        """Do this unless watching has ended; an error in it ends the watching, not the training."""
        if self.watcher is not None:
            self.watcher._guard(work)(*args)

    def saved(self, path: str | Path) -> None:
        """The framework has saved a checkpoint: record it."""
        if self.watcher is not None:
            self.watcher.checkpoint(path)

    def end(self) -> None:
        """The training is over."""
        if self.watcher is not None:
            self.watcher.close()


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters that are plain values and set."""
    return {str(k): v for k, v in config.items() if isinstance(v, bool | int | float | str)}


def _is_number(name: str, value: Any) -> bool:
    try:
        number(name, value)
    except TypeError:
        return False
    return True


def _exists(run: str | Path | None) -> bool:
    if run is None:
        return False
    try:
        Run(run)
    except RunError:
        return False
    return True
