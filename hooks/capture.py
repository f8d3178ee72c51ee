"""One captured step: gradients, weights, updates, drift and activations become rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..monitor import LogWriter, Summary
from .activations import ActivationTap
from .environment import describe_optimizers
from .reference import Reference
from .rows import Rows
from .scalars import PendingScalars
from .settings import Settings
from .statistics import Array, parts_of, summarise_gradient, summarise_tensor, summarise_update
from .tensors import WatchedTensor, leaf_modules, learning_rates, ready, state_of
from .values import Values

#: Matrices whose rows are output units: which of them receive gradient tells dead units without activations.
_ROW_ROLES = {"matrix", "conv", "output"}

Guard = Callable[[Callable[..., None]], Callable[..., None]]


class Capture:
    """Collects the rows of a step from the optimizers' hooks and writes them."""

    def __init__(
        self, log: LogWriter, models: Sequence[nn.Module], tensors: list[WatchedTensor],
        settings: Settings, guard: Guard,
    ) -> None:  # fmt: skip
        self._log, self._tensors, self._settings = log, tensors, settings
        self.tap = ActivationTap(list(leaf_modules(models)) if settings.activations else [], guard)
        self._values = Values(log, tensors)
        self.without_optimizer = False  # states are judged as if every tensor were in one
        self._reference = settings.reference or Reference()
        self._rows = Rows()
        self._before: dict[str, Array] = {}
        self._unclipped: dict[str, Summary] = {}
        self._done: set[str] = set()  # tensors whose rows of this step are collected
        self._rates: list[float] = []
        self._states: dict[str, str] = {}  # the latest of each tensor
        self._gradient_sq = self._clipped_sq = self._spent = 0.0
        self.gradient_norm = 0.0  # of the last capture; not finite when a gradient was not
        self._last_captured: int | None = None
        self._skipped = -1
        self._loss_scale: float | None = None

    def begin(self, step: int, optimizers: Sequence[Optimizer], *, initial: bool) -> None:
        """Right before the first optimizer step: the weights that training starts from."""
        # Lazy modules have their shapes by now, and optimizers that were not given are found.
        entries = [t.entry() for t in self._tensors]
        self._log.update_info(optimizers=describe_optimizers(optimizers), tensors=entries)
        now = time.time()
        tensors = ready(self._tensors)
        if self._settings.reference is not None:
            self._reference.take(tensors)
            self._log.update_info(references=self._reference.describe())
            self._say(step, self._reference.notes())
        if initial:
            for tensor in tensors:
                self._rows.add(step, now, tensor.name, "initial_weight", summarise_tensor(tensor.parameter))
            self._write()
            self._values.store(step, now, "initial_weight", always=True)
            if self._settings.anchors is not None:
                self._log.values(self._settings.anchors.rows(step, now, tensors, "initial_sketch"))

    def _say(self, step: int, notes: Sequence[str]) -> None:
        for text in notes:
            self._log.event(step, "note", text)
            self._log.update_info(notes=[*self._log.info["notes"], text])

    def _of(self, optimizer: Optimizer | None) -> list[WatchedTensor]:
        """The tensors of an optimizer that are not collected yet; of None, all."""
        waiting = [t for t in ready(self._tensors) if t.name not in self._done]
        if optimizer is None:
            return waiting
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [t for t in waiting if id(t.parameter) in owned]

    def loss_scale(self, step: int, scale: Tensor, scalars: PendingScalars) -> None:
        """Log the loss scale; on an accelerator with captured steps only, as reading it costs a copy."""
        if scale.device.type == "cpu":
            if float(scale) != self._loss_scale:
                self._loss_scale = float(scale)
                scalars.add(step, {"loss_scale": self._loss_scale})
        elif self._done:
            scalars.add(step, {"loss_scale": scale})

    def mark_skipped(self, step: int) -> None:
        """A loss scaler found an infinite gradient and let the optimizer skip this step."""
        self._skipped = step
        self._log.event(
            step, "skipped", "the loss scaler skipped this step: a scaled gradient was not finite"
        )

    def before_clip(
        self, gradients: Sequence[Tensor], scales: Mapping[int, float], *, anew: bool = False
    ) -> None:
        """A clipping function is about to change these gradients: summarise those of ours as they are.

        `scales`: id of each parameter whose gradient still carries the loss scale -> that scale, divided out.
        `anew`: backward ran since they were clipped last: what was seen then is no longer the gradient.
        """
        wanted = {id(g) for g in gradients}
        tensors = [t for t in ready(self._tensors) if id(t.parameter.grad) in wanted]
        if anew:
            for tensor in tensors:
                self._unclipped.pop(tensor.name, None)
        self._before_change(tensors, scales)

    def _before_change(self, tensors: Sequence[WatchedTensor], scales: Mapping[int, float]) -> None:
        start = time.perf_counter()
        for tensor in tensors:
            gradient = tensor.parameter.grad
            if gradient is not None and tensor.name not in self._unclipped:
                scale = scales.get(id(tensor.parameter), 1.0)
                true = gradient if scale == 1.0 else gradient / scale
                self._unclipped[tensor.name] = summarise_gradient(true, rows=tensor.role in _ROW_ROLES)
        self._spent += time.perf_counter() - start

    def take_gradients(self) -> None:
        """Remember all gradients as they are now: a training without optimizer clears them when it likes."""
        self.forget_gradients()
        self._before_change(ready(self._tensors), {})

    def forget_gradients(self) -> None:
        """What was remembered of the gradients does not hold any more."""
        self._unclipped.clear()

    def step_norms(self, step: int) -> None:
        """The gradient norm of every tensor, at a step that is not captured."""
        now = time.time()
        for tensor in ready(self._tensors):
            if tensor.parameter.grad is not None:
                found = summarise_gradient(tensor.parameter.grad, rows=False)
                found = replace(found, buckets=found.buckets[:0], counts=found.counts[:0])
                self._rows.add(step, now, tensor.name, "gradient_norm", found)
        self._write()

    def before_step(self, optimizer: Optimizer | None) -> None:
        """Copy the weights that this optimizer (None: a training without one) is about to change."""
        if not self._settings.updates:
            return
        start = time.perf_counter()
        for tensor in self._of(optimizer):
            if tensor.parameter.requires_grad:
                values = parts_of(tensor.parameter)
                own = tensor.parameter.dtype in (torch.float16, torch.bfloat16)  # widened into a new array
                self._before[tensor.name] = values if own else values.copy()
        self._spent += time.perf_counter() - start

    def after_step(self, step: int, optimizer: Optimizer | None) -> None:
        """Collect the rows of the tensors that this optimizer owns; of None, of all."""
        start = time.perf_counter()
        with torch.no_grad():
            self._collect(step, self._of(optimizer), learning_rates([optimizer] if optimizer else []))
        self._spent += time.perf_counter() - start

    def _collect(
        self, step: int, tensors: list[WatchedTensor], rates: dict[int, float], *, stepped: bool = True
    ) -> None:
        now, skipped = time.time(), self._skipped == step
        for tensor in tensors:
            name, parameter = tensor.name, tensor.parameter
            gradient = parameter.grad
            found = self._gradient(tensor) if stepped else None
            zero = found is not None and found.zeros == found.count
            state = self._state(tensor, rates, zero)
            if not stepped and state in ("unused", "trainable"):  # its gradient was not used in this step
                state = self._states.get(name, "trainable")
            self._states[name] = state
            if found is not None:
                stage = "before_clip" if name in self._unclipped else "at_step"
                self._rows.add(step, now, name, "gradient", found, stage=stage, state=state, skipped=skipped)
                clipped = name in self._unclipped and not self.without_optimizer
                self._add_to_norms(found, gradient if clipped else None)
            self._rows.add(
                step, now, name, "weight", summarise_tensor(parameter), state=state, skipped=skipped
            )
            if name in self._before:
                update = summarise_update(self._before.pop(name), parameter, gradient)
                self._rows.add(step, now, name, "update", update, state=state, skipped=skipped)
            if name in self._reference and (drift := self._reference.measure(name, parameter)) is not None:
                self._rows.add(step, now, name, "drift", drift, state=state, skipped=skipped)
            self._done.add(name)

    def _state(self, tensor: WatchedTensor, rates: Mapping[int, float], zero: bool) -> str:
        rate = rates.get(id(tensor.parameter), 1.0 if self.without_optimizer else None)
        return state_of(tensor.parameter, rate, zero)

    def _gradient(self, tensor: WatchedTensor) -> Summary | None:
        gradient = tensor.parameter.grad
        if gradient is None and not self.without_optimizer:
            return None
        if gradient is None or tensor.name in self._unclipped:
            return self._unclipped.get(tensor.name)
        return summarise_gradient(gradient, rows=tensor.role in _ROW_ROLES)

    def _add_to_norms(self, found: Summary, clipped: Tensor | None) -> None:
        broken = math.nan if found.nans else math.inf if found.pos_infs + found.neg_infs else 0.0
        self._gradient_sq += found.sum_sq + broken
        own = found.sum_sq + broken
        if clipped is not None:
            own = float(torch.linalg.vector_norm(clipped, dtype=torch.float64)) ** 2
        self._clipped_sq += own

    def log_rates(self, step: int, optimizers: Sequence[Optimizer], *, always: bool) -> None:
        """Log the groups' learning rates when one has changed, or `always`."""
        now = [float(g.get("lr", math.nan)) for o in optimizers for g in o.param_groups]
        if always or now != self._rates:
            self._rates = now
            names = ["lr", *(f"lr/{i}" for i in range(1, len(now)))]
            self._log.scalars(step, time.time(), dict(zip(names, now, strict=True)))

    def complete(
        self, step: int, optimizers: Sequence[Optimizer], overhead: float, *, all_known: bool = True,
        waiting: Sequence[Optimizer] = (),
    ) -> float:  # fmt: skip
        """The step's last optimizer has stepped: add what no optimizer owns and the activations; write
        everything.

        Tensors of the optimizers that are `waiting` are left to `complete_late`: those may still step. Unless
        `all_known`, so are trainable tensors without an optimizer.

        Returns the seconds that this capture took.
        """
        start = time.perf_counter()
        rates = learning_rates(optimizers)
        others = [t for t in ready(self._tensors) if t.name not in self._done]
        if not all_known:
            others = [t for t in others if id(t.parameter) in rates or not t.parameter.requires_grad]
        late = learning_rates(waiting)
        others = [t for t in others if id(t.parameter) not in late]
        with torch.no_grad():
            self._collect(step, others, rates)
        now = time.time()
        for name, summary in self.tap.take().items():
            self._rows.add(step, now, name, "activation", summary)
        self.gradient_norm = math.sqrt(self._gradient_sq)
        scalars = {"grad_norm": self.gradient_norm, "overhead": overhead}
        if self._unclipped and not self.without_optimizer:
            scalars["clip_ratio"] = (
                math.sqrt(self._clipped_sq / self._gradient_sq) if self._gradient_sq else 1.0
            )
        self._log.scalars(step, now, scalars)
        first = self._last_captured is None
        self._values.captured(len(self._rows))
        self._write()
        self._values.store(step, now, always=first)
        if self._settings.anchors is not None and self._settings.anchors.wants(step):
            self._log.values(self._settings.anchors.rows(step, now, ready(self._tensors)))
        self._say(step, self._reference.notes())
        cost = self._spent + self.tap.seconds + time.perf_counter() - start
        for name in self._done:
            self._unclipped.pop(name, None)
        self._reset(step)
        if all_known and not waiting:
            self._forget_step()
        return cost

    def complete_late(self, step: int, optimizers: Sequence[Optimizer]) -> None:
        """The step is over, and was complete before: write what was left out. Which optimizers stepped after
        all has been collected; the weights of the others did not change.
        """
        with torch.no_grad():
            self._collect(step, self._of(None), learning_rates(optimizers), stepped=False)
        self._write()
        self._reset(step)
        self._forget_step()

    def _forget_step(self) -> None:
        self._done.clear()
        self._unclipped.clear()
        self._before.clear()

    def _reset(self, step: int) -> None:
        self._last_captured = step
        self._gradient_sq = self._clipped_sq = self._spent = self.tap.seconds = 0.0

    def final(self, step: int, optimizers: Sequence[Optimizer]) -> None:
        """At the end: the last weights and their values, if they are not captured yet."""
        now = time.time()
        if self._last_captured != step:
            rates = learning_rates(optimizers)
            with torch.no_grad():
                for tensor in ready(self._tensors):
                    state = self._state(tensor, rates, False)
                    if state in ("unused", "trainable"):  # gradients may be cleared by now
                        last = self._states.get(tensor.name)
                        state = last if last in ("unused", "zero_gradient") else "trainable"
                    self._rows.add(
                        step, now, tensor.name, "weight", summarise_tensor(tensor.parameter), state=state
                    )
                    drift = self._reference.measure(tensor.name, tensor.parameter)
                    if drift is not None:
                        self._rows.add(step, now, tensor.name, "drift", drift, state=state)
            self._write()
            self._last_captured = step
        self._values.store(step, now, always=True)

    def _write(self) -> None:
        if len(self._rows):
            self._log.stats(self._rows.batch())
