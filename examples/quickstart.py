"""Watch an ordinary training loop, then ask what happened: python examples/quickstart.py

It learns to tell points inside a ring from points outside. The log goes to runs/quickstart.
"""

from __future__ import annotations

import torch
from torch import nn

from layerwatch import Run, watch

torch.manual_seed(0)
points = torch.randn(2048, 2)
inside = (points.norm(dim=1) < 1.0).long()
train, valid = slice(0, 1536), slice(1536, None)

model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
criterion = nn.CrossEntropyLoss()

with watch(model, optimizer, run="runs/quickstart", every=10) as watcher:
    for step in range(300):
        batch = torch.randint(0, 1536, (128,))
        loss = criterion(model(points[batch]), inside[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watcher.log(train_loss=loss)
        if step % 50 == 49:
            with torch.no_grad():
                logits = model(points[valid])
            accuracy = (logits.argmax(1) == inside[valid]).float().mean()
            watcher.log(val_loss=criterion(logits, inside[valid]), val_accuracy=accuracy)

run = Run("runs/quickstart")
print(run.scalars("val_accuracy")[["step", "value"]].to_string(index=False))
last = run.drift().groupby("tensor", sort=False).tail(1)
print(last[["tensor", "relative_l2", "cosine"]].to_string(index=False))
for finding in run.findings():
    print(f"{finding.severity}: {finding.summary} {finding.advice}")
