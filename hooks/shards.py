"""The part of a tensor that this process holds. Nothing here communicates with other processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_WHOLE = {Tensor, nn.Parameter}
#: Where a part begins in its tensor, and its shape.
Region = tuple[tuple[int, ...], tuple[int, ...]]


def is_sharded(tensor: Tensor) -> bool:
    """A DTensor (FSDP2, tensor parallel): this process holds a part of it, or one of several copies."""
    if type(tensor) in _WHOLE:  # nearly always, and quickly told
        return False
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local(tensor: Any) -> Any:
    """What is here of a tensor: a DTensor's part, anything else itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def summed(tensor: Tensor) -> bool:
    """Are its values here whole, or those of a region? Else they are still to be summed over ranks."""
    return not any(p.is_partial() for p in tensor.placements)  # type: ignore[attr-defined]


def value_of(tensor: Tensor) -> Tensor | None:
    """The tensor if it is, or every process holds, all of it; None of one that would have to be gathered."""
    if not is_sharded(tensor):
        return tensor
    whole = all(p.is_replicate() for p in tensor.placements)  # type: ignore[attr-defined]
    return local(tensor) if whole else None


def is_first_copy(tensor: Tensor) -> bool:
    """Is it this process, of those that hold the same part, that writes it?"""
    at = tensor.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    if at is None:
        return False
    return all(c == 0 for c, p in zip(at, tensor.placements, strict=True) if p.is_replicate())  # type: ignore[attr-defined]


def region_of(tensor: Tensor) -> Region | None:
    """Which part of a DTensor is here; None when it is not one rectangular block, as far as can be told.

    Parts are cut as `torch.chunk` cuts, one dimension of the mesh after the other. Those that torch calls
    strided (FSDP2 over tensor parallel) were cut last though they come first.
    """
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    at = mesh.get_coordinate()
    if at is None:
        return None
    offset, shape = [0] * tensor.ndim, list(tensor.shape)
    cuts = [i for i, p in enumerate(placements) if hasattr(p, "dim")]
    for i in sorted(cuts, key=lambda i: hasattr(placements[i], "split_factor")):
        dim = placements[i].dim % tensor.ndim
        chunk = math.ceil(shape[dim] / mesh.size(i))
        begin = min(at[i] * chunk, shape[dim])
        offset[dim] += begin
        shape[dim] = min(chunk, shape[dim] - begin)
    return (tuple(offset), tuple(shape)) if tuple(shape) == tuple(local(tensor).shape) else None


class Piece(NamedTuple):
    """A stretch of a tensor, row by row, that FSDP1 has given to this process."""

    shape: tuple[int, ...]  # of the whole tensor
    start: int
    numel: int
    first: bool  # no other process writes a copy of it


def pieces(models: Sequence[nn.Module]) -> dict[int, Piece]:
    """By id of the parameter: what `FullyShardedDataParallel` (FSDP1) has left here of each.

    It lays the parameters of a unit one after the other, cuts that evenly, and says what it did in attributes
    of its flat parameter. Without `use_orig_params` the unit itself is the parameter.
    """
    found: dict[int, Piece] = {}
    for module in (m for model in models for m in model.modules()):
        handle = getattr(module, "_handle", None)
        flat = getattr(handle, "flat_param", None)
        if handle is None or flat is None or not handle.uses_sharded_strategy:
            continue
        copies = getattr(module, "_inter_node_pg", None)
        first = copies is None or torch.distributed.get_rank(copies) == 0
        if flat._params is None:
            numel = flat._sharded_size.numel()
            found[id(flat)] = Piece((numel * handle.world_size,), handle.rank * numel, numel, first)
            continue
        for parameter, info, shape in zip(flat._params, flat._shard_param_infos, flat._shapes, strict=True):
            start = info.intra_param_start_idx or 0
            found[id(parameter)] = Piece(tuple(shape), start, info.numel_in_shard or 0, first)
    return found
