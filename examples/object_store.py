"""Trains a small network whose log goes to an object store, then reads the run back from there.

    export AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... AWS_REGION=eu-west-1
    python examples/object_store.py s3://bucket/exp1

The bucket must exist. `layerwatch dashboard s3://bucket/` shows the run while it is written and afterwards.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from layerwatch import Run, watch


def train(url: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 20)
    y = (x[:, :4].sum(1) > 0).long()
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with watch(model, optimizer, run=url, every=5) as watcher:
        for _ in range(200):
            batch = torch.randint(0, len(x), (64,))
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watcher.log(train_loss=loss)
    # Everything is at the store now. What an outage had left here, `layerwatch upload URL` would send.


def report(url: str) -> None:
    run = Run(url)
    losses = run.scalars("train_loss")["value"]
    print(f"{run.url}: {run.last_step + 1} steps, loss {losses.iloc[0]:.2f} to {losses.iloc[-1]:.2f}")
    print(run.stats("weight", "0.weight", ["step", "norm", "std"]).tail(3).to_string(index=False))
    for finding in run.findings():
        print(finding.severity, finding.problem, finding.summary)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("expected the URL of a run that does not exist yet, for example s3://bucket/exp1")
    train(sys.argv[1])
    report(sys.argv[1])
