"""Summaries on an accelerator: computed where the tensors are, fetched by one copy, waited for by nobody.

`device_ops` is what the device does; here it is told so, and what comes back becomes summaries. Tensors of
one size and dtype are done together; large ones in chunks, which add up on the host as summaries do.

Runs on the CPU as well, which is how it is tested; it was not run on a GPU. Devices without float64 (mps) are
for the host to summarise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..monitor.summary import Summary, merge
from .device_ops import BITS, FIELDS, Fields, any_nonzero, flat_of, stack, wide

#: Elements that are looked at together: bounds the temporary memory to about 30 bytes for each of them.
CHUNK = 1 << 21
#: Counters of one histogram call: float32, in which they are counted, tells integers up to 2^24 apart.
MOST_COUNTERS = 1 << 20


@dataclass(frozen=True)
class _Job:
    """Flat tensors of one length: a tensor; before, weight and perhaps gradient; or weight and reference."""

    ticket: int
    kind: str
    flat: tuple[Tensor, ...]
    count: int
    units: int = 0

    @property
    def group(self) -> tuple[Any, ...]:
        """Jobs that can be stacked agree in this."""
        first = self.flat[0]
        dtypes = tuple(t.dtype for t in self.flat)
        return self.kind, first.device, dtypes, first.numel(), self.count, self.units


@dataclass
class _Block:
    """What the device computes about `size` elements of each of some jobs: per field, one line for each."""

    jobs: list[_Job]
    kind: str
    size: int
    dtype: torch.dtype
    fields: Fields


class DeviceBatch:
    """The summaries of one capture: add tensors, `send`, and, when `ready`, take the `results` by ticket.

    Adding reads the tensors as they are now, in the order of the device's stream: what the training does to
    them next cannot be seen. Many at once are cheaper than one by one.
    """

    def __init__(self, chunk: int = CHUNK) -> None:
        self._chunk = chunk
        self._added: list[_Job] = []
        self._blocks: list[_Block] = []
        self._sent: list[tuple[list[_Block], Tensor, Any]] = []

    def summary(self, tensor: Tensor, *, rows: bool = False) -> int:
        """`statistics.summarise_tensor`, with `rows` `summarise_gradient`; returns the ticket."""
        return self.summaries([tensor], [rows])[0]

    def summaries(self, tensors: Sequence[Tensor], rows: Sequence[bool] | None = None) -> list[int]:
        """`summary` of each."""
        jobs = []
        for tensor, wanted in zip(tensors, rows or [False] * len(tensors), strict=True):
            flat = flat_of(tensor, parts=False)
            units = tensor.shape[0] if wanted and tensor.ndim >= 2 and not tensor.is_sparse else 0
            jobs.append(_Job(self._ticket(jobs), "summary", (flat,), tensor.numel(), units))
        return self._enqueue(jobs)

    def update(self, before: Tensor, weight: Tensor, gradient: Tensor | None) -> int:
        """`statistics.summarise_update`; `before` is a copy of the weight made before the step."""
        return self.updates([(before, weight, gradient)])[0]

    def updates(self, steps: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> list[int]:
        """`update` of each."""
        jobs = []
        for before, weight, gradient in steps:
            flat = [flat_of(before, parts=True), flat_of(weight, parts=True)]
            dense = gradient is not None and not gradient.is_sparse and not gradient.is_complex()
            if gradient is not None and dense and gradient.numel() == flat[0].numel():
                flat.append(flat_of(gradient, parts=False))
            jobs.append(_Job(self._ticket(jobs), "update", tuple(flat), weight.numel()))
        return self._enqueue(jobs)

    def drift(self, weight: Tensor, reference: Tensor | None, bits: Tensor | None = None) -> int:
        """Distance from a reference on the weight's device, as in `Reference.measure`, without the residual.

        Args:
            reference: as many elements as the weight; or None, and `bits`: those of bfloat16, as int16.
        """
        return self.drifts([(weight, reference, bits)])[0]

    def drifts(self, pairs: Sequence[tuple[Tensor, Tensor | None, Tensor | None]]) -> list[int]:
        """`drift` of each."""
        jobs = []
        for weight, reference, bits in pairs:
            other = reference if reference is not None else bits
            if other is None:
                raise ValueError("expected a reference or its bfloat16 bits, got neither")
            other = other.view(torch.bfloat16) if reference is None else other
            flat = (flat_of(weight, parts=True), flat_of(other, parts=True))
            jobs.append(_Job(self._ticket(jobs), "drift", flat, weight.numel()))
        return self._enqueue(jobs)

    def _ticket(self, coming: Sequence[_Job]) -> int:
        return len(self._added) + len(coming)

    def _enqueue(self, jobs: list[_Job]) -> list[int]:
        self._added += jobs
        groups: dict[tuple[Any, ...], list[_Job]] = {}
        for job in jobs:
            if job.flat[0].numel():
                groups.setdefault(job.group, []).append(job)
        with torch.no_grad():
            for group in groups.values():
                self._compute(group)
        return [job.ticket for job in jobs]

    def _compute(self, group: list[_Job]) -> None:
        kind, first = group[0].kind, group[0].flat[0]
        size, dtype, units = first.numel(), wide(first.dtype), group[0].units
        split = kind == "update" and group[0].count < size  # complex: two parts for each element
        most = max(1, min(self._chunk // size, MOST_COUNTERS // (2 * BITS[dtype].half)))
        for at in range(0, len(group), most):
            jobs = group[at : at + most]
            stacks = [stack([job.flat[i] for job in jobs]) for i in range(len(jobs[0].flat))]
            active = {"active": any_nonzero(stacks[0].view(len(jobs), units, -1))} if units else {}
            for start in range(0, size, self._chunk):
                width = min(self._chunk, size - start)
                parts = [s.narrow(1, start, width) for s in stacks]
                width //= 2 if split else 1
                self._blocks.append(_Block(jobs, kind, width, dtype, FIELDS[kind](parts, split) | active))
                active = {}

    def send(self) -> None:
        """Start one copy per device of all that was computed."""
        devices: dict[torch.device, list[_Block]] = {}
        for block in self._blocks:
            devices.setdefault(next(iter(block.fields.values())).device, []).append(block)
        for device, blocks in devices.items():
            raw = [f.reshape(-1).view(torch.uint8) for b in blocks for f in b.fields.values()]
            self._sent.append((blocks, *fetch(torch.cat(raw), device)))
        self._blocks = []

    def ready(self) -> bool:
        """Whether everything sent has arrived; does not wait."""
        return all(event is None or event.query() for _, _, event in self._sent)

    def wait(self) -> None:
        """Until everything sent has arrived."""
        for _, _, event in self._sent:
            if event is not None:
                event.synchronize()

    def results(self) -> list[Summary]:
        """The summaries by ticket; to be called when `ready` or after `wait`."""
        parts: list[list[Summary]] = [[] for _ in self._added]
        for blocks, host, _ in self._sent:
            raw, at = host.numpy(), 0
            for block in blocks:
                arrays = {}
                for name, field in block.fields.items():
                    end = at + field.numel() * field.element_size()
                    arrays[name] = raw[at:end].view(_NUMPY[field.dtype]).reshape(field.shape)
                    at = end
                for job, summary in zip(block.jobs, _summaries(block, arrays), strict=True):
                    parts[job.ticket].append(summary)
        return [_whole(job, found) for job, found in zip(self._added, parts, strict=True)]


def fetch(packed: Tensor, device: torch.device) -> tuple[Tensor, Any]:
    """The host's copy, on its way, and the event that says when it has arrived."""
    if device.type == "cpu":
        return packed, None
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    return host, getattr(torch, device.type).current_stream(device).record_event()


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.int64: np.int64, torch.bool: np.bool_}


def _summaries(block: _Block, fields: dict[str, NDArray]) -> list[Summary]:
    """Of each job of a block, of as many elements as the block has."""
    names = [name for name, values in fields.items() if values.ndim == 1]
    lines = [
        dict(zip(names, line, strict=True)) for line in zip(*(fields[n].tolist() for n in names), strict=True)
    ]
    more: list[dict[str, Any]] = [{} for _ in lines]
    for line in lines:  # norms come back, squares are stored: they may be infinite
        for name in {"norm", "ref_norm"} & line.keys():
            line[{"norm": "sum_sq", "ref_norm": "ref_sum_sq"}[name]] = line[name] * line.pop(name)
    if block.kind == "drift":
        return [Summary(**line) for line in lines]
    for line in lines:
        line["zeros"] = block.size - int(line.pop("nonzero"))
        if "lost" in line:
            line["lost"] = int(line["lost"])
    if "active" in fields:
        more = [{"units": a.size, "active": np.packbits(a).tobytes()} for a in fields["active"]]
    found = _histograms(fields["histogram"], block.dtype)
    return [
        Summary(count=block.size, subnormals=small - line["zeros"], **line, **counted, **other)
        for line, small, counted, other in zip(lines, *found, more, strict=True)
    ]


def _histograms(seen: NDArray, dtype: torch.dtype) -> tuple[list[int], list[dict[str, Any]]]:
    """Of each line (2 * half,): how many are zero or subnormal; buckets and what is not finite."""
    bits = BITS[dtype]
    seen = seen.astype(np.int64)
    negative, positive = seen[:, : bits.half], seen[:, bits.half :]
    numbers = np.arange(bits.first, bits.last) - bits.bias
    numbers = np.concatenate([-numbers[::-1], numbers]).astype(np.int16)
    counts = np.concatenate(
        [negative[:, bits.first : bits.last][:, ::-1], positive[:, bits.first : bits.last]], axis=1
    )
    rows, columns = counts.nonzero()
    ends = np.searchsorted(rows, np.arange(len(seen) + 1))
    both = negative + positive
    nans = both[:, bits.last + 1 :].sum(axis=1)
    return both[:, : bits.first].sum(axis=1).tolist(), [
        {
            "buckets": numbers[columns[start:end]],
            "counts": counts[i, columns[start:end]],
            "nans": int(nans[i]),
            "pos_infs": int(positive[i, bits.last]),
            "neg_infs": int(negative[i, bits.last]),
        }
        for i, (start, end) in enumerate(pairwise(ends))
    ]


def _whole(job: _Job, parts: list[Summary]) -> Summary:
    """The summary of a job from those of its chunks."""
    if not parts:
        return _of_nothing(job)
    summary = parts[0] if len(parts) == 1 else merge(parts)
    summary = replace(summary, units=parts[0].units, active=parts[0].active)
    if job.kind == "drift":
        return replace(summary, count=job.count)
    implied = job.count - summary.count  # the zeros of a sparse tensor
    if implied:
        low, high = min(summary.min, 0.0), max(summary.max, 0.0)
        summary = replace(summary, count=job.count, zeros=summary.zeros + implied, min=low, max=high)
    return summary


def _of_nothing(job: _Job) -> Summary:
    """No element is stored: the tensor is empty, or sparse and all zeros."""
    if job.kind == "drift":
        return Summary(dot=0.0, ref_sum_sq=0.0, sign_flips=0)
    if job.kind == "update":
        return Summary(dot=0.0, ref_sum_sq=0.0)
    if job.count:
        return Summary(count=job.count, zeros=job.count, min=0.0, max=0.0)
    return Summary()
