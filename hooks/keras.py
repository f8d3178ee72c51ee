"""A callback for Keras 3 on the torch backend.

from layerwatch.hooks.keras import LayerwatchCallback
model.fit(x, y, callbacks=[LayerwatchCallback(run="runs/exp1")])
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import backward
from .keras_steps import Steps
from .keras_view import Part, variables_of, view_of
from .scalars import number_in
from .session import Session
from .watcher import Watcher

try:
    import keras
except ModuleNotFoundError as error:
    if error.name != "keras":
        raise
    raise ImportError("layerwatch.hooks.keras needs Keras: pip install 'layerwatch[keras]'") from None

logger = logging.getLogger("layerwatch")

COMPILED = (
    "jit_compile: layerwatch sees the weights and the gradients after each batch, but neither updates nor "
    "activations"
)


class LayerwatchCallback(keras.callbacks.Callback):
    """Watches `model.fit()`, and logs what it reports.

    `train_loss` is the loss of each step, the mean of its micro-batches: what Keras shows is a mean since the
    epoch began, which is logged at its end as `train_loss_epoch`, beside the other metrics of the epoch under
    their names (`val_loss`, `accuracy`). The optimizer's options are the run's `config`. Tensors have the
    names and the layout that torch would give them (see `keras_view`).

    Args:
        run, every, options: as `watch` takes them.

    Raises:
        RuntimeError: this is Keras 2, or Keras runs on another backend.
    """

    def __init__(self, run: str | Path | None = None, every: int | str = "auto", **options: Any) -> None:
        super().__init__()
        check(keras.__version__, keras.backend.backend())
        self._session = Session(run, every, options)
        self._shown: Part | None = None
        self._steps: list[Steps] = []
        self._started = self._compiled = False
        self._losses: list[Tensor] = []  # of the micro-batches of the step under way
        self._returned = False  # there is a loss of every step
        #: For `backward`: the end of a pass is of no interest.
        self.backward_ended: Callable[[], None] | None = None

    @property
    def watcher(self) -> Watcher | None:
        """Of the latest fit."""
        return self._session.watcher

    # Beginning and end

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """What an interrupted fit left is finished. Other callbacks may load a checkpoint yet."""
        self._end()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Start to watch."""
        if not self._started:
            self._started = True
            self._begin()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Finish the log."""
        self._end()

    def _begin(self) -> None:
        view, optimizers = self._view(), self._optimizers()
        self._steps = [Steps(o, view, self._session.guarded) for o in optimizers]
        self._compiled = bool(self.model.jit_compile)
        if self._compiled:
            logger.warning(COMPILED)
            self._session.limit(activations=False, updates=False)
        self._session.begin(
            view, [steps.stand for steps in self._steps], self._config(optimizers[0]),
            step=0 if self.watcher is not None else max(steps.stand.made for steps in self._steps),
        )  # fmt: skip
        for steps in self._steps if not self._compiled else ():
            steps.attach()
        backward.listen(self)

    def _end(self) -> None:
        self._started = False
        backward.unlisten(self)
        for steps in self._steps:
            steps.detach()
        self._steps, self._losses = [], []
        self._session.end()

    def _view(self) -> Part:
        """That of the fit before, as long as it shows the same model."""
        view = view_of(self.model)
        if self._shown is None or _elements(self._shown) != _elements(view):
            self._shown = view
        for variable, parameter, _ in variables_of(self._shown).values():
            parameter.requires_grad_(bool(variable.trainable))
        return self._shown

    def _optimizers(self) -> list[Any]:
        """That of `compile`, and those that a model with a `train_step` of its own keeps as attributes."""
        kind = keras.optimizers.Optimizer
        found = [o for o in [self.model.optimizer, *vars(self.model).values()] if isinstance(o, kind)]
        if not found:
            raise ValueError(
                "expected a model that optimizers of Keras train, found none: of one that torch's train, "
                "call layerwatch.watch(model) and leave this callback out"
            )
        return list({id(o): o for o in found}.values())

    def _config(self, optimizer: Any) -> dict[str, Any]:
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        lengths = {key: value for key, value in (self.params or {}).items() if key != "verbose"}
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Keras turns its variables into arrays in a way that numpy 2 dislikes
            return {**lengths, "optimizer": type(inner).__name__, **inner.get_config()}

    # Numbers

    def backward_begins(self, root: Tensor | None) -> None:
        """Backward was called, on the loss as a rule."""
        self._session.guarded(self._take_loss, root)

    def _take_loss(self, root: Tensor | None) -> None:
        loss = number_in(root)
        if loss is not None:
            self._losses.append(torch.as_tensor(self._steps[0].unscaled(loss)))

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Log the loss of a step."""
        self._session.guarded(self._log_step)

    def _log_step(self) -> None:
        if self._compiled:
            self._steps[0].batch_ended()
        updated = [steps.take_updated() for steps in self._steps]
        if not any(updated):
            return  # a micro-batch
        losses, self._losses = self._losses, []
        if len(losses) == self._steps[0].parts:  # else a train_step with several losses
            self._returned = True
            self._session.log({"train_loss": torch.stack(losses).mean()})

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Log the metrics of the epoch and of its validation."""
        metrics = dict(logs or {})
        if self._returned and "loss" in metrics:  # `train_loss` is that of single steps
            metrics["train_loss_epoch"] = metrics.pop("loss")
        self._session.log(metrics)


def check(version: str, backend: str) -> None:
    """Can this Keras be watched?

    Raises:
        RuntimeError: no.
    """
    if int(version.partition(".")[0]) < 3:
        raise RuntimeError(f"layerwatch watches Keras 3 or newer, and this is Keras {version}")
    if backend != "torch":
        raise RuntimeError(
            f"layerwatch watches Keras on its torch backend, and this is the {backend} backend: set the "
            "environment variable KERAS_BACKEND=torch before keras is imported"
        )


def _elements(view: Part) -> list[tuple[int, int]]:
    """Variables, and where their elements are."""
    return [(key, parameter.data_ptr()) for key, (_, parameter, _) in variables_of(view).items()]
