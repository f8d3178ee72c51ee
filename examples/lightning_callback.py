"""The Trainer of Lightning with one more callback: python examples/lightning_callback.py"""

from __future__ import annotations

import logging
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from layerwatch import Run
from layerwatch.hooks.lightning import LayerwatchCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")  # advice about this machine and a loader so small


class Spirals(LightningModule):
    """Which of two spirals a point is on."""

    def __init__(self, width: int = 64, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, 1)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_loss", self.loss(batch))

    def loss(self, batch: list[Tensor]) -> Tensor:
        points, spiral = batch
        return nn.functional.binary_cross_entropy_with_logits(self.head(self.net(points)), spiral)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


def spirals(count: int) -> TensorDataset:
    spiral = torch.randint(0, 2, (count, 1)).float()
    turn = 3 * torch.rand(count, 1)
    angle = 2 * torch.pi * (turn / 2 + spiral / 2)
    points = turn / 3 * torch.cat([angle.cos(), angle.sin()], dim=1)
    return TensorDataset(points + 0.01 * torch.randn(count, 2), spiral)


torch.manual_seed(0)
trainer = Trainer(
    max_epochs=20,
    gradient_clip_val=1.0,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[LayerwatchCallback(run="runs/lightning", every=10)],
)
trainer.fit(
    Spirals(),
    DataLoader(spirals(1024), batch_size=64, shuffle=True),
    DataLoader(spirals(256), batch_size=256),
)

run = Run("runs/lightning")
losses = run.scalars("val_loss")
print(f"{run.last_step + 1} steps, width {run.info['config']['width']}")
print(f"val_loss {losses['value'].iloc[0]:.3f} to {losses['value'].iloc[-1]:.3f}")
drift = run.drift().groupby("tensor", sort=False)["relative_l2"].last()
print(drift.to_frame("relative L2 distance from the start").to_string())
