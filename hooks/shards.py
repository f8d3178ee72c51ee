"""The part of a tensor that this process holds. Nothing here communicates with other processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: Where a part begins in its tensor, and its shape.
Region = tuple[tuple[int, ...], tuple[int, ...]]


def is_sharded(tensor: Tensor) -> bool:
    """A DTensor (FSDP2, tensor parallel): this process holds a part of it, or one of several copies."""
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
