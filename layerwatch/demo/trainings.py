"""The five trainings, each the loop that a user would write, with one line added: `watch(...)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

from ..hooks import Watcher, watch
from . import data
from .models import Autoencoder, ConvNet, mlp
from .sentences import finetune_minilm

Loss = Callable[[Tensor, Tensor], Tensor]
Advance = Callable[[], None]

EVALUATE_EVERY = 20


@dataclass(frozen=True)
class Training:
    """One run: `train(folder, steps, advance)` writes it and calls `advance` after each step."""

    name: str
    steps: int
    train: Callable[[Path, int, Advance], None]
    threads: int | None = 1  # on networks this small, a second thread only waits; None: torch's own choice


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[data.Batch],
    evaluate: Callable[[nn.Module], dict[str, Tensor]],
    criterion: Loss,
    watcher: Watcher,
    advance: Advance,
    schedule: LRScheduler | None = None,
) -> None:
    """An ordinary training loop: train on each batch, look at held-out data now and then."""
    for step, (x, y) in enumerate(batches):
        model.train()
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        watcher.log(train_loss=loss)
        if step % EVALUATE_EVERY == 0:
            model.eval()
            with torch.no_grad():
                watcher.log(**evaluate(model))
        advance()


def classification(valid: data.Batch) -> Callable[[nn.Module], dict[str, Tensor]]:
    """Validation loss and accuracy on `valid`."""
    x, y = valid

    def evaluate(model: nn.Module) -> dict[str, Tensor]:
        logits = model(x)
        accuracy = (logits.argmax(1) == y).float().mean()
        return {"val_loss": cross_entropy(logits, y), "val_accuracy": accuracy}

    return evaluate


def healthy_cnn(folder: Path, steps: int, advance: Advance) -> None:
    """Digits, a convolutional network with batch norm, AdamW, augmented images, a decaying learning rate."""
    torch.manual_seed(0)
    train, valid = data.digits()
    model = ConvNet()
    lr, weight_decay, batch_size = 2e-3, 1e-2, 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = CosineAnnealingLR(optimizer, steps, eta_min=lr / 10)
    shuffled = ((data.shifted(x), y) for x, y in data.batches(train, batch_size, steps))
    config = {"lr": lr, "weight_decay": weight_decay, "batch_size": batch_size, "augmentation": "shift"}
    with watch(model, optimizer, run=folder, every=5, config=config) as watcher:
        fit(model, optimizer, shuffled, classification(valid), cross_entropy, watcher, advance, schedule)


def vanishing_mlp(folder: Path, steps: int, advance: Advance) -> None:
    """Digits, twelve hidden layers of sigmoids, plain SGD."""
    torch.manual_seed(0)
    train, valid = data.digits()
    lr, batch_size, hidden, width = 0.1, 256, 12, 64
    model = mlp([64, *[width] * hidden, 10], nn.Sigmoid)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    shuffled = data.batches(train, batch_size, steps)
    config = {"lr": lr, "batch_size": batch_size, "hidden": hidden, "width": width}
    with watch(model, optimizer, run=folder, every=5, config=config) as watcher:
        fit(model, optimizer, shuffled, classification(valid), cross_entropy, watcher, advance)


def blow_up(folder: Path, steps: int, advance: Advance) -> None:
    """An autoencoder of digits; the learning rate warms up to more than the network can bear."""
    torch.manual_seed(0)
    train, valid = data.digits()
    model = Autoencoder()
    lr, momentum, batch_size, warmup = 0.12, 0.9, 256, 240
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    schedule = LinearLR(optimizer, 0.01, 1.0, warmup)
    images = ((x, x) for x, _ in data.batches(train, batch_size, steps))
    config = {"lr": lr, "momentum": momentum, "batch_size": batch_size, "warmup_steps": warmup}

    def per_image(drawn: Tensor, x: Tensor) -> Tensor:
        return mse_loss(drawn, x, reduction="sum") / len(x)

    def evaluate(model: nn.Module) -> dict[str, Tensor]:
        return {"val_loss": per_image(model(valid[0]), valid[0])}

    with watch(model, optimizer, run=folder, every=2, config=config) as watcher:
        fit(model, optimizer, images, evaluate, per_image, watcher, advance, schedule)


def overfit(folder: Path, steps: int, advance: Advance) -> None:
    """Digits, but only 120 to learn from, a fifth mislabelled, and a network that can learn them by heart."""
    torch.manual_seed(0)
    (x, y), valid = data.digits()
    lr, batch_size, size, width = 3e-4, 60, 120, 512
    x, y = x[:size], y[:size].clone()
    mislabelled = torch.rand(len(y)) < 0.2
    y[mislabelled] = torch.randint(0, 10, (int(mislabelled.sum()),))
    model = mlp([64, width, width, 10], nn.ReLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    shuffled = data.batches((x, y), batch_size, steps)
    config = {"lr": lr, "batch_size": batch_size, "training_images": size, "width": width}
    with watch(model, optimizer, run=folder, every=5, config=config) as watcher:
        fit(model, optimizer, shuffled, classification(valid), cross_entropy, watcher, advance)


TRAININGS = (
    Training("healthy-cnn", 400, healthy_cnn),
    Training("vanishing-mlp", 400, vanishing_mlp),
    Training("blow-up", 240, blow_up),
    Training("overfit", 400, overfit),
    Training("finetune-minilm", 80, finetune_minilm, threads=None),
)
