"""Real runs, trained in a few seconds. `python tiny.py FOLDER` trains one slowly, to be watched."""

from __future__ import annotations

import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from layerwatch.hooks import watch

VALIDATE_EVERY = 10


def mlp(activation: type[nn.Module], depth: int, width: int = 16) -> nn.Sequential:
    """A classifier from 12 features to 4 classes."""
    sizes = [12, *[width] * (depth - 1)]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 4))


def batch(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Points whose class is the largest of four fixed linear scores."""
    scores = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    x = torch.randn(size, 12, generator=generator)
    return x, (x @ scores).argmax(1)


def train(
    folder: Path, net: nn.Module, lr: float, steps: int, *, validate: bool = True, pause: float = 0.0
) -> Path:
    """Train with SGD under `watch`, every step captured."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    held = batch(128, generator)
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr)
    watcher = watch(
        net, optimizer, run=folder, every=1, config={"lr": lr, "depth": len(list(net.children()))}
    )
    for step in range(steps):
        x, y = batch(32, generator)
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        watcher.log(train_loss=loss)
        if validate and step % VALIDATE_EVERY == VALIDATE_EVERY - 1:
            with torch.no_grad():
                watcher.log(val_loss=nn.functional.cross_entropy(net(held[0]), held[1]))
        time.sleep(pause)
    watcher.close()
    return folder


def write_runs(root: Path) -> Path:
    """healthy, vanishing, nested/blow-up (NaN) and finetune (first layer frozen, no validation)."""
    torch.manual_seed(0)
    train(root / "healthy", mlp(nn.ReLU, 3), 0.1, 60)
    train(root / "vanishing", mlp(nn.Sigmoid, 10), 0.05, 60)
    train(root / "nested" / "blow-up", mlp(nn.ReLU, 5), 1e6, 40)
    frozen = mlp(nn.ReLU, 4)
    for parameter in frozen[0].parameters():
        parameter.requires_grad_(False)
    train(root / "finetune", frozen, 0.1, 40, validate=False)
    return root


if __name__ == "__main__":
    torch.manual_seed(0)
    train(Path(sys.argv[1]), mlp(nn.ReLU, 3), 0.1, 100_000, pause=0.05)
