"""What is computed where the tensors are: asynchronous torch operations, of which none asks for a number.

All take stacks (k, n): k tensors of n elements, treated as one, as a GPU pays for every operation that it is
told, however small. What comes back is derived on the host, in `device`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Fields = dict[str, Tensor]


@dataclass(frozen=True)
class Bits:
    """How a float's leading bits (sign, exponent, two of mantissa) become a bucket number.

    shift: leaves them. half: how many there are of each sign. From `first` on, up to `last`, they have a
    bucket, their number less `bias`; below are zeros and what counts as subnormal, at `last` infinity, then
    NaN.
    """

    integer: torch.dtype
    shift: int
    half: int
    first: int
    last: int
    bias: int


BITS = {
    torch.float32: Bits(torch.int32, 21, 1024, 4, 1020, 0),
    torch.float64: Bits(torch.int64, 50, 8192, 4 * (1023 - 126), 4 * 2047, 4 * (1023 - 127)),
}


def flat_of(tensor: Tensor, *, parts: bool) -> Tensor:
    """All elements in order, without a copy where the layout allows; `parts`: complex ones as two."""
    data = tensor.detach()
    if data.is_sparse and data.is_coalesced():
        data = data.values()
    elif data.layout is not torch.strided:
        data = data.to_dense()  # coalescing would ask the device how many elements there are
    if parts and data.is_complex():
        data = torch.view_as_real(data.resolve_conj())
    return data.reshape(-1)


def stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a dtype is summarised in: see `statistics.array_of`."""
    exact = (torch.float64, torch.complex128, torch.int32, torch.int64)
    return torch.float64 if dtype in exact else torch.float32


def _widen(x: Tensor) -> Tensor:
    return (x.abs() if x.is_complex() else x).to(wide(x.dtype))


def any_nonzero(x: Tensor) -> Tensor:
    """Whether there is a nonzero element along the last dimension; float8 has no such operation."""
    small = x.is_floating_point() and x.element_size() == 1
    return torch.any(x.float() if small else x, dim=-1)


def _summary(parts: list[Tensor], _: bool) -> Fields:
    # A NaN has many patterns of bits, of which some look like infinity among the first: make them one.
    x = torch.nan_to_num(_widen(parts[0]), nan=math.nan, posinf=math.inf, neginf=-math.inf)
    return _distribution(x)


def _distribution(x: Tensor) -> Fields:
    """Of each row of x (k, n), which is overwritten: histogram, moments, range and nonzero elements."""
    fields = {"histogram": _histogram(x), "nonzero": _nonzeros(x)}
    fields["min"] = x.nan_to_num_(math.inf, math.inf, math.inf).amin(-1)
    fields["max"] = x.nan_to_num_(posinf=-math.inf, neginf=-math.inf).amax(-1)
    double = x.nan_to_num_(neginf=0.0).double()
    fields["sum"], fields["norm"] = double.sum(-1), torch.linalg.vector_norm(double, dim=-1)
    return fields


def _histogram(x: Tensor) -> Tensor:
    """float32 (k, 2 * half): how often each pattern of leading bits occurs, as signed integers from -half."""
    bits = BITS[x.dtype]
    rows, each = x.shape[0], 2 * bits.half
    keys = x.view(bits.integer) >> bits.shift
    counters = each * (1 << (rows - 1).bit_length())  # a power of two: no bin is missed by rounding
    if rows > 1:
        moved = keys + torch.arange(0, rows * each, each, dtype=torch.float32, device=x.device).unsqueeze(1)
    else:
        moved = keys.float()
    del keys
    low, high = -bits.half, counters - bits.half
    if torch.are_deterministic_algorithms_enabled():  # histc refuses then, though its counts are exact
        edges = torch.arange(low, high + 1, dtype=torch.float32, device=x.device)
        counts = torch.searchsorted(moved.reshape(-1).sort().values, edges).diff().float()
    else:
        counts = torch.histc(moved, counters, low, high)
    return counts.view(-1, each).narrow(0, 0, rows)


def _nonzeros(x: Tensor) -> Tensor:
    """Of each row, in the dtype of x: exact up to 2^24. One operation; comparing and adding are three."""
    return torch.linalg.vector_norm(x, 0, dim=-1)


def _update(parts: list[Tensor], modulus: bool) -> Fields:
    before, after = _widen(parts[0]), _widen(parts[1])
    fields = {}
    if len(parts) == 3:
        used = torch.where(after == before, _widen(parts[2]).to(after.dtype), 0.0)
        fields["lost"] = _nonzeros(used)
        del used
    change = after - before
    del after
    double = before.double()
    fields["ref_norm"] = torch.linalg.vector_norm(double, dim=-1)
    fields["dot"] = (double * change).sum(-1)
    del double, before
    x = torch.view_as_complex(change.unflatten(-1, (-1, 2))).abs() if modulus else change
    return fields | _distribution(x.nan_to_num_(math.nan, math.inf, -math.inf))


def _drift(parts: list[Tensor], _: bool) -> Fields:
    now, reference = _widen(parts[0]).double(), _widen(parts[1]).double()
    fields = {"norm": torch.linalg.vector_norm(now - reference, dim=-1)}
    fields["ref_norm"] = torch.linalg.vector_norm(reference, dim=-1)
    product = now * reference
    fields["dot"] = product.sum(-1)
    fields["sign_flips"] = (product < 0).sum(-1)
    return fields


FIELDS = {"summary": _summary, "update": _update, "drift": _drift}
