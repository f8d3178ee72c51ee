"""The `Watcher` that `watch` returns: follows the optimizer's steps and decides what is captured."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..monitor import LogWriter, Run
from . import gradients, scaler
from .cadence import Cadence
from .capture import Capture
from .scalars import PendingScalars, number
from .scaler import still_scaled
from .settings import Settings
from .statistics import warm_up
from .tensors import WatchedTensor

if TYPE_CHECKING:
    from ..monitor import Finding

logger = logging.getLogger("layerwatch")

#: Detectors run in the training (for `on_finding`) for at most this share of its time, and not more often.
CHECK_SHARE, CHECK_SECONDS = 0.01, 10.0


class Watcher:
    """A training under watch; made by `watch`. `run` is its folder, `step` the optimizer step, from 0."""

    def __init__(
        self, log: LogWriter | None, run: Path, models: list[nn.Module], tensors: list[WatchedTensor],
        optimizers: list[Optimizer], cadence: Cadence, settings: Settings,
        on_finding: Callable[[Finding], None] | None, first_step: int,
    ) -> None:  # fmt: skip
        self.run, self.step = run, first_step
        self._first_step = first_step
        self._optimizers = list(optimizers)
        self._discover = not optimizers
        self._owned = {id(t.parameter) for t in tensors}
        self._counted: set[int] = set()  # optimizers whose step of this number has begun
        self._stepped: set[int] = set()  # and ended
        self._completed = -1
        self._begun = False
        self._scaler: GradScaler | None = None
        self._scaler_let_step = True
        self._cadence = cadence
        self._on_finding = on_finding
        self._reported: set[str] = set()
        self._checked, self._check_cost = time.perf_counter(), 0.0
        self._handles: list[Any] = []
        self._open = log is not None
        self._process = os.getpid()  # a forked child inherits everything, and must leave the log alone
        self._failed = False
        self._log = log
        if log is None:
            return
        warm_up()
        self._scalars = PendingScalars(log)
        self._capture = Capture(log, models, tensors, settings, self._guard)
        self._attach()
        log.event(self.step, "restart" if first_step else "start", f"process {os.getpid()}")
        atexit.register(self.close)

    def _attach(self) -> None:
        before, after = self._guard(self._before_step), self._guard(self._after_step)
        if self._discover:
            self._handles = [
                register_optimizer_step_pre_hook(before),
                register_optimizer_step_post_hook(after),
            ]
        for optimizer in self._optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(before),
                optimizer.register_step_post_hook(after),
            ]
        self._clip_listener = self._guard(self._before_clip)
        gradients.listen(self._clip_listener)
        scaler.listen(self)
        if self._cadence.wants(self.step):
            self._capture.tap.arm()

    def _guard(self, work: Callable[..., None]) -> Callable[..., None]:
        """Time the work, and turn any error in it into a log entry: training goes on without us."""

        @functools.wraps(work)
        def guarded(*args: Any, **kwargs: Any) -> None:
            if self._failed or os.getpid() != self._process:
                return
            self._cadence.enter()
            try:
                work(*args, **kwargs)
            except Exception as error:  # whatever it is, it must not reach the training
                self._fail(error)
            finally:
                self._cadence.leave()

        return guarded

    def _fail(self, error: Exception) -> None:
        if self._failed:
            return
        self._failed = True
        self._detach()
        logger.warning("layerwatch stopped watching %s after an error; training goes on: %r", self.run, error)
        try:
            with (self.run / "errors.log").open("a") as file:
                file.write(f"step {self.step}\n{traceback.format_exc()}\n")
            if self._log is not None:
                self._log.event(self.step, "error", f"watching stopped: {error!r}; see errors.log")
        except OSError:
            logger.warning("the error could not be written to %s", self.run)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._capture.tap.disarm()
        gradients.unlisten(self._clip_listener)
        scaler.unlisten(self)

    # The optimizer's step

    def _watches(self, optimizer: Optimizer) -> bool:
        if not self._discover or any(o is optimizer for o in self._optimizers):
            return True
        if any(id(p) in self._owned for g in optimizer.param_groups for p in g["params"]):
            self._optimizers.append(optimizer)
            return True
        return False

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._watches(optimizer):
            return
        if id(optimizer) in self._counted:
            self._complete_step()
            self.step += 1
            self._counted.clear()
            self._stepped.clear()
        self._counted.add(id(optimizer))
        if not self._begun:
            self._begun = True
            self._capture.begin(self.step, self._optimizers, initial=self._first_step == 0)
        if self._cadence.wants(self.step):
            self._capture.before_step(optimizer)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._watches(optimizer):
            return
        self._stepped.add(id(optimizer))
        self._scaler_let_step = True
        captured = self._cadence.wants(self.step)
        if len(self._stepped) == 1:  # the first of this step
            self._capture.log_rates(self.step, self._optimizers, always=captured)
        # Fused optimizers under a scaler step without a change. Asking an accelerator for it synchronises.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and (captured or overflow.device.type == "cpu") and float(overflow) > 0:
            self._capture.mark_skipped(self.step)
        if captured:
            self._capture.after_step(self.step, optimizer)
        if self._completed == self.step:
            self._capture.complete_late(self.step)
        elif len(self._stepped) == len(self._optimizers):
            self._complete_step()

    def _complete_step(self) -> None:
        """All optimizers of this step have stepped: write what is left and plan the next capture."""
        if self._completed == self.step:
            return
        self._completed = self.step
        self._scalars.flush()
        if self._cadence.wants(self.step):
            all_known = not self._discover or self.step > self._first_step
            cost = self._capture.complete(
                self.step, self._optimizers, self._cadence.overhead, all_known=all_known
            )
            self._cadence.captured(self.step, cost)
            self._check_live()
        if self._cadence.wants(self.step + 1):
            self._capture.tap.arm()
        else:
            self._capture.tap.disarm()

    def _before_clip(self, clipped: list[Tensor]) -> None:
        coming = self.step + (self._completed == self.step)
        if self._cadence.wants(coming):
            self._capture.before_clip(clipped, still_scaled(self._scaler, self._optimizers))

    # Mixed precision: see scaler.ScalerListener

    def scaling(self, scaler: GradScaler) -> None:
        self._scaler = scaler

    def scaler_steps(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        self._scaler_let_step = False

    def scaler_stepped(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        self._guard(self._after_scaler)(scaler, optimizer)

    def _after_scaler(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        if not scaler.is_enabled() or not self._watches(optimizer):
            return
        skipped = not self._scaler_let_step
        if skipped:  # the optimizer's own hooks did not fire
            self._before_step(optimizer)
        if (scale := scaler._scale) is not None:
            self._capture.loss_scale(self.step, scale, self._scalars)
        if skipped:
            self._capture.mark_skipped(self.step)
            self._after_step(optimizer)

    # What the user calls

    def log(self, **scalars: Any) -> None:
        """Log named numbers at the current step.

        Args:
            scalars: numbers, or tensors with one element (on an accelerator it is not waited for).
                NaN and infinite values are data.

        Raises:
            TypeError: a value is no number.
        """
        values = {name: number(name, value) for name, value in scalars.items()}
        if not self._open or not values or os.getpid() != self._process:
            return
        try:
            self._scalars.add(self.step, values)
        except Exception as error:  # a full disk, say: what the user logged is lost, the training is not
            self._open = False
            self._fail(error)

    def close(self) -> None:
        """Write the last weights, turn the log into Parquet, detach. May be called twice; at exit as well."""
        if not self._open or self._log is None or os.getpid() != self._process:
            return
        self._open = False
        atexit.unregister(self.close)
        final = self._guard(self._capture.final)
        if not self._begun:
            self._guard(self._say_nothing_stepped)()
        if self._begun and not self._failed:
            if self._completed != self.step:
                self._guard(self._complete_step)()
            final(self.step, self._optimizers)
        if not self._failed:
            self._detach()
        try:
            self._scalars.flush(wait=True)
            self._log.event(
                self.step, "close", f"monitoring took {100 * self._cadence.overhead:.2g} % of the time"
            )
            self._log.close()
        except Exception as error:  # the rows are in the write-ahead files, and stay there
            self._fail(error)
        self._report_findings()

    def _say_nothing_stepped(self) -> None:
        text = "no torch optimizer stepped while watched: neither weights nor gradients were captured"
        if self._log is not None:
            self._log.update_info(notes=[*self._log.info["notes"], text])

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Findings

    def _check_live(self) -> None:
        since = time.perf_counter() - self._checked
        if self._on_finding is not None and since > max(CHECK_SECONDS, self._check_cost / CHECK_SHARE):
            start = time.perf_counter()
            self._report_findings()
            self._checked = time.perf_counter()
            self._check_cost = self._checked - start

    def _report_findings(self) -> None:
        if self._on_finding is None:
            return
        try:
            for finding in Run(self.run).findings():
                if finding.problem not in self._reported:
                    self._reported.add(finding.problem)
                    self._on_finding(finding)
        except Exception as error:  # a detector or the user's callback: neither may stop the training
            logger.warning("on_finding failed and is not called again: %r", error)
            self._on_finding = None
