"""One captured step: gradients, weights, updates, drift, activations and optimizer state become rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..monitor import LogWriter
from . import optimizer_state
from .activations import ActivationTap
from .distributed import Share, checksums
from .environment import describe_optimizers
from .lora import Adapters
from .measure import Measure, Taken
from .reference import Reference
from .scalars import PendingScalars
from .settings import Settings
from .tensors import Tensors, WatchedTensor, learning_rates, ready, state_of
from .values import Values

#: The optimizers' state is summarised at the first capture and at every tenth one from there.
STATE_EVERY = 10
#: The memory for the copies of the weights is kept while captures are at most so many steps apart.
NEAR = 4

Guard = Callable[[Callable[..., None]], Callable[..., None]]


class Capture:
    """Collects the rows of a step from the optimizers' hooks and writes them."""

    def __init__(
        self, log: LogWriter, models: Sequence[nn.Module], tensors: Sequence[WatchedTensor],
        settings: Settings, guard: Guard, share: Share | None = None,
    ) -> None:  # fmt: skip
        self._log, self._tensors, self._settings, self._share = log, tensors, settings, share
        self.tap = ActivationTap(models if settings.activations else [], guard)
        self.without_optimizer = False  # states are judged as if every tensor were in one
        self.norms: list[tuple[int, float]] = []  # step and gradients' norm of captures, for who takes them
        self._values = Values(log)
        self._reference = settings.reference or Reference()
        self._adapters = Adapters(models)
        self._measure = Measure(self._reference, updates=settings.updates, adapters=self._adapters)
        self.pending: list[tuple[Taken, dict[str, float]]] = []  # rows that are on a device yet
        self._present: list[WatchedTensor] = []  # the tensors of this step
        self._opened = False  # they are known
        self._bytes = 0
        self._done: set[str] = set()  # tensors whose rows of this step are collected
        self._rates: list[float] = []
        self._states: dict[str, str] = {}  # the latest of each tensor
        self._spent = 0.0
        self._captures = 0
        self._last_captured: int | None = None
        self._skipped = -1
        self._loss_scale: float | None = None

    @property
    def last(self) -> int | None:
        """The step that was captured last."""
        return self._last_captured

    def begin(self, step: int, optimizers: Sequence[Optimizer], *, initial: bool) -> None:
        """Right before the first optimizer step: the weights that training starts from."""
        # Lazy modules have their shapes by now, and optimizers that were not given are found.
        if isinstance(self._tensors, Tensors):
            self._tensors.refresh()
        entries = [t.entry() for t in self._tensors]
        self._log.update_info(optimizers=describe_optimizers(optimizers), tensors=entries, **self._divided())
        if self._share is not None and self._share.world.rank:
            self.tap.leave_out(self._share.modules_elsewhere())
        now = time.time()
        tensors = ready(self._tensors)
        if initial:
            first = Measure(Reference(), updates=False)
            with torch.no_grad():
                first.collect(step, now, tensors, lambda *_: None, gradients=False, kind="initial_weight")
            with self._log.together():
                self._write(first.taken(), {})
                self._values.store(step, now, tensors, "initial_weight", always=True)
                if self._settings.anchors is not None:
                    self._log.values(self._settings.anchors.rows(step, now, tensors, "initial_sketch"))
        if self._settings.reference is not None:
            self._adapters.find()
            self._reference.take(tensors, self._adapters.names(tensors))
            if self._reference.from_start:
                self._adapters.begin(tensors)
            self._log.update_info(references=self._reference.describe())
            self._say(step, self._reference.notes())

    def _divided(self) -> dict[str, Any]:
        """Among several ranks: which tensors are this one's to write, for its description."""
        if self._share is None:
            return {}
        before = self._log.info.get("shards", {})
        return {"shards": {**before, str(self._log.session): self._share.decide(self._tensors)}}

    def check_replicas(self, step: int) -> None:
        """Log what tells whether the copies on several ranks are still the same."""
        now = time.time()
        with torch.no_grad():
            rows = [(step, now, name, "checksum", sums) for name, sums in checksums(self._tensors)]
        self._log.values(rows)

    def _say(self, step: int, notes: Sequence[str]) -> None:
        for text in notes:
            self._log.event(step, "note", text)
            self._log.update_info(notes=[*self._log.info["notes"], text])

    def _open(self) -> None:
        """A captured step begins: what is left of the last one is written, and the tensors are known."""
        if self._opened:
            return
        self._opened = True
        self.settle(wait=True)
        if isinstance(self._tensors, Tensors) and self._tensors.refresh():
            self._follow_model()
        self._present = ready(self._tensors)
        self._bytes = sum(t.weight.nbytes for t in self._present)

    def _follow_model(self) -> None:
        """Parameters came, went or were replaced."""
        self._adapters.find()
        known = {entry["tensor"] for entry in self._log.info["tensors"]}
        entries = [t.entry() for t in self._tensors]
        gone = [e for e in self._log.info["tensors"] if e["tensor"] not in {e["tensor"] for e in entries}]
        self._log.update_info(tensors=[*entries, *gone], **self._divided())
        if self._settings.reference is not None and self._reference.from_start:
            for tensor in ready(self._tensors):
                if tensor.name not in known and tensor.name not in self._reference:
                    self._reference.put(tensor.name, tensor.weight)
            self._log.update_info(references=self._reference.describe())

    def _of(self, optimizer: Optimizer | None) -> list[WatchedTensor]:
        """The tensors of an optimizer that are not collected yet; of None, all."""
        waiting = [t for t in self._present if t.name not in self._done]
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

    # Before the weights change

    def before_clip(
        self, gradients: Sequence[Tensor], scales: Mapping[int, float], *, anew: bool = False
    ) -> None:
        """A clipping function is about to change these gradients: summarise those of ours as they are.

        `scales`: id of each parameter whose gradient still carries the loss scale -> that scale, divided out.
        `anew`: backward ran since they were clipped last: what was seen then is no longer the gradient.
        """
        start = time.perf_counter()
        self._open()
        wanted = {id(g) for g in gradients}
        tensors = [t for t in self._present if id(t.parameter.grad) in wanted]
        with torch.no_grad():
            if anew:
                self._measure.forget_gradients(tensors)
            self._measure.take_gradients(tensors, scales)
        self._spent += time.perf_counter() - start

    def take_gradients(self) -> None:
        """Remember all gradients as they are now: a training without optimizer clears them when it likes."""
        start = time.perf_counter()
        self._open()
        self._measure.forget_gradients()
        with torch.no_grad():
            self._measure.take_gradients(self._present, {})
        self._spent += time.perf_counter() - start

    def forget_gradients(self) -> None:
        """What was remembered of the gradients does not hold any more."""
        self._measure.forget_gradients()

    def step_norms(self, step: int) -> None:
        """The gradient norm of every tensor, at a step that is not captured."""
        with torch.no_grad():
            self._measure.norms(step, time.time(), ready(self._tensors))
        self.pending.append((self._measure.taken(), {}))
        self.settle()

    def before_step(self, optimizer: Optimizer | None) -> None:
        """Copy the weights that this optimizer (None: a training without one) is about to change."""
        start = time.perf_counter()
        self._open()
        with torch.no_grad():
            self._measure.copy(self._of(optimizer), self._bytes)
        self._spent += time.perf_counter() - start

    # After the weights have changed

    def after_step(self, step: int, optimizer: Optimizer | None) -> None:
        """Collect the rows of the tensors that this optimizer owns; of None, of all."""
        start = time.perf_counter()
        self._open()
        self._collect(step, self._of(optimizer), learning_rates([optimizer] if optimizer else []))
        self._spent += time.perf_counter() - start

    def _collect(
        self, step: int, tensors: Sequence[WatchedTensor], rates: Mapping[int, float], *, stepped: bool = True
    ) -> None:
        def judge(tensor: WatchedTensor, known: bool) -> str:
            state = state_of(tensor.parameter, rates.get(id(tensor.parameter), default), False)
            if state == "unused" and known:  # cleared by now
                state = "trainable"
            if not stepped and state in ("unused", "trainable"):  # its gradient was not used in this step
                state = self._states.get(tensor.name, "trainable")
            return state

        if not tensors:
            return
        default = 1.0 if self.without_optimizer else None
        with torch.no_grad():
            states = self._measure.collect(
                step, time.time(), tensors, judge, gradients=stepped, clips=not self.without_optimizer,
                skipped=self._skipped == step,
            )  # fmt: skip
        self._states |= {name: state for name, state in states.items() if state is not None}
        self._done.update(states)

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
        self._open()
        rates = learning_rates(optimizers)
        others = [t for t in self._present if t.name not in self._done]
        if not all_known:
            others = [t for t in others if id(t.parameter) in rates or not t.parameter.requires_grad]
        late = learning_rates(waiting)
        self._collect(step, [t for t in others if id(t.parameter) not in late], rates)
        now = time.time()
        seen = self.tap.take()
        for found in seen:
            if found.summary is not None:
                self._measure.add(step, now, found.tensor, found.kind, found.summary)
        self._say(step, self.tap.notes())
        if self._captures % STATE_EVERY == 0:
            self._add_optimizer_state(step, now, optimizers)
        vectors = [(o.tensor, o.kind, o.values) for o in seen if o.values is not None]
        with self._log.together():
            self._write(self._measure.taken(), {"overhead": overhead})
            self._values.store(step, now, self._present, always=self._captures == 0)
            self._values.store_vectors(step, now, vectors)
            if self._settings.anchors is not None and self._settings.anchors.wants(step):
                self._log.values(self._settings.anchors.rows(step, now, self._present))
        self._say(step, self._reference.notes() + self._adapters.notes())
        self._captures += 1
        if all_known and not waiting:
            self._forget_step(step)
        cost = self._spent + self.tap.seconds + time.perf_counter() - start
        self._reset(step)
        return cost

    def _add_optimizer_state(self, step: int, now: float, optimizers: Sequence[Optimizer]) -> None:
        names = {id(t.parameter): t.name for t in self._present}
        with torch.no_grad():
            for optimizer in optimizers:
                for name, kind, summary in optimizer_state.summaries(optimizer, names):
                    self._measure.add(step, now, name, kind, summary)

    def complete_late(self, step: int, optimizers: Sequence[Optimizer]) -> None:
        """The step is over, and was complete before: write what was left out. Which optimizers stepped after
        all has been collected; the weights of the others did not change.
        """
        self._open()
        self._collect(step, self._of(None), learning_rates(optimizers), stepped=False)
        self.pending.append((self._measure.taken(), {}))
        self.settle()
        self._forget_step(step)
        self._reset(step)

    def abandon(self, step: int) -> None:
        """The step was not made after all: an error came while its optimizer was at work."""
        self.tap.take()
        self._forget_step(step)

    def _forget_step(self, step: int) -> None:
        self._done.clear()
        self._opened = False
        near = self._last_captured is None or step - self._last_captured <= NEAR
        self._measure.step_is_over(keep_memory=near)

    def _reset(self, step: int) -> None:
        self._last_captured = step
        self._spent = self.tap.seconds = 0.0

    def final(self, step: int, optimizers: Sequence[Optimizer]) -> None:
        """At the end: the last weights and their values, if they are not captured yet."""
        now = time.time()
        self._open()
        self.settle(wait=True)
        if self._last_captured != step:
            rates = learning_rates(optimizers)
            self._done.clear()
            self._collect(step, self._present, rates, stepped=False)
            taken = self._measure.taken()
            self._last_captured = step
        else:
            taken = None
        with self._log.together():
            if taken is not None:
                self._write(taken, {})
            self._values.store(step, now, self._present, always=True)

    # Into the log

    def _write(self, taken: Taken, scalars: dict[str, float]) -> None:
        """Write these rows, now if they are here and in order, else when the device has sent them."""
        self.pending.append((taken, scalars))
        self.settle()

    def settle(self, *, wait: bool = False) -> None:
        """Write what has arrived, in order; `wait`: everything."""
        while self.pending and (wait or self.pending[0][0].ready()):
            taken, scalars = self.pending.pop(0)
            batch = taken.batch()
            self._states |= taken.states
            if scalars:
                scalars["grad_norm"] = math.sqrt(taken.total_sq)
                self.norms.append((taken.step, scalars["grad_norm"]))
                if taken.clipped:
                    scalars["clip_ratio"] = (
                        math.sqrt(taken.used_sq / taken.total_sq) if taken.total_sq else 1.0
                    )
                self._log.scalars(taken.step, taken.time, scalars)
            if taken.vectors:
                self._log.values([(taken.step, taken.time, *vector) for vector in taken.vectors])
            if batch is not None:
                self._log.stats(batch)
                self._values.captured(batch.num_rows)
