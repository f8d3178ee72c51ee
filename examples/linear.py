"""The smallest network there is learns y = 3x + 2, and its log shows how: python examples/linear.py"""

from __future__ import annotations

import torch
from torch import nn

from layerwatch import Run, watch

torch.manual_seed(0)
model = nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

with watch(model, optimizer, run="runs/linear", every=1) as watcher:
    for _ in range(100):
        x = torch.rand(32, 1) * 4 - 2
        loss = nn.functional.mse_loss(model(x), 3 * x + 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watcher.log(train_loss=loss)

# Tensors of few elements are stored value by value, so the log alone tells the whole story.
run = Run("runs/linear")
steps, weight = run.values("weight")
_, bias = run.values("bias")
for i in (0, 5, 10, 20, len(steps) - 1):
    print(f"step {steps[i]:3}: y = {weight[i, 0]:.3f} x + {bias[i, 0]:.3f}")
