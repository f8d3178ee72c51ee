"""Run by torchrun on two ranks: a Trainer, then an Accelerate loop, both under watch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))

import torch
from accelerate import Accelerator
from test_transformers import language_model, trainer
from trainings import batch, loss_of, mlp

from layerwatch.hooks.accelerate import LayerwatchTracker
from layerwatch.hooks.transformers import LayerwatchCallback


def by_accelerate(path: Path, steps: int) -> None:
    tracker = LayerwatchTracker(path / "accelerate", every=1)
    accelerator = Accelerator(cpu=True, log_with=tracker)
    plain = mlp()
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), 0.1))
    accelerator.init_trackers("ranks", config={"ranks": accelerator.num_processes})
    tracker.watch(model, optimizer)
    for step in range(steps):
        loss = loss_of(model(batch(2 * step + accelerator.process_index)))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log({"loss": loss.item()})
    accelerator.end_training()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    trainer(language_model(), folder, LayerwatchCallback(folder / "trainer", every=1)).train()
    by_accelerate(folder, 3)
