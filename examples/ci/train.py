"""A training of seconds for continuous integration: python train.py --run runs/new

It stands for your own training code, started with little data and few steps.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from layerwatch import watch

parser = argparse.ArgumentParser()
parser.add_argument("--run", default="runs/new", help="folder of the log")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--lr", type=float, default=3e-3)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

torch.manual_seed(0)  # the data is the same for every seed
points = torch.randn(2048, 2)
inside = (points.norm(dim=1) < 1.0).long()
train, valid = slice(0, 1536), slice(1536, None)

torch.manual_seed(options.seed)
model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
criterion = nn.CrossEntropyLoss()

with watch(model, optimizer, run=options.run, every=5, config=vars(options)) as watcher:
    for step in range(options.steps):
        batch = torch.randint(0, 1536, (128,))
        loss = criterion(model(points[batch]), inside[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watcher.log(train_loss=loss, lr=options.lr)
        if step % 25 == 24:
            with torch.no_grad():
                watcher.log(val_loss=criterion(model(points[valid]), inside[valid]))
