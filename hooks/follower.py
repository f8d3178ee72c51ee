"""Follows a training through torch's hooks: which step it is, what is captured, what went wrong."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..monitor import LogWriter
from . import backward, gradients, optimizers, scaler
from .cadence import Cadence
from .capture import Capture
from .distributed import CHECK_EVERY, Share
from .environment import describe_optimizers
from .guard import Guard
from .live import LiveCheck
from .local_gradients import LocalGradients
from .losses import Losses
from .manual import BackwardSteps
from .origin import of_gradients, of_loss
from .recorder import Accident, Recorder
from .scalars import PendingScalars, number_in
from .settings import Settings
from .shards import value_of
from .steps import End, Steps
from .tensors import WatchedTensor, ready


class Follower:
    """What the hooks of one watcher do. Every method that the training reaches is guarded.

    A step without a capture costs what it takes to see that: nothing here walks over the tensors then.
    """

    def __init__(
        self, log: LogWriter, models: list[nn.Module], tensors: Sequence[WatchedTensor],
        optimizers: list[Optimizer], cadence: Cadence, settings: Settings, guard: Guard, live: LiveCheck,
        first_step: int, share: Share | None = None,
    ) -> None:  # fmt: skip
        self.steps = Steps(first_step)
        self.scalars = PendingScalars(log)
        self.recorder = Recorder(log)
        self.begun = False
        self._log, self._tensors, self._settings, self._guard = log, tensors, settings, guard
        self._cadence, self._live = cadence, live
        self._optimizers = list(optimizers)
        self._discover = not optimizers
        self._strangers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._manual = BackwardSteps() if self._discover else None
        self._scaling = scaler.Scaling(guard(self._scaler_stepped))
        self._clipping = gradients.Clipping(tensors)
        self._losses = Losses(models) if settings.log_loss else None
        self._system = settings.system
        self._local = LocalGradients(guard) if settings.local_gradients and share is not None else None
        self._handles: list[Any] = []
        self._late = self._norms_taken = self._armed = False
        self._rates: list[Any] = []
        self._alone: Optimizer | None = None  # it makes the next step, which is only counted
        self._completed = first_step - 1
        self._share = share
        self.capture = Capture(log, models, tensors, settings, self._guard_forward, share)  # type: ignore[arg-type]

    def attach(self) -> None:
        before, after = self._unless_alone(self._guard(self._before_step)), self._guard(self._after_step)
        if self._discover:
            self._handles = [optimizers.Listening(before, after)]
        else:
            for optimizer in self._optimizers:
                self._handles += [
                    optimizer.register_step_pre_hook(before),
                    optimizer.register_step_post_hook(after),
                ]
        self.backward_begins = self._guard(self._backward_begins, traced=True)
        self.backward_ended = self._guard(self._backward_ended, traced=True) if self._manual else None
        self._clip_listener = self._guard(self._before_clip)
        backward.listen(self)
        gradients.listen(self._clip_listener)
        scaler.listen(self._scaling)
        self.capture.tap.attach()
        self._arm()

    def catch_up(self, scaling: scaler.Scaling, root: Tensor | None) -> None:
        """Attached as a backward pass begins on `root`: what this step has done so far."""
        if scaling.scaler is not None:
            self._scaling.scaling(scaling.scaler, scaling.take_loss())
        self.backward_begins(root)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._armed, self._alone = False, None
        self.capture.tap.detach()
        if self._local is not None:
            self._local.disarm()
        backward.unlisten(self)
        gradients.unlisten(self._clip_listener)
        scaler.unlisten(self._scaling)

    def _arm(self, *, early: bool = False) -> None:
        """Forward hooks exist for a step that will be captured only; `early`: for the one after it, too.

        Where one optimizer makes the whole step and nothing is to be captured, its hook counts and no more.
        """
        coming = self.steps.coming
        if self._cadence.wants(coming) and not self._log.has_room(coming):
            self._cadence.leave_out(coming)
        wanted = self._cadence.wants(coming) or (early and self._cadence.wants(coming + 1))
        if wanted != self._armed:
            self._armed = wanted
            (self.capture.tap.arm if wanted else self.capture.tap.disarm)()
            if self._local is not None:
                self._local.arm(self._tensors) if wanted else self._local.disarm()
        simple = len(self._optimizers) == 1 and self.steps.complete and not self._late
        busy = wanted or self._manual or self._settings.step_norms or self._scaling.active
        self._alone = self._optimizers[0] if simple and not busy else None

    # The optimizer's step

    def _watches(self, optimizer: Optimizer) -> bool:
        if not self._discover or any(o is optimizer for o in self._optimizers):
            return True
        if optimizer in self._strangers:
            return False
        ours = {id(t.parameter) for t in self._tensors}
        if not any(id(p) in ours for g in optimizer.param_groups for p in g["params"]):
            self._strangers.add(optimizer)
            return False
        self._optimizers.append(optimizer)
        if self.begun:
            self._log.update_info(optimizers=describe_optimizers(self._optimizers))
        return True

    def _unless_alone(self, before: Callable[..., None]) -> Callable[..., None]:
        """What is only counted needs no hook before it: not even a guard."""

        def unless_alone(optimizer: Optimizer, *_: Any) -> None:
            if optimizer is not self._alone:
                before(optimizer)

        return unless_alone

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if optimizer is self._alone or not self._watches(optimizer):
            return
        if self._manual is not None:
            self._leave_manual()
        if self.steps.is_next(optimizer):
            self._next_step()
        self._begin()
        if self._cadence.wants(self.steps.number):
            self.capture.before_step(optimizer)

    def _begin(self) -> None:
        if not self.begun:
            self.begun = True
            self.capture.begin(self.steps.number, self._optimizers, initial=self.steps.first == 0)
            if self._share is not None and not ready(self._tensors) and self._local is None:
                self._cadence.suspend()  # a replica: another rank writes all of it

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._losses is not None:
            self._losses.stepped(optimizer, ours=self._watches(optimizer))
        if optimizer is self._alone:
            self.steps.number += 1
            self._follow_rates(captured=False)
            self._end_step(self.steps.number)
            if self._cadence.wants(self.steps.coming):
                self._arm()
            return
        if not self._watches(optimizer):
            return
        step, captured = self.steps.number, self._cadence.wants(self.steps.number)
        # Fused optimizers under a scaler step without a change. Asking an accelerator for it synchronises.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and (captured or overflow.is_cpu) and float(overflow) > 0:
            self.capture.mark_skipped(step)
        self._scaling.let_step = True
        if captured:
            self.capture.after_step(step, optimizer)
        if not self.steps.any_ended:
            self._follow_rates(captured)
        if self.steps.end(optimizer, self._optimizers, self._all_known) is End.COMPLETE:
            self._complete_step()

    def _follow_rates(self, captured: bool) -> None:
        if self._cadence.suspended:
            return
        rates = [group.get("lr") for o in self._optimizers for group in o.param_groups]
        # A tensor may have changed in place. On an accelerator it is not waited for.
        if captured or rates != self._rates or isinstance(rates[0], Tensor):
            self._rates = rates
            self.capture.log_rates(self.steps.number, self._optimizers, always=captured)

    def _all_known(self) -> bool:
        """Is there an optimizer for every trainable tensor? If not, one may yet step for the first time."""
        if not self._discover or self.capture.without_optimizer:
            return True
        owned = {id(p) for o in self._optimizers for g in o.param_groups for p in g["params"]}
        return all(id(t.parameter) in owned for t in self._tensors if t.parameter.requires_grad)

    def _next_step(self) -> None:
        """A step begins; the one before it is over, whoever has not stepped in it."""
        self._complete_step()
        self._write_late()
        self.steps.advance()

    def _write_late(self) -> None:
        if self._late:
            self._late = False
            self.capture.complete_late(self.steps.number, self._optimizers)

    def _complete_step(self) -> None:
        """All optimizers of this step have stepped: write what is left and plan the next capture."""
        step = self.steps.number
        if self._completed == step:
            return
        self.steps.complete = True
        self._end_step(step)
        if self._cadence.wants(step):
            self._write_capture(step)
        elif self._settings.step_norms and not self._norms_taken:
            self.capture.step_norms(step)
        self._norms_taken = False
        self._judge_captured()
        self._arm()
        self._live.stop_if_asked()

    def _end_step(self, step: int) -> None:
        """What every step costs, besides being counted."""
        self._completed = step
        if self._losses is not None:
            found = self._losses.take(all_passes=self._manual is not None)
            self.scalars.add(step, {} if self._cadence.suspended else found)
        if self._share is not None and step % CHECK_EVERY == 0:
            self.capture.check_replicas(step)
        if self.scalars.pending:
            self.scalars.flush()
        if self._system is not None and self._system.samples:
            self._write_system(step)
        self._clipping.stepped()
        self.recorder.finish(step, self._rates, self._scaling.scale)
        if self.recorder.pending:
            self._tell(self.recorder.arrived())
        if self.capture.pending or self.capture.norms:
            self._judge_captured()

    def _write_system(self, step: int) -> None:
        """What was read of the machine since the step before."""
        for when, numbers in self._system.take() if self._system is not None else ():
            self._log.scalars(step, when, numbers)

    def _judge_captured(self) -> None:
        """The norms of captured gradients, which an accelerator may send later."""
        self.capture.settle()
        while self.capture.norms:
            captured, norm = self.capture.norms.pop(0)
            self._tell(self.recorder.captured(captured, norm, scaled=self._scaling.active))

    def _write_capture(self, step: int) -> None:
        waiting = self.steps.waiting(self._optimizers)
        all_known = self._all_known()
        self._late = bool(waiting) or not all_known
        sampling = self._system.seconds if self._system is not None else 0.0
        self._cadence.worked_beside(self._log.background_seconds + sampling)
        cost = self.capture.complete(
            step, self._optimizers, self._cadence.overhead, all_known=all_known, waiting=waiting
        )
        if self._local is not None:
            self.scalars.add(step, self._local.take(self._scaling.scale))
        self._cadence.captured(step, cost)
        before = self._live.seconds
        news = self._live.report_if_due(step)
        self._cadence.judged(self._live.seconds - before)
        if news:
            self._cadence.look_closer(step, now=False)

    # Clipping

    def _before_clip(self, clipped: list[Tensor], norm: Tensor | None) -> None:
        owner = self._clipping.owner(clipped)
        if owner is None:
            return
        if any(self.steps.has_stepped(o) and scaler.owns(o, owner.parameter) for o in self._optimizers):
            if self._late or not self.steps.complete:
                self._next_step()  # an optimizer that has stepped in this step is about to step again
            step = self.steps.coming
        else:
            step = self.steps.number
        norm = None if norm is None else value_of(norm)  # one of parts would have to be gathered
        if norm is not None:
            total = self._clipping.total(clipped, norm)
            scale = scaler.scale_in(self._scaling.scaler, self._optimizers, owner.parameter)
            total = total if scale is None else total / scale
            value = float(total) if total.is_cpu else total
            self._tell(self.recorder.norm(step, value, scaled=self._scaling.active))
        anew = self._clipping.is_new()
        if self._cadence.wants(step):
            if anew and self._manual is not None and not self._manual.certain:
                self.capture.forget_gradients()  # they were taken in case no optimizer would step
            scales = scaler.still_scaled(self._scaling.scaler, self._optimizers)
            self.capture.before_clip(clipped, scales, anew=anew)
        elif self._settings.step_norms and not self._norms_taken:
            self._norms_taken = True
            self.capture.step_norms(step)

    # Mixed precision

    def _scaler_stepped(self, scaler_: GradScaler, optimizer: Optimizer, skipped: bool) -> None:
        if not self._watches(optimizer):
            return
        if skipped:  # the optimizer's own hooks did not fire
            self._before_step(optimizer)
        if (scale := scaler_._scale) is not None:
            self.capture.loss_scale(self.steps.number, scale, self.scalars)
        if skipped:
            self.capture.mark_skipped(self.steps.number)
            self._after_step(optimizer)

    # Backward

    def _backward_begins(self, root: Tensor | None) -> None:
        self._clipping.backwards += 1
        if self._manual is not None:
            self._end_manual_step()
        unscaled = self._scaling.take_loss()
        if unscaled is not None:
            self._alone = None  # the scaler may skip the step
        loss = number_in(root if unscaled is None else unscaled)
        if loss is not None:
            if self._losses is not None:
                self._losses.add(loss)
            self._tell(self.recorder.loss(self.steps.coming, loss), root)

    def _backward_ended(self) -> None:
        if self._manual is None:
            return
        self._begin()
        if self._cadence.wants(self.steps.number):
            self.capture.before_step(None)
            self.capture.take_gradients()
        self._manual.remember(self._tensors)
        self._arm(early=True)  # the first forward may turn out to be that of the next step

    # Training without a torch optimizer: see manual.BackwardSteps

    def _end_manual_step(self) -> None:
        if self._manual is None or not self._manual.is_over():
            return
        self.capture.without_optimizer = True
        if self._cadence.wants(self.steps.number):
            self.capture.after_step(self.steps.number, None)
        self._complete_step()
        self.steps.advance()

    def _leave_manual(self) -> None:
        """A torch optimizer steps: from now on steps are counted by optimizers."""
        self._manual = self.backward_ended = None
        self.capture.without_optimizer = False
        if self._clipping.is_new():  # else clipping has taken them
            self.capture.forget_gradients()

    def _guard_forward(self, work: Callable[..., None]) -> Callable[..., None]:
        """Guard a forward hook. Without an optimizer the first forward after an update begins a step."""

        def recorded(*args: Any, **kwargs: Any) -> None:
            if self._manual is not None and torch._C._current_graph_task_id() == -1:
                self._end_manual_step()
                if not self._cadence.wants(self.steps.number):
                    return
            work(*args, **kwargs)

        return self._guard(recorded)

    # Accidents

    def logged(self, value: float | Tensor) -> None:
        """The user logged the training loss."""
        self._tell(self.recorder.loss(self.steps.number, value, logged=True))

    def _tell(self, accident: Accident | None, loss: Tensor | None = None) -> None:
        """Find where it began, write it down, and capture: its own step if that is not over, and the next."""
        if accident is None:
            return
        tensors = ready(self._tensors)
        where = None
        if accident.kind == "nonfinite_loss":
            where = of_loss(loss, tensors)
        elif accident.kind == "nonfinite_gradient":
            where = of_gradients(tensors)
        self._alone = None
        self.recorder.report(accident, where)
        in_time = accident.step > self._completed
        self._cadence.look_closer(accident.step if in_time else self.steps.number, now=in_time)
        if not in_time:
            self._arm()

    # The end

    def finish(self) -> None:
        """Write what is left of the last step, and the last weights."""
        if self._manual is not None:
            self._end_manual_step()
        step = self.steps.number
        if self.without_steps:
            text = "no torch optimizer stepped while watched, and no weight changed between backward passes"
            self._log.update_info(notes=[*self._log.info["notes"], text])
            return
        if self._manual is None and not self.steps.any_ended:  # an error ended it
            self.capture.abandon(step)
            step = self._completed
        elif self._manual is None:
            self._complete_step()
            self._write_late()
        elif self._completed < step:
            step = self._completed
        self.capture.final(step, self._optimizers)
        self._write_system(step)
        if self._share is not None and step % CHECK_EVERY:
            self.capture.check_replicas(step)

    @property
    def without_steps(self) -> bool:
        """Nothing was trained."""
        return self._completed < self.steps.first and not self.steps.any_ended
