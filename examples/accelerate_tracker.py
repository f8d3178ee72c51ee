"""An Accelerate loop under watch, with gradient accumulation: python examples/accelerate_tracker.py

It learns to tell points inside a ring from points outside. The log goes to runs/accelerate.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from layerwatch import Run
from layerwatch.hooks.accelerate import LayerwatchTracker

torch.manual_seed(0)
points = torch.randn(2048, 2)
inside = (points.norm(dim=1) < 1.0).long()
loader = DataLoader(TensorDataset(points, inside), batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

tracker = LayerwatchTracker(run="runs/accelerate", every=10)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, log_with=tracker)
accelerator.init_trackers("ring", config={"batch_size": 128})
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
tracker.watch(model, optimizer)

for _ in range(10):
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            accelerator.log({"loss": loss.item()})
accelerator.end_training()

run = Run("runs/accelerate")
losses = run.scalars("train_loss")["value"]
print(f"{len(losses)} losses, {losses.iloc[:10].mean():.2f} to {losses.iloc[-10:].mean():.2f}")
print(f"steps 0 to {run.last_step}: two batches make one")
drift = run.drift().groupby("tensor", sort=False)["relative_l2"].last()
print(drift.to_frame("drift from the start").to_string())
