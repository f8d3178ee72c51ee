"""The `Watcher` that `watch` returns: what the user holds in hand of a training under watch."""

from __future__ import annotations

import atexit
import logging
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from ..monitor import LogWriter, kernels
from ..monitor.ranks import FIRST
from . import termination
from .alerting import Alerting
from .cadence import Cadence
from .checkpoints import Checkpoints, checked
from .distributed import Share
from .follower import Follower
from .guard import Guard
from .live import LiveCheck
from .place import Place
from .scalars import number
from .settings import Settings
from .statistics import warm_up
from .tensors import WatchedTensor

if TYPE_CHECKING:
    from ..monitor import Finding
    from ..monitor.alerts.config import Config

logger = logging.getLogger("layerwatch")

#: What a run on an object store may take to be sent when the process is asked to end, in seconds.
UPLOAD_GRACE = 20.0
#: Names under which the training loss is logged.
LOSSES = ("train_loss", "loss")

_watching: weakref.WeakSet[Watcher] = weakref.WeakSet()


class Watcher:
    """A training under watch; made by `watch`. `run` is its folder, `step` the optimizer step, from 0.

    One at a time for each model: two would count, time and copy each other's work.

    Raises:
        ValueError: another watcher that is not closed watches one of these parameters.
    """

    def __init__(
        self, log: LogWriter | None, place: Place, models: list[nn.Module], tensors: Sequence[WatchedTensor],
        optimizers: list[Optimizer], cadence: Cadence, settings: Settings,
        on_finding: Callable[[Finding], None] | None, first_step: int, *, live: bool = True,
        share: Share | None = None, alerts: Config | None = None,
    ) -> None:  # fmt: skip
        self.run = place.shown
        #: Ends a watcher that nobody asked for by name, when somebody does for another one.
        self.give_way: Callable[[], None] | None = None
        self._tensors, self._cadence, self._log = tensors, cadence, log
        self._first_step, self._system = first_step, settings.system
        self._open = log is not None
        self._guard = Guard(cadence, self._fail)
        if log is None:
            return
        warm_up()
        self._uploader = place.uploader()
        self._checkpoints = Checkpoints(log, place.source, first_step) if log.writer == FIRST else None
        alerting = None if alerts is None else Alerting(alerts, place, log)
        self._live = LiveCheck(place.folder, place.shown, log, on_finding, wanted=live, alerting=alerting)
        self._follower = Follower(
            log, models, tensors, optimizers, cadence, settings, self._guard, self._live, first_step, share
        )
        self._attach()
        which, why = kernels.describe()  # known by now: all that a training needs was compiled or loaded
        log.update_info(kernels=which, notes=[*log.info["notes"], *why])
        log.begin(first_step)
        if self._system is not None:
            self._system.start()
        atexit.register(self.close)
        termination.listen(self, UPLOAD_GRACE if self._uploader else termination.GRACE_SECONDS)

    @property
    def step(self) -> int:
        """The optimizer step, from 0."""
        return self._follower.steps.number if self._log is not None else self._first_step

    @property
    def next_step(self) -> int:
        """The number of the optimizer step that comes next."""
        return self._follower.steps.coming if self._log is not None else self._first_step

    @property
    def captured(self) -> bool:
        """The step was captured: its `grad_norm` is in the log."""
        return self._log is not None and self._follower.capture.last == self.step

    def _attach(self) -> None:
        _watching.add(self)
        self._follower.attach()

    def _detach(self) -> None:
        _watching.discard(self)
        self._follower.detach()

    def _end_sampling(self, *, wait: bool = True) -> None:
        if self._system is not None:
            self._system.close(wait=wait)

    def _fail(self, error: Exception) -> None:
        """Stop to watch; the training goes on."""
        if self._guard.failed:
            return
        self._guard.failed = True
        try:
            self._end_sampling(wait=False)
            self._detach()
        except Exception as other:  # what stays attached does nothing any more
            logger.warning("not every hook could be removed: %r", other)
        logger.warning("layerwatch stopped watching %s after an error; training goes on: %r", self.run, error)
        try:
            folder = self._log.path if self._log else Path()
            with (folder / "errors.log").open("a") as file:
                file.write(f"step {self.step}\n{traceback.format_exc()}\n")
            if self._log is not None:
                self._log.event(self.step, "error", f"watching stopped: {error!r}; see errors.log")
        except OSError:
            logger.warning("the error could not be written to %s", self.run)

    def log(self, **scalars: Any) -> None:
        """Log named numbers at the current step.

        Args:
            scalars: numbers, or tensors with one element (on an accelerator it is not waited for).
                NaN and infinite values are data.

        Raises:
            TypeError: a value is no number.
        """
        values = {name: number(name, value) for name, value in scalars.items()}
        if not self._open or not values or self._guard.forked or self._cadence.suspended:
            return
        try:
            with self._guard.working():
                self._follower.scalars.add(self.step, values)
        except Exception as error:  # a full disk, say: what the user logged is lost, the training is not
            self._open = False
            self._fail(error)
            return
        for name in LOSSES:
            if name in values:
                self._guard(self._follower.logged)(values[name])

    def checkpoint(
        self,
        path: str | Path,
        *,
        data: str | Mapping[str, Any] | None = None,
        parent: str | Path | None = None,
    ) -> None:
        """Record the weights that were just saved: what they are, and what they come from.

        The file is opened here and read in the background: step, SHA-256 of the file and of each tensor,
        size, types, git commit, seed, config and parent go to the run's folder, nothing beside the file. What
        cannot be recorded is told by a warning and in the log, never by an error. `layerwatch verify` and
        `layerwatch lineage` find the record again. Of several processes the first one records.

        Args:
            path: a weight file, or a folder with one, complete by now.
            data: a note on the data that it was trained with.
            parent: the file, folder or SHA-256 of the weights that it was made of; None: the checkpoint
                before in this run, else the one that a resumed run went on from, else the file given as
                `reference`.

        Raises:
            TypeError: `path` or `parent` is no path, or `data` neither text nor a mapping of plain values.
        """
        for name, value in (("path", path), ("parent", parent)):
            if not isinstance(value, str | Path) and (name, value) != ("parent", None):
                raise TypeError(f"expected {name} as a path, got {type(value).__name__}")
        data = checked(data)
        if self._log is None or self._guard.forked or self._checkpoints is None:
            return
        if not self._open or self._guard.failed:
            logger.warning(
                "%s is not recorded: watching %s has ended, call checkpoint() earlier", path, self.run
            )
            return
        self._guard(self._checkpoints.add)(self.step, self.next_step, path, data, parent)

    def configure(self, config: Mapping[str, Any]) -> None:
        """Show these hyperparameters beside the run, instead of those that `watch` was given."""
        if self._open and self._log is not None and not self._guard.forked:
            self._guard(self._log.update_info)(config=dict(config))

    def close(self) -> None:
        """Write the last weights, turn the log into Parquet, detach. May be called twice; at exit as well."""
        if not self._open or self._log is None or self._guard.forked:
            return
        self._open = False
        atexit.unregister(self.close)
        try:
            termination.unlisten(self)
            self._end_sampling()
            self._guard(self._follower.finish)()
            self._guard(self._follower.recorder.close)()
            if not self._guard.failed:
                self._detach()
            self._follower.scalars.flush(wait=True)
            if self._checkpoints is not None:
                self._checkpoints.finish()
            self._live.finish(self.step)
            self._log.update_info(cadence=self._cadence.describe())
            self._log.event(self.step, "close", self._cadence.words())
            self._log.close()
            self._send()
        except Exception as error:  # the rows are in the write-ahead files, and stay there
            self._fail(error)

    def terminate(self) -> bool:
        """The process is about to end: finish the log as far as that is quick (see `Terminable`)."""
        if not self._open or self._log is None or self._guard.forked:
            return True
        if self._cadence.busy:
            return False
        self._open = False
        try:
            self._end_sampling(wait=False)
            self._follower.capture.settle(wait=True)
            self._follower.recorder.close()
            self._follower.scalars.flush(wait=True)
            if self._checkpoints is not None:
                self._checkpoints.finish(termination.GRACE_SECONDS / 2)
            self._live.terminate(self.step)
            self._log.event(self.step, "close", f"SIGTERM; {self._cadence.words()}")
            self._log.close(quick=self._uploader is None)
            self._send(UPLOAD_GRACE - 2.0)
        except Exception as error:  # what is in the write-ahead files stays there
            logger.warning("the log of %s was not finished: %r", self.run, error)
        return True

    def _send(self, timeout: float = 60.0) -> None:
        """Of a run on an object store: what is left."""
        left = self._uploader.close(timeout) if self._uploader else []
        if left:
            logger.warning(
                "%d files of %s could not be sent and are kept: `layerwatch upload %s` sends them",
                len(left), self.run, self.run,
            )  # fmt: skip

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def refuse_a_second(tensors: Sequence[WatchedTensor]) -> None:
    """See `Watcher`.

    Raises:
        ValueError: another watcher that is not closed watches one of these parameters.
    """
    ours = {id(t.parameter) for t in tensors}
    for other in list(_watching):
        if any(id(t.parameter) in ours for t in other._tensors):
            if other.give_way is not None:
                other.give_way()
                continue
            raise ValueError(
                f"expected a model that is not watched yet, got one that is, for the run {other.run}: "
                "close() that watcher first"
            )
