"""Trainings of several processes, as scripts see them: `python ranks.py KIND FOLDER STEPS [NAME=VALUE ...]`.

Every rank trains on the same batch, so that averaging over ranks gives exactly the gradient of one process:
the log of a sharded training must then equal that of a plain one, bucket by bucket.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

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
    elif kind == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copy", "shard")))
    elif kind == "tensor":
        parallelize_module(model, init_device_mesh("cpu", (size,)), PLAN)  # type: ignore[arg-type]
    elif kind == "fsdp+tensor":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], PLAN)  # type: ignore[arg-type]
        fully_shard(model, mesh=mesh["data"])
    return model


def train(kind: str, folder: str, steps: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        distributed.init_process_group("gloo")
    net = Net(12 if "tensor" in kind else 13)
    if "tensor" in kind:
        net.norm = nn.Identity()  # type: ignore[assignment]
    model = prepared(kind, net, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    clip, die = options.pop("clip", None), options.pop("die", None)
    given = None if options.pop("late", False) else optimizer
    watcher = watch(model, given, run=folder, **{"every": 2, **options})
    for step in range(steps):
        x, y = batch(step)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if die == [rank, step]:
            os._exit(9)
        optimizer.step()
        optimizer.zero_grad()
        watcher.log(train_loss=loss)
    watcher.close()
    if size > 1:
        distributed.barrier()
        distributed.destroy_process_group()


def launch(kind: str, folder: Path, steps: int, ranks: int, *, check: bool = True, **options: Any) -> Any:
    """Run this file on so many ranks, by torchrun; one: without it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), __file__, kind, str(folder), str(steps)]
    root = Path(__file__).parents[2]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command += [f"{name}={value!r}" for name, value in options.items()]
    return subprocess.run(command, env=env, check=check, timeout=150, capture_output=not check, text=True)


if __name__ == "__main__":
    import ast

    kind, folder, steps, *more = sys.argv[1:]
    train(kind, folder, int(steps), {n: ast.literal_eval(v) for n, _, v in (m.partition("=") for m in more)})
