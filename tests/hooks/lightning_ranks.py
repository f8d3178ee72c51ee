"""Run as a script: the Trainer starts the second process itself, by running the script again."""

from __future__ import annotations

import torch
from lightning import LightningModule, Trainer
from ranks import Net, batch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from layerwatch.hooks.lightning import LayerwatchCallback


class Module(LightningModule):
    """The network of `ranks`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, part: tuple[Tensor, Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(part[0]), part[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


if __name__ == "__main__":
    torch.manual_seed(0)
    inputs, targets = (torch.cat(parts) for parts in zip(*map(batch, range(8)), strict=True))
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[LayerwatchCallback(every=1)],
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(inputs, targets), batch_size=16))
