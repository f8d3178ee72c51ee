"""What each way to attach layerwatch costs, against the same training without it.

    python benchmarks/integrations.py [--stacks raw lightning ...] [--rounds 7] [--steps 60] [--every 10]

One network (1.3 million parameters), one process, torch on one thread. Each round trains every stack twice,
with and without layerwatch, in random order, and compares CPU time (all threads, the log's own included) from
the tenth step to the last: attaching and closing are left out, they are paid once. The ratio of a round is a
pair; shown are the median of the rounds and their quartiles. "A/A" is the raw loop against itself: what it
shows is noise. `every="auto"` captures as often as 2 % of the time allow.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"  # before Keras is imported

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from layerwatch import Run, watch

WARM, BATCH, INPUTS, WIDTH = 10, 128, 256, 1024
#: run folder or None, steps, capture interval -> CPU seconds of a step.
Train = Callable[[Path | None, int, int], float]


class Net(nn.Module):
    """Notes when each forward pass begins."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(INPUTS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
        )
        self.times: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        self.times.append(time.process_time())
        return self.body(x)


def loss_of(model: Any, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), x[:, :10].argmax(1))


def data(steps: int) -> Tensor:
    return torch.randn(steps * BATCH, INPUTS, generator=torch.Generator().manual_seed(0))


def per_step(times: list[float]) -> float:
    return (times[-1] - times[WARM]) / (len(times) - 1 - WARM)


def loop(
    net: Net, model: Any, optimizer: Any, steps: int, backward: Callable[[Tensor], Any], log: Any
) -> float:
    """What a user writes."""
    for x in data(steps).split(BATCH):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        backward(loss)
        optimizer.step()
        if log is not None:
            log(loss)
    return per_step(net.times)


def raw(run: Path | None, steps: int, every: int) -> float:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    if run is None:
        return loop(net, net, optimizer, steps, Tensor.backward, None)
    with watch(net, optimizer, run=run, every=every) as watcher:
        log = lambda loss: watcher.log(train_loss=loss)  # noqa: E731
        return loop(net, net, optimizer, steps, Tensor.backward, log)


def zero_code(run: Path | None, steps: int, every: int) -> float:
    from layerwatch.hooks.autowatch import AutoWatch

    auto = None if run is None else AutoWatch({"run": run, "every": every}, lambda words: None)
    if auto is not None:
        auto.start()
    seconds = raw(None, steps, every)
    if auto is not None:
        auto.finish()
    return seconds


def fabric(run: Path | None, steps: int, every: int) -> float:
    from lightning.fabric import Fabric

    net, fabric = Net(), Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), 1e-3))
    watcher: Any = contextlib.nullcontext() if run is None else watch(model, optimizer, run=run, every=every)
    with watcher:
        log = None if run is None else (lambda loss: watcher.log(train_loss=loss))
        return loop(net, model, optimizer, steps, fabric.backward, log)


def accelerate(run: Path | None, steps: int, every: int) -> float:
    from accelerate import Accelerator

    from layerwatch.hooks.accelerate import LayerwatchTracker

    tracker = None if run is None else LayerwatchTracker(run=run, every=every)
    accelerator, net = Accelerator(cpu=True, log_with=tracker), Net()
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), 1e-3))
    if tracker is None:
        return loop(net, model, optimizer, steps, accelerator.backward, None)
    accelerator.init_trackers("benchmark")
    tracker.watch(model, optimizer)
    log = lambda loss: accelerator.log({"loss": loss.item()})  # noqa: E731
    seconds = loop(net, model, optimizer, steps, accelerator.backward, log)
    accelerator.end_training()
    return seconds


def lightning(run: Path | None, steps: int, every: int) -> float:
    from lightning.pytorch import LightningModule, Trainer

    from layerwatch.hooks.lightning import LayerwatchCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return loss_of(self.net, batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    module = Module()
    Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[LayerwatchCallback(run=run, every=every)] if run else [],
    ).fit(module, DataLoader(TensorDataset(data(steps)), BATCH))  # fmt: skip
    return per_step(module.net.times)


class WithLoss(nn.Module):
    """As the Trainer wants a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The loss."""
        return {"loss": loss_of(self.net, x)}


def transformers(run: Path | None, steps: int, every: int) -> float:
    from transformers.trainer import Trainer
    from transformers.training_args import TrainingArguments

    from layerwatch.hooks.transformers import LayerwatchCallback

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, logging_steps=10, report_to="none",
            use_cpu=True, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        model, rows = WithLoss(), [{"x": row} for row in data(steps)]
        callbacks: list[Any] = [LayerwatchCallback(run=run, every=every)] if run else []
        with contextlib.redirect_stdout(None):
            Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()  # type: ignore[arg-type]
    return per_step(model.net.times)


def keras(run: Path | None, steps: int, every: int) -> float:
    import keras

    from layerwatch.hooks.keras import LayerwatchCallback

    times: list[float] = []
    clock = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda *_, **__: times.append(time.process_time())
    )
    layers = [keras.layers.Dense(WIDTH, "relu"), keras.layers.Dense(WIDTH, "relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((INPUTS,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-3), loss)
    x = data(steps)
    callbacks = [clock, *([LayerwatchCallback(run=run, every=every)] if run else [])]
    model.fit(x.numpy(), x[:, :10].argmax(1).numpy(), BATCH, callbacks=callbacks, verbose=0)
    return per_step(times)


STACKS: dict[str, Train] = {
    "raw": raw,
    "zero code": zero_code,
    "lightning": lightning,
    "fabric": fabric,
    "transformers": transformers,
    "accelerate": accelerate,
    "keras": keras,
}


def pair(
    train: Train, steps: int, every: int, order: random.Random, *, watched: bool = True
) -> tuple[float, float]:
    """CPU seconds of a step: without and with."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for attached in order.sample((False, True), 2):
            run = Path(folder) / "run" if attached and watched else None
            torch.manual_seed(0)
            found[attached] = train(run, steps, every)
            if run is not None:
                assert set(Run(run).stats("update")["step"]) >= set(range(0, steps, every))
                assert not (run / "errors.log").exists()
    return found[False], found[True]


def report(name: str, pairs: list[tuple[float, float]]) -> None:
    ratios = [100 * (with_ / without - 1) for without, with_ in pairs]
    low, median, high = statistics.quantiles(ratios, n=4)
    step = 1e3 * statistics.median(without for without, _ in pairs)
    extra = 1e3 * statistics.median(with_ - without for without, with_ in pairs)
    print(f"{name:14}{step:9.1f}{extra:+12.2f}{median:+11.1f} %   {low:+.1f} to {high:+.1f} %", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))
    parser.add_argument("--rounds", type=int, default=7, help="pairs of each stack (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of each training (default: %(default)s)")
    parser.add_argument("--every", type=int, default=10, help="capture interval (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    order = random.Random(0)
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in ("A/A", *options.stacks)}
    for round_ in range(options.rounds + 1):
        for name in order.sample(list(pairs), len(pairs)):
            train = STACKS.get(name, raw)
            found = pair(train, options.steps, options.every, order, watched=name != "A/A")
            if round_:  # the first warms up
                pairs[name].append(found)
    print(f"{'stack':14}{'step, ms':>9}{'more, ms':>12}{'median':>11}     quartiles")
    for name, each in pairs.items():
        report(name, each)


if __name__ == "__main__":
    main()
