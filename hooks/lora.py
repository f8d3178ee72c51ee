"""What PEFT's LoRA does to the weights that it sits on: how far W + P is from its reference, P = scale * B A.

P is never formed. With P = left right, left (n, r) and right (r, m), and a reference R of the weight:

    |W + P - R|^2 = |W - R|^2 + 2 <W, P> - 2 <R, P> + |P|^2      <W, P> = sum of left * (W right^T)

and |P|^2 and the singular values of P follow from the Grams left^T left and right right^T, (r, r). Where an
adapter was at work from the start, with a product P0 that is not zero, the reference is R + P0. What has to
do with the frozen W and R alone is computed once. Nothing waits for an accelerator: a few numbers of each
weight come back, in one copy for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..monitor.summary import Summary
from .device import CHUNK, fetch
from .reference import Reference
from .shards import is_sharded
from .tensors import WatchedTensor

#: Values of this kind: |P - P0|_F^2 / |P - P0|_2^2, one number for each adapted weight.
STABLE_RANK = "adapter_stable_rank"


#: What PEFT's LoRA calls its factors: of linear layers and convolutions, and of embeddings.
_LORA = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


class _NotCoveredError(ValueError):
    """An adapter whose change is no product of two factors; says what it is."""


class Factors(NamedTuple):
    """Of P = left @ right, scale included: left (n, r), right (r, m), as the weight is stored."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Change:
    """What was computed of one adapted weight, on its device.

    Attributes:
        packed: |W - R|^2, <W, R>, |R|^2; for each of the `rank` columns of left its share of <W, left right>,
            and the same of R; the Grams of left and right. rank_now: those columns that are P's; P0's follow.
        residual: of a bfloat16 copy of R.
    """

    elements: int
    packed: Tensor
    rank: int
    rank_now: int
    residual: float | None


class Adapters:
    """The adapted weights of these models; which adapters are at work is asked at each capture."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._models = models
        self._layers: dict[int, Any] = {}  # id of a weight -> PEFT's layer around it
        self._twice: set[int] = set()
        self._start: dict[str, Factors] = {}  # what was at work when the reference was taken, if anything
        self._still: dict[str, tuple[Any, Tensor]] = {}
        self._told: set[str] = set()
        self._notes: list[str] = []

    def find(self) -> None:
        """Look for them; to be called again when modules came or went."""
        self._layers, self._twice = {}, set()
        for module in dict.fromkeys(m for model in self._models for m in model.modules()):
            if not (hasattr(module, "adapter_layer_names") and hasattr(module, "get_base_layer")):
                continue
            layer: Any = module
            base = layer.get_base_layer()
            name = getattr(layer, "parameter_name", "weight")
            if isinstance(base, nn.MultiheadAttention):
                # PEFT adds what it learns of out_proj twice, running and merging (as of 0.21).
                name, self._twice = "in_proj_weight", self._twice | {id(base.out_proj)}
            weight = getattr(base, name, None)
            if isinstance(weight, Tensor):
                self._layers[id(weight)] = layer

    def names(self, tensors: Sequence[WatchedTensor]) -> list[str]:
        """Which of these are adapted."""
        return [t.name for t in tensors if id(t.parameter) in self._layers]

    def begin(self, tensors: Sequence[WatchedTensor]) -> None:
        """The weights as they are now, adapters included, are what drift is measured from."""
        for tensor in tensors:
            try:
                factors = self._at_work(tensor)
            except _NotCoveredError:
                continue
            if factors is not None and bool(factors.left.any()) and bool(factors.right.any()):
                self._start[tensor.name] = Factors(factors.left.clone(), factors.right.clone())

    def notes(self) -> list[str]:
        """What is worth telling the user and was not told yet."""
        notes, self._notes = self._notes, []
        return notes

    def changes(self, tensors: Sequence[WatchedTensor], reference: Reference) -> dict[str, Change | None]:
        """Of each weight that adapters move away from what is stored; None: how far cannot be told."""
        found: dict[str, Change | None] = {}
        missing: dict[str, list[str]] = {}
        for tensor in tensors:
            if tensor.name not in reference or (
                id(tensor.parameter) not in self._layers and tensor.name not in self._start
            ):
                continue
            try:
                now, start = self._at_work(tensor), self._start.get(tensor.name)
                if factors := _together([part for part in (now, start) if part is not None]):
                    rank_now = now.left.shape[1] if now is not None else 0
                    found[tensor.name] = self._change(tensor, factors, rank_now, reference)
            except _NotCoveredError as error:
                found[tensor.name] = None
                missing.setdefault(str(error), []).append(tensor.name)
        for why, names in missing.items():
            if why not in self._told:
                self._told.add(why)
                some = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
                self._notes.append(f"drift of {len(names)} adapted weights is not measured, {why}: {some}")
        return found

    def _at_work(self, tensor: WatchedTensor) -> Factors | None:
        """What is added to the weight now; None: nothing, or it is merged into the weight."""
        layer = self._layers.get(id(tensor.parameter))
        if layer is None:
            return None
        if layer.merged:
            self._still.pop(tensor.name, None)
            return None
        if layer.disable_adapters:
            return None
        if tensor.piece is not None or is_sharded(tensor.parameter):
            raise _NotCoveredError("as it is sharded")
        if not tensor.parameter.is_floating_point():
            raise _NotCoveredError(f"as the base is quantised ({tensor.parameter.dtype})")
        factors = _together(list(_active(layer)))
        if factors is None or id(layer) not in self._twice:
            return factors
        return Factors(2 * factors.left, factors.right)

    def _change(self, tensor: WatchedTensor, factors: Factors, rank_now: int, reference: Reference) -> Change:
        weight = tensor.weight.detach()
        matrix = weight.reshape(weight.shape[0], -1)
        if (factors.left.shape[0], factors.right.shape[1]) != matrix.shape:
            raise _NotCoveredError("as its factors have other sizes")
        unmoved = reference.is_equal(tensor.name, tensor.parameter)
        stored, residual = (None, None) if unmoved else reference.stored(tensor.name)
        if not unmoved and (stored is None or stored.numel() != weight.numel()):
            raise _NotCoveredError("as of the reference there is only a sketch")
        other = None if stored is None else stored.view_as(matrix)
        place = torch.device("cpu") if weight.device.type == "mps" else weight.device  # mps has no float64
        left, right = (f.to(place, torch.float64) for f in factors)
        # The difference of both is wanted, which may be much smaller than they are: then in double precision.
        precise = other is not None or weight.dtype == torch.float64
        own = _dots(matrix, left, right, torch.float64 if precise else torch.float32)
        there = own if other is None else _dots(other, left, right, torch.float64)
        grams = [(left.T @ left).reshape(-1), (right @ right.T).reshape(-1)]
        packed = torch.cat([self._of_weight(tensor, matrix, other), own, there, *grams])
        return Change(weight.numel(), packed, left.shape[1], rank_now, residual)

    def _of_weight(self, tensor: WatchedTensor, matrix: Tensor, other: Tensor | None) -> Tensor:
        """|W - R|^2, <W, R>, |R|^2; kept while the weight stays as it is. other None: R is W."""
        parameter = tensor.parameter
        key = (parameter.data_ptr(), parameter._version, other is None)
        known = self._still.get(tensor.name)
        if known is not None and known[0] == key and not parameter.requires_grad:
            return known[1]
        flat, there = matrix.reshape(-1), (matrix if other is None else other).reshape(-1)
        place = torch.device("cpu") if flat.device.type == "mps" else flat.device
        sums = torch.zeros(3, dtype=torch.float64, device=place)
        for w, r in zip(flat.split(CHUNK), there.split(CHUNK), strict=True):
            w, r = w.to(place, torch.float64), r.to(place, torch.float64)
            sums += torch.stack([(w - r).square().sum(), (w * r).sum(), r.square().sum()])
        self._still[tensor.name] = (key, sums)
        return sums


def _active(layer: Any) -> Iterator[Factors]:
    """The factors of each active adapter of one of PEFT's layers."""
    for name in layer.active_adapters:
        if not any(name in getattr(layer, part, ()) for part in layer.adapter_layer_names):
            continue
        if layer.adapter_layer_names[:4] != _LORA:
            raise _NotCoveredError(f"as {type(layer).__module__.split('.')[-2]} is not LoRA")
        variant = getattr(layer, "lora_variant", {}).get(name)
        if variant is not None or getattr(layer, "use_dora", {}).get(name):
            kind = type(variant).__name__ if variant is not None else "DoRA"
            raise _NotCoveredError(f"as it is not plain LoRA ({kind})")
        if getattr(layer.get_base_layer(), "groups", 1) > 1 or getattr(layer, "num_experts", 1) > 1:
            raise _NotCoveredError("as it has groups or experts")
        embedding = name in layer.lora_embedding_A
        a = layer.lora_embedding_A[name] if embedding else layer.lora_A[name].weight
        b = layer.lora_embedding_B[name] if embedding else layer.lora_B[name].weight
        if is_sharded(a) or is_sharded(b):
            raise _NotCoveredError("as it is sharded")
        a, b = a.detach().flatten(1), b.detach().flatten(1) * layer.scaling[name]
        yield Factors(a.T, b.T) if embedding or getattr(layer, "fan_in_fan_out", False) else Factors(b, a)


def _together(parts: Sequence[Factors]) -> Factors | None:
    """The sum of products as one."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return Factors(torch.cat([p.left for p in parts], 1), torch.cat([p.right for p in parts], 0))


def _dots(matrix: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """(r,): each column's share of <matrix, left right>, a block of rows at a time, each made a `dtype`."""
    across = right.T.to(dtype)
    total = torch.zeros(left.shape[1], dtype=torch.float64, device=left.device)
    step = max(1, CHUNK // max(matrix.shape[1], 1))
    for rows, part in zip(matrix.split(step), left.split(step), strict=True):
        total += (part * (rows.to(left.device, dtype) @ across)).sum(0)
    return total


@dataclass
class AdaptedRows:
    """The drift rows of the adapted weights of one capture, which may still be on a device."""

    _added: list[tuple[Change, dict[str, Any]]] = field(default_factory=list)
    _sent: list[tuple[list[tuple[Change, dict[str, Any]]], Tensor, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self._added or self._sent)

    def add(self, change: Change, row: Mapping[str, Any]) -> None:
        """`row`: what else the row holds."""
        self._added.append((change, dict(row)))

    def send(self) -> None:
        """Start one copy per device."""
        devices: dict[torch.device, list[tuple[Change, dict[str, Any]]]] = {}
        for change, row in self._added:
            devices.setdefault(change.packed.device, []).append((change, row))
        for device, added in devices.items():
            packed = torch.cat([change.packed for change, _ in added])
            self._sent.append((added, *fetch(packed, device)))
        self._added = []

    def ready(self) -> bool:
        """Whether all has arrived; does not wait."""
        return all(event is None or event.query() for _, _, event in self._sent)

    def results(self) -> Iterator[tuple[dict[str, Any], Summary, float]]:
        """Row, summary and stable rank (NaN of no change) of each; waits if need be."""
        sent, self._sent = self._sent, []
        for added, host, event in sent:
            if event is not None:
                event.synchronize()
            at = 0
            for change, row in added:
                end = at + len(change.packed)
                yield row, *_told(change, host[at:end].numpy())
                at = end


def _told(change: Change, numbers: np.ndarray) -> tuple[Summary, float]:
    n, now = change.rank, np.arange(change.rank) < change.rank_now
    far, both, squares = numbers[:3].tolist()
    own, there = numbers[3 : 3 + n], numbers[3 + n : 3 + 2 * n]
    left, right = numbers[3 + 2 * n :].reshape(2, n, n)
    sign = np.where(now, 1.0, -1.0)  # P - P0
    inner = left * right  # <column i, column j> of the products
    moved = float(sign @ inner @ sign)
    summary = Summary(
        count=change.elements,
        sum_sq=max(far + 2 * float((own - there) @ sign) + moved, 0.0),
        dot=both + float(own[~now].sum() + there[now].sum() + inner[now][:, ~now].sum()),
        ref_sum_sq=squares + float(2 * there[~now].sum() + inner[~now][:, ~now].sum()),
        residual_sq=change.residual,
    )
    return summary, _stable_rank(left * np.outer(sign, sign), right)


def _stable_rank(left: np.ndarray, right: np.ndarray) -> float:
    """Of the product with these Grams: with left^T left = C C^T its squared singular values are the
    eigenvalues of C^T (right right^T) C."""
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return math.nan
    values, vectors = np.linalg.eigh(left)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    squares = np.linalg.eigvalsh(root.T @ right @ root)
    return float(squares.sum() / squares[-1]) if squares[-1] > 0 else math.nan
