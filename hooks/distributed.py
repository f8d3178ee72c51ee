"""Trainings of several processes: which rank this is, which run they share, and what of it this rank writes.

No process ever waits for, or sends to, another one on our account: a monitor that communicates can hang a
job. Where ranks must agree they compute the same thing, or look at what is in the run folder already.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..monitor.process import started
from ..monitor.ranks import descriptions, rank_of, writer_of
from ..monitor.store import Store
from .shards import is_first_copy, is_sharded, local, region_of
from .tensors import WatchedTensor

#: Launchers that give a job a name of its own: torchrun (which says "none" unless told), SLURM.
_JOBS = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")
#: Replicas are compared at every 100th step, whatever is captured: every rank must take the same ones.
CHECK_EVERY = 100
#: Checksums are kept below this, so that a double holds them exactly.
MODULUS = 1 << 52

_unnamed = 0


class World(NamedTuple):
    """This process among those that train together."""

    rank: int
    size: int

    @property
    def several(self) -> bool:
        """There are others."""
        return self.size > 1

    @property
    def writer(self) -> str:
        """The name of its files."""
        return writer_of(self.rank)


def world() -> World:
    """As torch.distributed tells, or before it is initialised the environment that launchers set."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return World(torch.distributed.get_rank(), torch.distributed.get_world_size())
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if rank.isdigit() and size.isdigit() and int(rank) < int(size):
        return World(int(rank), int(size))
    return World(0, 1)


def job() -> str:
    """The same on all ranks that were launched together, and different the next time."""
    names = [value for name in _JOBS if (value := os.environ.get(name)) and value != "none"]
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if names:
        return f"{names[0]}/{again}"
    place = f"{os.environ.get('MASTER_ADDR') or socket.gethostname()}/{os.environ.get('MASTER_PORT', '')}"
    if "TORCHELASTIC_RUN_ID" not in os.environ and {"lightning", "pytorch_lightning"} & set(sys.modules):
        return place  # there the first rank starts the others, at a port that was free
    parent = os.getppid()
    return f"{place}/{parent}/{started(parent)}/{again}"


def unnamed_run() -> Path:
    """A folder for a run that got no name: the n-th of this job is the same for all ranks."""
    global _unnamed
    _unnamed += 1
    name = f"job-{hashlib.sha256(job().encode()).hexdigest()[:8]}"
    return Path("runs") / (name if _unnamed == 1 else f"{name}-{_unnamed}")


def joined(folder: Path, here: World) -> tuple[int, int | None]:
    """The session that begins when several ranks go on, and its first step if the first rank has begun it.

    Ranks begin in any order. The first one alone counts sessions; others follow it, or are ahead of it.
    """
    told = descriptions(Store(folder))
    first, own = (int(told.get(w, {}).get("session", -1)) for w in (writer_of(0), here.writer))
    info = told.get(writer_of(0), {})
    if here.rank and info.get("job") == job() and not info.get("closed") and first > own:
        return first, int(info["starts"][-1]["first_step"])
    return max(first, own) + 1, None


class Share:
    """What of the watched tensors this rank writes.

    Of a DTensor its own part, unless another rank has the same one. Of any other tensor the whole, unless a
    lower rank of this job, as far as the run folder tells by now, has one of that name: it is a replica.

    Args:
        folder: of the run. here: this process.
    """

    def __init__(self, folder: Path, here: World) -> None:
        self._folder, self.world = folder, here

    def decide(self, tensors: Sequence[WatchedTensor]) -> dict[str, Any]:
        """Mark the tensors that are this rank's to write; returns its parts, for its description."""
        shards = {}
        elsewhere = self._of_lower_ranks() if self.world.rank else {}
        for tensor in tensors:
            parameter, piece = tensor.parameter, tensor.piece
            if piece is not None:
                tensor.mine = piece.first and piece.numel > 0
                if tensor.mine:
                    shards[tensor.name] = [[piece.start], [piece.numel]]
            elif is_sharded(parameter):
                tensor.mine = is_first_copy(parameter)
                region = region_of(parameter) if tensor.mine else None
                if tensor.mine:
                    nowhere = ([0] * parameter.ndim, [0] * parameter.ndim)  # its sums still add
                    shards[tensor.name] = [list(part) for part in region or nowhere]
            else:
                tensor.mine = elsewhere.get(tensor.name) != list(tensor.shape)
        return shards

    def _of_lower_ranks(self) -> dict[str, list[int]]:
        """Name and shape of the tensors that lower ranks hold as a whole."""
        found: dict[str, list[int]] = {}
        ours = job()
        for writer, info in descriptions(Store(self._folder)).items():
            if rank_of(writer) < self.world.rank and info.get("job") == ours and not info.get("closed"):
                shards = info.get("shards", {}).get(str(info.get("session")), {})
                found |= {
                    t["tensor"]: t["shape"] for t in info.get("tensors", []) if t["tensor"] not in shards
                }
        return found

    def modules_elsewhere(self) -> set[str]:
        """The modules whose outputs lower ranks see: theirs are logged, of their part of the batch."""
        ours, found = job(), set()
        for writer, info in descriptions(Store(self._folder)).items():
            if rank_of(writer) < self.world.rank and info.get("job") == ours:
                found |= {m["module"] for m in info.get("modules", [])}
        return found


def checksums(tensors: Sequence[WatchedTensor]) -> list[tuple[str, list[float]]]:
    """The sum of the bits of every tensor that other ranks may hold as well, as integers modulo 2^52.

    A single differing bit changes it. One copy from an accelerator for all of them. Behind the sum, of a part
    of a tensor: where it begins.
    """
    names, places, sums = [], [], []
    for tensor in tensors:
        parameter = tensor.parameter
        if tensor.piece is not None:
            continue
        if is_sharded(parameter) and not any(p.is_replicate() for p in parameter.placements):  # type: ignore[attr-defined]
            continue
        values = local(parameter).detach()
        if values.layout is not torch.strided or not values.numel() or values.is_meta:
            continue
        region = region_of(parameter) if is_sharded(parameter) else None
        names.append(tensor.name)
        places.append(region[0] if region else ())
        sums.append(_bits(values).sum(dtype=torch.int64))
    if not sums:
        return []
    found = zip(names, torch.stack(sums).tolist(), places, strict=True)
    return [(name, [float(value % MODULUS), *map(float, place)]) for name, value, place in found]


def _bits(values: torch.Tensor) -> torch.Tensor:
    flat = torch.view_as_real(values) if values.is_complex() else values
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return flat.view(whole)
