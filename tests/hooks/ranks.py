"""Trainings of several processes, one after the other, as a script makes them: see `launch`.

Every rank trains on the same batch, so that averaging over ranks gives exactly the gradient of one process:
the log of a sharded training must then equal that of a plain one, bucket by bucket.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from layerwatch import watch


class Net(nn.Module):
    """Odd sizes, so that parts are uneven and some are empty."""

    def __init__(self, hidden: int = 13) -> None:
        super().__init__()
        self.inp = nn.Linear(7, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.inp(x))))


PLAN = {"inp": ColwiseParallel(), "out": RowwiseParallel()}


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 7, generator=generator)
    return x, x[:, :3].argmax(1)


def prepared(kind: str, model: Net, size: int) -> nn.Module:
    if size == 1:
        return model
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (size,))
        fully_shard(model.inp, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif kind == "fsdp+checkpoint":
        model.inp = checkpoint_wrapper(model.inp)  # type: ignore[assignment]
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    elif kind == "fsdp+compile":
        return torch.compile(fully_shard(model, mesh=init_device_mesh("cpu", (size,))), backend="aot_eager")  # type: ignore[return-value]
    elif kind == "fsdp1":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    elif kind == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copy", "shard")))
    elif kind == "tensor":
        parallelize_module(model, init_device_mesh("cpu", (size,)), PLAN)  # type: ignore[arg-type]
    elif kind == "manual":  # averaged by hand, no wrapper
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: _average(p, size))
    elif kind == "fsdp+tensor":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], PLAN)  # type: ignore[arg-type]
        fully_shard(model, mesh=mesh["data"])
    return model


def _average(parameter: Tensor, size: int) -> None:
    distributed.all_reduce(parameter.grad)
    parameter.grad /= size  # type: ignore[operator]


class Stage(nn.Module):
    """One of two stages of a pipeline, with the names that it has in the whole network."""

    def __init__(self, net: Net, rank: int) -> None:
        super().__init__()
        if rank == 0:
            self.inp, self.norm = net.inp, net.norm
        else:
            self.out = net.out


def pipeline(run: str, steps: int, **options: Any) -> None:
    """Two ranks, a stage each: outputs go forth, gradients come back."""
    rank = distributed.get_rank()
    stage = Stage(Net(), rank)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=0.01)
    with watch(stage, optimizer, run=run, **{"every": 2, **options}) as watcher:
        for step in range(steps):
            x, y = batch(step)
            between = torch.zeros(16, 13)
            if rank == 0:
                sent = torch.relu(stage.norm(stage.inp(x)))
                distributed.send(sent.detach(), 1)
                distributed.recv(between, 1)
                sent.backward(between)
            else:
                distributed.recv(between, 0)
                loss = nn.functional.cross_entropy(stage.out(between.requires_grad_()), y)
                loss.backward()
                distributed.send(between.grad, 0)  # type: ignore[arg-type]
                watcher.log(train_loss=loss)
            optimizer.step()
            optimizer.zero_grad()


def train(
    kind: str, run: str | None, steps: int, *, clip: float | None = None, late: bool = False,
    own: bool = False, at: dict[str, list[int]] | None = None, **options: Any,
) -> None:  # fmt: skip
    """One training.

    Args:
        kind: see `prepared`. clip: the largest norm of the gradients. late: the optimizer is not told.
        own: each rank has every n-th sample of the batch. at: what happens -> on which rank, at which step:
            "die", "part" (it changes a weight of its own), "broken" (its loss is infinite).
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    net = Net(12 if "tensor" in kind else 13)
    if "tensor" in kind:
        net.norm = nn.Identity()  # type: ignore[assignment]
    model = prepared(kind, net, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watched = options.pop("watched", True)
    given = None if late else optimizer
    watcher = watch(model, given, run=run, **{"every": 2, **options}) if watched else None
    for step in range(watcher.step if watcher and options.get("resume") else 0, steps):
        now = [what for what, place in (at or {}).items() if place == [rank, step]]
        x, y = (whole[rank::size] if own else whole for whole in batch(step))
        loss = nn.functional.cross_entropy(model(x), y) * torch.tensor(math.inf if "broken" in now else 1.0)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if "die" in now:
            os._exit(9)
        if "part" in now:
            with torch.no_grad():
                net.out.bias[1] += 1e-3
        optimizer.step()
        optimizer.zero_grad()
        if watcher:
            watcher.log(train_loss=loss)
    if watcher:
        watcher.close()


class Sent(TorchDispatchMode):
    """Counts the collectives that are called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # look at what becomes of it
            return NotImplemented
        if "c10d" in func.namespace:
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def counted(job: dict[str, Any]) -> None:
    """One training; how often which collective was called goes into `sent.json` below its folder."""
    folder = Path(job["run"]).parent
    with Sent() as sent:
        train(**job)
    if distributed.get_rank() == 0:
        with (folder / "sent.json").open("a") as file:
            file.write(json.dumps(sent.calls, sort_keys=True) + "\n")


def launch(ranks: int, *jobs: dict[str, Any], check: bool = True) -> Any:
    """Run these trainings (the arguments of `train`) on so many ranks, by torchrun; one: without it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), __file__, json.dumps(jobs, default=str)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, env=env, check=check, timeout=150, capture_output=not check, text=True)


def main() -> None:
    several = "WORLD_SIZE" in os.environ
    if several:
        distributed.init_process_group("gloo")
    for job in json.loads(sys.argv[1]):
        torch.manual_seed(0)
        if job.pop("counted", False):
            counted(job)
        else:
            (pipeline if job.pop("pipeline", False) else train)(**job)
    if several:
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
