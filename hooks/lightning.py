"""A callback for the Trainer of Lightning 2.x.

    from layerwatch.hooks.lightning import LayerwatchCallback
    trainer = Trainer(callbacks=[LayerwatchCallback(run="runs/exp1")])

Fabric needs none: `watch(model, optimizer)` takes what `fabric.setup` returned.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .session import Session
from .watcher import Watcher

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = object

logger = logging.getLogger("layerwatch")

#: The two names of one framework: each has a Trainer and a Callback of its own.
PACKAGES = ("lightning.pytorch", "pytorch_lightning")
OLDEST = (2, 0)
#: What of the Trainer is shown beside the hyperparameters.
SETTINGS = ("accumulate_grad_batches", "gradient_clip_val", "precision")
LOSSES = ("loss", "train_loss")


class LayerwatchCallback(Callback):
    """Watches `Trainer.fit()`, and logs what the LightningModule logs.

    `train_loss` is the loss that `training_step` returned, the mean of a step's micro-batches, unless the
    module logs one of that name at every step. Other numbers keep their names: those of a step, of a
    validation (at the step after which it ran; the sanity check is left out), and of an epoch.
    Hyperparameters (`save_hyperparameters()`) are the run's `config`. A fit that goes on from a checkpoint
    goes on in its run, at the checkpoint's step; another fit of the same module goes on after the last one.

    It works with the Trainer of `lightning` and of `pytorch_lightning`, whichever is imported.

    Args:
        run, every, options: as `watch` takes them. Without `run` a checkpoint tells which one it was.

    Raises:
        ImportError: Lightning is not installed.
    """

    def __new__(cls, *_: Any, **__: Any) -> LayerwatchCallback:
        return object.__new__(_with_bases(cls, _bases()))

    def __init__(self, run: str | Path | None = None, every: int | str = "auto", **options: Any) -> None:
        self._session = Session(run, every, options)
        self._checkpoint: dict[str, Any] = {}  # what was loaded and not used yet
        self._losses: list[Tensor] = []  # of the micro-batches of the step under way
        self._steps = 0  # that the Trainer has counted
        self._returned = False  # training_step returns losses
        self._epoch: list[str] = []  # metrics of the epoch that has just ended
        self._unlisten: Callable[[], object] = _nothing

    def __reduce__(self) -> tuple[Any, ...]:
        """Lightning pickles callbacks for the processes that it spawns; the class was made at run time."""
        return _unpickled, (type(self).__mro__[1], vars(self))

    @property
    def watcher(self) -> Watcher | None:
        """Of the latest fit."""
        return self._session.watcher

    # Beginning and end

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to watch: the sanity check is over; weights and optimizers are those of the checkpoint."""
        checkpoint, self._checkpoint = self._checkpoint, {}
        first = 0 if self.watcher is not None else trainer.global_step
        settings = {name: getattr(trainer, name, None) for name in SETTINGS}
        self._session.begin(
            pl_module,
            [o for o in trainer.optimizers if isinstance(o, Optimizer)] or None,
            {**settings, **dict(getattr(pl_module, "hparams", {}))},
            step=checkpoint.get("step", first) if trainer.global_step else 0,
            run=checkpoint.get("run"),
        )
        self._losses, self._epoch = [], []
        self._steps = trainer.global_step
        self._listen(trainer)

    def _listen(self, trainer: Trainer) -> None:
        """Record checkpoints as they are saved: Lightning has no hook for that. Ends with `_unlisten`."""
        save, own = trainer.save_checkpoint, vars(trainer)
        before = {name: own[name] for name in ("save_checkpoint",) if name in own}

        @wraps(save)
        def saved(filepath: str | Path, *args: Any, **options: Any) -> None:
            save(filepath, *args, **options)
            self._session.saved(filepath)

        def undo() -> None:
            own.pop("save_checkpoint", None)
            own.update(before)

        trainer.save_checkpoint = saved
        self._unlisten = undo

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the log."""
        self._session.guarded(self._log_epoch, trainer)
        self._end()

    def _end(self) -> None:
        self._unlisten()
        self._unlisten = _nothing
        self._session.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Finish the log: what was captured until now tells what went wrong."""
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finish the log of a fit that ended in another way."""
        if stage == "fit":
            self._end()

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints: the run, and the step at which it would go on."""
        watcher = self.watcher
        return {} if watcher is None else {"run": str(watcher.run), "step": watcher.next_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoints."""
        self._checkpoint = state_dict

    # Numbers

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log loss and metrics of a step."""
        self._session.guarded(self._log_step, trainer, pl_module, outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics of a validation."""
        self._session.guarded(self._log_validation, trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics of the epoch before."""
        self._session.guarded(self._log_epoch, trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember which metrics the epoch has: Lightning is about to compute them."""
        self._session.guarded(self._remember_epoch, trainer)

    def _log_step(self, trainer: Trainer, module: LightningModule, outputs: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # Lightning has divided it for the accumulation.
            parts = trainer.accumulate_grad_batches if module.automatic_optimization else 1
            self._losses.append(loss.detach() * parts)
        if trainer.global_step == self._steps:
            return  # a micro-batch
        self._steps = trainer.global_step
        metrics = _take(trainer, _names(trainer, lambda meta: meta.on_step))
        self._returned = bool(self._losses)
        if self._losses and not any(name in metrics for name in LOSSES):
            metrics["train_loss"] = torch.stack(self._losses).mean()
        self._losses = []
        self._session.log(metrics)

    def _log_validation(self, trainer: Trainer) -> None:
        metrics = _take(trainer, _names(trainer, lambda meta: meta.on_epoch))
        if "loss" in metrics:
            metrics.setdefault("val_loss", metrics.pop("loss"))
        self._session.log(metrics)

    def _remember_epoch(self, trainer: Trainer) -> None:
        # Computing them here could wait for other ranks before Lightning means to.
        self._epoch = _names(trainer, lambda meta: meta.on_epoch, "_epoch")

    def _log_epoch(self, trainer: Trainer) -> None:
        names, self._epoch = self._epoch, []
        metrics = _take(trainer, names) if names else {}
        for name in LOSSES if self._returned else ():
            if name in metrics:  # `train_loss` is that of single steps
                metrics["train_loss_epoch"] = metrics.pop(name)
        self._session.log(metrics)


def _names(trainer: Trainer, wanted: Callable[[Any], bool], forked: str = "") -> list[str]:
    """The metrics that were logged in the loop under way, as `trainer.callback_metrics` calls them.

    Args:
        wanted: chooses by how a metric was logged. forked: added to the name of one that was logged both of
            steps and of the epoch.
    """
    names = []
    for item in (trainer._results or {}).values():
        meta = item.meta
        if not item.has_reset and wanted(meta):
            name = meta.name + (forked if meta.forked else "")
            of_several = meta.add_dataloader_idx and meta.dataloader_idx is not None
            names.append(f"{name}/dataloader_idx_{meta.dataloader_idx}" if of_several else name)
    return names


def _take(trainer: Trainer, names: list[str]) -> dict[str, Any]:
    known = trainer.callback_metrics
    return {name: known[name] for name in names if name in known}


def _nothing() -> None:
    """What there is to undo before a training begins."""


def _unpickled(kind: type[LayerwatchCallback], state: dict[str, Any]) -> LayerwatchCallback:
    callback = kind.__new__(kind)
    vars(callback).update(state)
    return callback


@cache
def _with_bases(kind: type[LayerwatchCallback], bases: tuple[type, ...]) -> type[LayerwatchCallback]:
    return type(kind.__name__, (kind, *bases), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _bases() -> tuple[type, ...]:
    """The Callback classes of what is imported already; else of what can be imported."""
    loaded = [module for name in PACKAGES if (module := sys.modules.get(name)) is not None]
    for name in () if loaded else PACKAGES:
        try:
            loaded.append(importlib.import_module(name))
            break
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    if not loaded:
        raise ImportError("layerwatch.hooks.lightning needs Lightning: pip install 'layerwatch[lightning]'")
    for package in loaded:
        _check_version(package.__name__, package.__version__)
    return tuple(package.Callback for package in loaded)


@cache
def _check_version(package: str, version: str) -> None:
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST:
        logger.warning(
            "layerwatch is made for Lightning %d.%d or newer, and this is %s %s: weights and gradients are "
            "logged, metrics perhaps not", *OLDEST, package, version,
        )  # fmt: skip
