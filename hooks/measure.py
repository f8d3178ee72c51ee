"""What a captured step did to each tensor, by the route that suits where its elements are.

plain memory of the host: all tensors in one compiled sweep (`sweeper`); an accelerator: asynchronous
operations there and one copy (`device`); anything else, such as double precision, complex and sparse: one by
one (`statistics`). The rows are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..monitor import kernels
from ..monitor.summary import Summary
from .lora import Adapters, Change
from .reference import Reference
from .rows import Block, Rows
from .statistics import Array, parts_of, summarise_gradient, summarise_tensor, summarise_update
from .sweeper import Copies, Job, Sweeper, like, plain
from .taken import Gradient, Line, Taken, norm_alone
from .tensors import WatchedTensor

#: Matrices whose rows are output units: which of them receive gradient tells dead units without activations.
_ROW_ROLES = {"matrix", "conv", "output"}

SWEEP, SINGLE, DEVICE = "sweep", "single", "device"

#: Tells the state of a tensor, given whether its gradient is known.
Judge = Callable[[WatchedTensor, bool], str | None]


class Measure:
    """Collects the rows of one captured step after the other."""

    def __init__(self, reference: Reference, *, updates: bool, adapters: Adapters | None = None) -> None:
        self._reference, self._updates = reference, updates
        self._adapters = adapters or Adapters([])
        self._adapted: dict[str, Change | None] = {}  # weights whose drift is not that of what is stored
        self._sweeper, self._copies = Sweeper(), Copies()
        self._before: dict[str, Array | Tensor] = {}  # copies of what is not plain
        self._gradients: dict[str, Gradient] = {}
        self._tickets: dict[str, int] = {}  # of gradients on a device
        self._routes: dict[str, str] = {}  # as long as the step lasts
        self._rows = Rows()
        self._taken = Taken(0, 0.0, self._rows)

    # Before the step

    def copy(self, tensors: Sequence[WatchedTensor], expected: int) -> None:
        """Copy the trainable ones among these weights; `expected`: bytes of all that the step may change."""
        if not self._updates:
            return
        names, weights = [], []
        for tensor in tensors:
            if not tensor.parameter.requires_grad:
                continue
            weight = tensor.weight
            route = self._route(tensor)
            if route == SWEEP:
                names.append(tensor.name)
                weights.append(weight)
            else:
                copy = weight.detach().clone()
                self._before[tensor.name] = parts_of(copy) if route == SINGLE else copy
        if weights:
            self._copies.take(names, weights, expected)

    def take_gradients(
        self, tensors: Sequence[WatchedTensor], scales: Mapping[int, float], stage: str = "before_clip"
    ) -> None:
        """Summarise the gradients of these as they are now, unless it was done in this step already.

        `scales`: id of each parameter whose gradient still carries the loss scale -> that scale, divided out.
        """
        jobs, far = [], []
        for tensor in tensors:
            gradient = tensor.gradient
            if gradient is None or tensor.name in self._gradients:
                continue
            scale = scales.get(id(tensor.parameter), 1.0)
            true = gradient if scale == 1.0 else gradient / scale
            job = self._job(tensor, true, row=True)
            if job.gradient_row:
                jobs.append(job)
            elif self._route(tensor) != DEVICE:
                summary = summarise_gradient(true, rows=tensor.role in _ROW_ROLES)
                self._gradients[tensor.name] = Gradient(stage, summary=summary)
            else:
                far.append((tensor, true))
        if far:
            rows = [tensor.role in _ROW_ROLES for tensor, _ in far]
            tickets = self._taken.device.summaries([true for _, true in far], rows)
            for (tensor, _), ticket in zip(far, tickets, strict=True):
                self._gradients[tensor.name] = Gradient(stage, ticket=ticket, batch=self._taken.device)
        if jobs:
            block = self._sweep(jobs)
            self._gradients |= {job.name: Gradient(stage, block, i) for i, job in enumerate(jobs)}

    def forget_gradients(self, tensors: Sequence[WatchedTensor] | None = None) -> None:
        """What was taken of these (None: of all) does not count any more."""
        for name in list(self._gradients) if tensors is None else [t.name for t in tensors]:
            gradient = self._gradients.pop(name, None)
            if gradient is not None and gradient.block is not None:
                gradient.block.drop(gradient.job)

    # After the step

    def collect(
        self, step: int, now: float, tensors: Sequence[WatchedTensor], judge: Judge,
        *, gradients: bool = True, clips: bool = True, skipped: bool = False, kind: str = "weight",
    ) -> dict[str, str | None]:  # fmt: skip
        """The rows of these tensors; returns their states.

        Args:
            step, now: of the rows.
            judge: tells a tensor's state.
            gradients: they are of this step.
            clips: gradients that were taken before were then clipped: the optimizer used what they are now.
            skipped: the loss scaler skipped the step.
            kind: what the weights are called.
        """
        self._taken.step, self._taken.time = step, now
        self._adapted = self._adapters.changes(tensors, self._reference)
        near = [t for t in tensors if self._route(t) == SWEEP]
        jobs = [
            self._job(t, t.gradient if gradients else None, row=t.name not in self._gradients) for t in near
        ]
        if gradients:
            fused = {job.name for job in jobs if job.gradient_row}
            self.take_gradients([t for t in tensors if t.name not in fused], {}, "at_step")
            if clips:
                self._add_clipped(tensors)
        for tensor, job in zip(near, jobs, strict=True):
            self._add_weight(job, tensor)
        block = self._sweep(jobs)
        block.rename = {"weight": kind}

        def settled(tensor: WatchedTensor) -> str | None:
            return self._add_gradient(tensor, judge, clips, skipped) if gradients else judge(tensor, False)

        states: dict[str, str | None] = {}
        for i, (tensor, job) in enumerate(zip(near, jobs, strict=True)):
            if job.gradient_row:
                state = _with_gradient(judge(tensor, True), block.zero[i])
                self._taken.total_sq += block.squares[i]
                self._taken.used_sq += block.squares[i]
            else:
                state = settled(tensor)
            states[tensor.name] = state
            block.decide(i, state, skipped=skipped, stage="at_step")
            if job.reference is None:
                self._add_drift(tensor, state, skipped)
        far = [t for t in tensors if self._route(t) != SWEEP]
        for tensor in far:
            states[tensor.name] = settled(tensor)
            if self._route(tensor) == SINGLE:
                self._add_single(tensor, states[tensor.name], skipped, kind)
        self._add_on_device([t for t in far if self._route(t) == DEVICE], states, skipped, kind)
        for name, change in self._adapted.items():
            if change is not None:
                row = {"tensor": name, "kind": "drift", "state": states[name], "skipped": skipped}
                self._taken.adapted.add(change, row)
        return states

    def _route(self, tensor: WatchedTensor) -> str:
        known = self._routes.get(tensor.name)
        if known is None:
            known = self._routes[tensor.name] = route_of(tensor.weight)
        return known

    def _job(self, tensor: WatchedTensor, gradient: Tensor | None, *, row: bool) -> Job:
        """Of a tensor whose gradient (or itself) may not be plain: then the job has none."""
        weight = tensor.weight
        shape = weight.shape
        job = Job(tensor.name, weight.numel())
        if gradient is None or self._route(tensor) != SWEEP:
            return job
        if gradient.shape == shape and plain(gradient):
            job.gradient, job.gradient_row = like(gradient, weight), row
            if row and tensor.role in _ROW_ROLES and len(shape) > 1 and job.count:
                job.units = shape[0] if shape[0] == 1 or weight.stride(0) * shape[0] == job.count else 0
        return job

    def _sweep(self, jobs: Sequence[Job]) -> Block:
        block = self._sweeper.run(jobs)
        self._rows.extend(block)
        return block

    def _add_weight(self, job: Job, tensor: WatchedTensor) -> None:
        weight = tensor.weight
        job.weight, job.before = weight, self._copies.address(tensor.name)
        if weight.is_contiguous() and tensor.name not in self._adapted:  # references are row-major
            reference, residual = self._reference.stored(tensor.name)
            if reference is not None and plain(reference) and reference.numel() == job.count:
                job.reference, job.residual = reference, residual

    def _add_gradient(self, tensor: WatchedTensor, judge: Judge, clips: bool, skipped: bool) -> str | None:
        """The row of its gradient, if there is one; the tensor's state."""
        gradient = self._gradients.pop(tensor.name, None)
        if gradient is None:
            return judge(tensor, False)
        state = judge(tensor, True)
        if (
            gradient.batch is not None and gradient.batch is not self._taken.device
        ):  # taken for an earlier write
            gradient.batch.wait()
            gradient.summary, gradient.ticket = gradient.batch.results()[gradient.ticket], -1
        state = _with_gradient(state, gradient.zero)
        unchanged = gradient.stage == "at_step" or not clips
        if gradient.ticket >= 0:
            self._tickets[tensor.name] = gradient.ticket
            self._line(gradient.ticket, tensor, "gradient", state, skipped, gradient.stage)
            if unchanged:
                self._taken.norms.append((gradient.ticket, gradient.ticket))
            return state
        if gradient.block is not None:
            gradient.block.decide(gradient.job, state, skipped=skipped, stage=gradient.stage)
        elif gradient.summary is not None:
            self._add(tensor, "gradient", gradient.summary, state, skipped, gradient.stage)
        self._taken.total_sq += gradient.squares
        self._taken.used_sq += gradient.squares if unchanged else 0.0
        return state

    def _add_clipped(self, tensors: Sequence[WatchedTensor]) -> None:
        """Gradients that were taken before clipping, as they are now."""
        near = []
        for tensor in tensors if self._gradients else ():
            taken, gradient = self._gradients.get(tensor.name), tensor.gradient
            if taken is None or taken.stage == "at_step" or gradient is None:
                continue
            self._taken.clipped = True
            if taken.ticket >= 0 and taken.batch is self._taken.device:
                self._taken.norms.append((taken.ticket, self._taken.device.summary(gradient.detach())))
            elif taken.ticket < 0:
                gradient = gradient.detach()
                near.append(gradient.coalesce().values() if gradient.is_sparse else gradient)
        if near:
            norms = torch.stack([torch.linalg.vector_norm(g, dtype=_double(g)) for g in near])
            self._taken.used_sq += float(norms.square().sum())

    def _add_drift(self, tensor: WatchedTensor, state: str | None, skipped: bool) -> None:
        if tensor.name in self._adapted:
            return
        drift = self._reference.measure(tensor.name, tensor.weight)
        if drift is not None:
            self._add(tensor, "drift", drift, state, skipped)

    def _add_single(self, tensor: WatchedTensor, state: str | None, skipped: bool, kind: str) -> None:
        """The rows of a tensor on the host that is not plain."""
        weight, gradient = tensor.weight, tensor.gradient
        self._add(tensor, kind, summarise_tensor(weight), state, skipped)
        before = self._before.pop(tensor.name, None)
        if before is not None and not isinstance(before, Tensor):
            self._add(tensor, "update", summarise_update(before, weight, gradient), state, skipped)
        self._add_drift(tensor, state, skipped)

    def _add_on_device(
        self, tensors: Sequence[WatchedTensor], states: Mapping[str, str | None], skipped: bool, kind: str
    ) -> None:
        """The rows of tensors on an accelerator: asked for together, not waited for."""
        device, changes, drifts = self._taken.device, [], []
        for tensor in tensors:
            weight, gradient = tensor.weight.detach(), tensor.gradient
            before = self._before.pop(tensor.name, None)
            if isinstance(before, Tensor):
                changes.append((tensor, (before, weight, None if gradient is None else gradient.detach())))
            if tensor.name in self._adapted:
                continue
            reference, residual = self._reference.stored(tensor.name)
            if reference is not None and reference.device == weight.device:
                drifts.append((tensor, (weight, reference, None), residual))
            elif reference is None:
                self._add_drift(tensor, states[tensor.name], skipped)
        tickets = device.summaries([t.weight.detach() for t in tensors])
        for tensor, ticket in zip(tensors, tickets, strict=True):
            self._line(ticket, tensor, kind, states[tensor.name], skipped)
        for (tensor, _), ticket in zip(changes, device.updates([c for _, c in changes]), strict=True):
            self._line(ticket, tensor, "update", states[tensor.name], skipped)
        for (tensor, _, residual), ticket in zip(
            drifts, device.drifts([d for _, d, _ in drifts]), strict=True
        ):
            self._line(ticket, tensor, "drift", states[tensor.name], skipped, residual=residual)

    def _line(
        self, ticket: int, tensor: WatchedTensor, kind: str, state: str | None, skipped: bool,
        stage: str | None = None, residual: float | None = None,
    ) -> None:  # fmt: skip
        row = {"tensor": tensor.name, "kind": kind, "state": state, "skipped": skipped, "stage": stage}
        gradient = self._tickets.get(tensor.name, -1)
        self._taken.lines.append(Line(ticket, row, gradient, residual))

    def _add(
        self, tensor: WatchedTensor, kind: str, summary: Summary, state: str | None, skipped: bool,
        stage: str | None = None,
    ) -> None:  # fmt: skip
        self._rows.add(
            self._taken.step, self._taken.time, tensor.name, kind, summary,
            stage=stage, state=state, skipped=skipped,
        )  # fmt: skip

    def norms(self, step: int, now: float, tensors: Sequence[WatchedTensor]) -> None:
        """The norm of each gradient, and no more."""
        self._taken.step, self._taken.time = step, now
        for tensor in tensors:
            gradient = tensor.gradient
            if gradient is None:
                continue
            if self._route(tensor) == DEVICE:
                ticket = self._taken.device.summary(gradient.detach())
                self._line(ticket, tensor, "gradient_norm", None, False)
                continue
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            norm = float(torch.linalg.vector_norm(values.detach(), dtype=_double(values)))
            finite = math.isfinite(norm)
            found = Summary(gradient.numel(), sum_sq=norm * norm) if finite else summarise_tensor(gradient)
            self._add(tensor, "gradient_norm", norm_alone(found), None, False)

    def add(self, step: int, now: float, name: str, kind: str, summary: Summary) -> None:
        """A row of something else than a parameter."""
        self._taken.step, self._taken.time = step, now
        self._rows.add(step, now, name, kind, summary)

    def taken(self) -> Taken:
        """What was collected; begins anew. What is on a device is on its way."""
        taken, self._taken = self._taken, Taken(0, 0.0, self._rows)
        self._tickets.clear()
        if taken.lines:
            taken.device.send()
        taken.adapted.send()
        return taken

    def step_is_over(self, *, keep_memory: bool) -> None:
        """What was copied and taken and not collected is forgotten."""
        self.forget_gradients()
        self._before.clear()
        self._routes.clear()
        if keep_memory:
            self._copies.clear()
        else:
            self._copies.release()


def _with_gradient(state: str | None, zero: bool) -> str | None:
    return "zero_gradient" if zero and state == "trainable" else state


def route_of(weight: Tensor) -> str:
    """By which route a tensor is measured."""
    if kernels.available() and plain(weight):
        return SWEEP
    return SINGLE if weight.is_cpu or weight.device.type == "mps" else DEVICE


def _double(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64
