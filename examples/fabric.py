"""A loop with Lightning Fabric: `watch` takes what `fabric.setup` returned: python examples/fabric.py"""

from __future__ import annotations

import torch
from lightning.fabric import Fabric
from torch import nn

from layerwatch import Run, watch

fabric = Fabric(accelerator="cpu")
fabric.seed_everything(0, verbose=False)
model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.02))

with watch(model, optimizer, run="runs/fabric", every=10) as watcher:
    for _ in range(200):
        x = torch.rand(64, 1) * 6 - 3
        loss = nn.functional.mse_loss(model(x), x.sin())
        optimizer.zero_grad()
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        watcher.log(train_loss=loss)

run = Run("runs/fabric")
losses = run.scalars("train_loss")["value"]
print(f"{run.last_step + 1} steps, loss {losses[:10].mean():.3f} to {losses[-10:].mean():.3f}")
print(run.stats("gradient").groupby("tensor", sort=False)["norm"].last().to_frame("last norm").to_string())
