"""What drift is measured from: copies of tensors, as exact as memory allows, and the distance to them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..monitor import plain
from ..monitor.sketch import add_sketch, relative_error
from ..monitor.summary import Summary
from .checkpoint import State, match
from .statistics import Array, parts_of
from .tensors import WatchedTensor

#: Without a budget, tensors up to this size keep a copy in full precision; larger ones a bf16 copy, half the
#: memory.
EXACT_ELEMENTS = 65_536
#: Counters of a sketch, 4 bytes each; the error is `monitor.sketch.relative_error`.
SKETCHES = (4_096, 16_384)
#: Elements that are converted at once: no transient copy of a whole tensor.
_BLOCK = 1 << 20

#: "mapped", "full", "bfloat16", or the number of a sketch's counters.
Form = str | int


@dataclass(frozen=True)
class _Kept:
    """One reference: flat values (full or bfloat16, on the weight's device) or a sketch's counters."""

    form: Form
    values: Tensor
    squares: float = math.nan  # |r|^2, where the values do not tell it exactly
    residual: float | None = None  # |r - r'|^2 of a bfloat16 copy r'
    mapped: bool = False


class Reference:
    """References of tensors, and the distance of the weights from them.

    A bf16 copy r' of r differs from it by the rounding residual. The distance to r' is larger than the one to
    r by the residual's norm, as the residual is independent of the training's direction: |w - r|^2 = |w -
    r'|^2 - |r - r'|^2 up to their correlation (measured: an error of at most 0.07 % on real trajectories).
    A sketch takes the same memory whatever the tensor's size; comparing with it costs about as much as one
    more summary of the tensor, and on an accelerator a copy to the host.

    Args:
        state: where the references come from; None: the weights that `take` finds. Forgotten by `take`.
        memory: bytes that copies may take; None: full precision up to `EXACT_ELEMENTS` elements and wherever
            bf16 would save nothing, bf16 above. Tensors that are mapped from a file stay mapped: they are
            exact and take none.

    Raises:
        ValueError: memory is no whole number above 0.
    """

    def __init__(self, state: State | None = None, memory: int | None = None) -> None:
        whole = isinstance(memory, int) and not isinstance(memory, bool)
        if memory is not None and not (whole and memory > 0):
            raise ValueError(
                f"expected reference_memory as a whole number of bytes above 0, or None, got {memory!r}"
            )
        self._state, self._memory = state, memory
        self.from_start = state is None  # else from a checkpoint
        self._file = state.file if state is not None else None
        self._kept: dict[str, _Kept] = {}
        self._notes = list(state.notes) if state is not None else []
        self._equal: dict[str, tuple[int, int]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    @property
    def nbytes(self) -> int:
        """Bytes that the references take; what is mapped from a file takes none."""
        return sum(0 if k.mapped else k.values.nbytes for k in self._kept.values())

    def notes(self) -> list[str]:
        """What is worth telling the user and was not told yet."""
        notes, self._notes = self._notes, []
        return notes

    def take(self, tensors: Sequence[WatchedTensor], compared: Collection[str] = ()) -> None:
        """Keep the references of these tensors in the best forms that the memory allows.

        `compared`: of these `is_equal` is to be known, which reads them once.
        """
        state, self._state = self._state, None  # it may be large: not held longer than needed
        found = {t.name: t.weight.detach() for t in tensors}
        from_start = state is None
        if state is not None:
            found, missing = match(tensors, state.tensors)
            if missing:
                share = f"{len(missing)} of {len(tensors)} tensors"
                self._note(f"{share} have no counterpart of their shape in the reference", missing)
        forms: dict[str, Form | None] = {}
        if self._file is not None:
            here = [t.name for t in tensors if t.name in found and t.parameter.device.type == "cpu"]
            forms |= {name: "mapped" for name in here if found[name].is_contiguous()}
        copied = {name: tensor for name, tensor in found.items() if name not in forms}
        if self._memory is None:
            forms |= {name: usual_form(tensor) for name, tensor in copied.items()}
        else:
            forms |= plan({name: options(tensor) for name, tensor in copied.items()}, self._memory)
        for t in tensors:
            if t.name in compared and t.name in found and (from_start or _same(found[t.name], t.weight)):
                self._equal[t.name] = _version(t.parameter)
            if t.name in found and (form := forms[t.name]) is not None:
                self._keep(t.name, found[t.name].to(t.parameter.device), form)
        if left := [name for name in copied if forms[name] is None]:
            self._note(
                f"reference_memory={self._memory} holds not even a sketch of {len(left)} of {len(tensors)} "
                "tensors: their drift is not measured",
                left,
            )
        if not any(k.mapped for k in self._kept.values()):
            self._file = None

    def _note(self, what: str, names: Sequence[str]) -> None:
        self._notes.append(f"{what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")

    def is_equal(self, name: str, parameter: Tensor) -> bool:
        """This frozen parameter is still exactly its reference, whatever form that is kept in.

        Not seen: values that are written past torch's counter of changes, through `data`.
        """
        return not parameter.requires_grad and self._equal.get(name) == _version(parameter)

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a copy of one more tensor, in the best form that is left."""
        form = usual_form(tensor)
        if self._memory is not None:
            form = plan({name: options(tensor)}, self._memory - self.nbytes)[name]
        if form is not None:
            self._keep(name, tensor, form)

    def _keep(self, name: str, tensor: Tensor, form: Form) -> None:
        flat = _flat(tensor)
        if form == "mapped":
            self._kept[name] = _Kept("full", flat, mapped=True)
        elif isinstance(form, int):
            counters, squares = _sketch(parts_of(tensor), name, form)
            self._kept[name] = _Kept(form, torch.from_numpy(counters), squares)
        elif form == "full":
            self._kept[name] = _Kept(form, flat.clone())
        else:
            rounded = torch.empty(flat.shape, dtype=torch.bfloat16, device=flat.device)
            residual = torch.zeros((), dtype=torch.float64, device=flat.device)
            squares = residual.clone()
            for place, block in zip(rounded.split(_BLOCK), flat.split(_BLOCK), strict=True):
                place.copy_(block)
                residual += (block.double() - place.double()).square().sum()
                squares += block.double().square().sum()
            self._kept[name] = _Kept(form, rounded, float(squares), float(residual))

    def describe(self) -> dict[str, dict[str, Any]]:
        """For run.json: tensor -> form, bytes, error, floor.

        In 95 of 100 cases the relative L2 distance x is off by at most error * x + floor: `error` is the
        sketch's, `floor` what the rounding of a bf16 copy can correlate with the way of the training.
        """
        described = {}
        for name, kept in self._kept.items():
            error = floor = 0.0
            if isinstance(kept.form, int):
                error = relative_error(kept.form)
            elif kept.residual is not None and kept.squares > 0:
                floor = 4 * math.sqrt(kept.residual / max(kept.values.numel(), 1) / kept.squares)
            form = f"sketch of {kept.form}" if isinstance(kept.form, int) else kept.form
            described[name] = {
                "form": "mapped" if kept.mapped else form,
                "bytes": 0 if kept.mapped else kept.values.nbytes,
                "error": error,
                "floor": floor,
            }
        return described

    def _get(self, name: str) -> _Kept | None:
        kept = self._kept.get(name)
        if kept is not None and kept.mapped and self._file is not None and not self._file.unchanged():
            self._kept = {n: k for n, k in self._kept.items() if not k.mapped}
            self._notes.append(
                f"the reference {self._file.path} was written to during the training: drift is not measured "
                "any more"
            )
            return None
        return kept

    def stored(self, name: str) -> tuple[Tensor | None, float | None]:
        """The reference as it is kept, flat, on the weight's device, and the residual of a bf16 copy.

        None of an unknown name and of a sketch.
        """
        kept = self._get(name)
        if kept is None or isinstance(kept.form, int):
            return None, None
        return kept.values, kept.residual

    def copies(self, name: str) -> tuple[Array | None, Array | None, float | None]:
        """For the kernels of the CPU: values (float32 or float64), or bf16 bits (int16) with the residual.

        All None of an unknown name and of a sketch.
        """
        values, residual = self.stored(name)
        if values is None:
            return None, None, None
        if values.dtype == torch.bfloat16:
            return None, values.cpu().view(torch.int16).numpy(), residual
        return parts_of(values), None, None

    def measure(self, name: str, weight: Tensor) -> Summary | None:
        """The drift row of a weight; None when there is no reference of its size.

        Of a sketch the dot product follows from the estimated distance and the exact norms; sign flips are
        unknown.
        """
        kept = self._get(name)
        if kept is not None and isinstance(kept.form, int):
            counters, squares = _sketch(parts_of(weight), name, kept.form)
            distance = float(np.square(counters.astype(np.float64) - kept.values.numpy()).sum())
            dot = (squares + kept.squares - distance) / 2
            return Summary(count=weight.numel(), sum_sq=distance, dot=dot, ref_sum_sq=kept.squares)
        now = parts_of(weight)
        values, bits, residual = self.copies(name)
        if values is not None and values.size == now.size:
            distance, dot, squares, flips = plain.distance(now, values)
        elif bits is not None and bits.size == now.size:
            distance, dot, squares, flips = plain.distance(now, bits)
        else:
            return None
        return Summary(
            count=weight.numel(), sum_sq=distance, dot=dot, ref_sum_sq=squares,
            sign_flips=flips, residual_sq=residual,
        )  # fmt: skip


def _same(reference: Tensor, weight: Tensor) -> bool:
    return reference.dtype == weight.dtype and torch.equal(reference.to(weight.device), weight.detach())


def _version(parameter: Tensor) -> tuple[int, int]:
    return parameter.data_ptr(), parameter._version


def _flat(tensor: Tensor) -> Tensor:
    """One dimension, row-major; complex elements as real and imaginary parts in turn."""
    dense = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    return (torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense).reshape(-1)


def _sketch(values: Array, name: str, counters: int) -> tuple[np.ndarray, float]:
    """The counters in the precision that is kept, so that an unmoved tensor has no distance; |values|^2."""
    found = np.zeros(counters)
    squares = add_sketch(values, name, found)
    return found.astype(np.float32), squares


def options(tensor: Tensor) -> list[tuple[int, Form]]:
    """The forms that pay for a tensor, cheapest first: bytes and form, each more exact than the last."""
    parts = tensor.numel() * (2 if tensor.is_complex() else 1)
    width = tensor.element_size() // (2 if tensor.is_complex() else 1)
    found: list[tuple[int, Form]] = [(width * parts, "full")]
    for bytes_, form in ((2 * parts, "bfloat16"), *((4 * m, m) for m in reversed(SKETCHES))):
        if bytes_ < found[0][0]:
            found.insert(0, (bytes_, form))
    return found


def usual_form(tensor: Tensor) -> Form:
    """Without a budget: full precision for small tensors, for double and for half precision."""
    forms = {form for _, form in options(tensor)}
    small = tensor.numel() <= EXACT_ELEMENTS or tensor.dtype in (torch.float64, torch.complex128)
    return "full" if small or "bfloat16" not in forms else "bfloat16"


def plan(choices: Mapping[str, Sequence[tuple[int, Form]]], memory: int) -> dict[str, Form | None]:
    """Which form each tensor takes so that all together fit into `memory` bytes.

    The cheapest for as many tensors as possible, small ones first; then, as long as the memory lasts, one
    better form after the other, again small tensors first. None: not even the cheapest fits.
    """
    chosen: dict[str, int | None] = dict.fromkeys(choices)
    for rank in range(max(map(len, choices.values()), default=0)):
        for name in sorted(choices, key=lambda n: choices[n][-1][0]):
            before = chosen[name]
            if rank >= len(choices[name]) or (before is None and rank > 0):
                continue
            price = choices[name][rank][0] - (0 if before is None else choices[name][before][0])
            if price <= memory:
                memory -= price
                chosen[name] = rank
    return {n: None if rank is None else choices[n][rank][1] for n, rank in chosen.items()}
