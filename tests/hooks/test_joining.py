"""Scripts that train with a framework: its trainer is given our callback while it trains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

os.environ["KERAS_BACKEND"] = "torch"  # before Keras is imported

import keras
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trainings import batch, loss_of, mlp
from transformers.trainer import Trainer as HuggingTrainer
from transformers.training_args import TrainingArguments

from layerwatch import Run
from layerwatch.hooks.autowatch import AutoWatch
from layerwatch.hooks.keras import LayerwatchCallback as ForKeras
from layerwatch.hooks.lightning import LayerwatchCallback as ForLightning
from layerwatch.hooks.transformers import LayerwatchCallback as ForTransformers

pytestmark = [
    # Lightning uses what torch has deprecated, and gives advice on a loader so small and on this machine.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings(r"ignore:.*does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:The `srun` command is available"),
]
#: What differs each time.
TIMES = {"overhead", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
STEPS = 4


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def training_step(self, x: list[Tensor], _: int) -> Tensor:
        loss = loss_of(self.net(x[0]))
        self.log("double", 2 * loss)
        return loss

    def validation_step(self, x: list[Tensor], _: int) -> None:
        self.log("val_loss", loss_of(self.net(x[0])))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def lightning(folder: Path, callbacks: list[Any]) -> list[Tensor]:
    data = DataLoader(TensorDataset(torch.cat([batch(step) for step in range(STEPS)])), 32)
    module = Lit()
    Trainer(
        accelerator="cpu", max_epochs=1, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, default_root_dir=folder,
    ).fit(module, data, data)  # fmt: skip
    return list(module.parameters())


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": loss_of(self.net(x))}


def transformers(folder: Path, callbacks: list[Any]) -> list[Tensor]:
    model = WithLoss()
    arguments = TrainingArguments(
        str(folder / "out"), max_steps=STEPS, per_device_train_batch_size=8, logging_steps=1,
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", gradient_accumulation_steps=2,
    )  # fmt: skip
    data = [{"x": row} for step in range(8) for row in batch(step)]
    HuggingTrainer(model, arguments, train_dataset=data, callbacks=callbacks).train()  # type: ignore[arg-type]
    return list(model.parameters())


def of_keras(folder: Path, callbacks: list[Any]) -> list[Tensor]:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(4, activation="relu"), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.Adam(1e-2, name="adam"), "mse")
    x = np.concatenate([batch(step).numpy() for step in range(STEPS)])
    fit: Any = model.fit
    fit(x, x[:, :1], 32, verbose=0, callbacks=callbacks, validation_data=(x, x[:, :1]), shuffle=False)
    convert: Any = keras.ops.convert_to_tensor
    return [convert(w).detach().clone() for w in model.weights]


FRAMEWORKS = {
    "keras": (of_keras, ForKeras, {"train_loss", "val_loss"}),
    "lightning": (lightning, ForLightning, {"train_loss", "val_loss", "double"}),
    "transformers": (transformers, ForTransformers, {"train_loss", "learning_rate"}),
}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_it_logs_what_the_callback_logs(tmp_path: Path, name: str) -> None:
    train, callback, scalars = FRAMEWORKS[name]
    alone = train(tmp_path / "1", [])
    options: dict[str, Any] = {
        "every": 1, "system": False, "tags": ["sweep"], "owner": "ana", "note": "of a framework",
    }  # fmt: skip
    train(tmp_path / "2", [callback(run=tmp_path / "given", **options)])
    words: list[str] = []
    auto = AutoWatch({"run": tmp_path / "auto", **options}, words.append)
    auto.start()
    found = train(tmp_path / "3", [])
    auto.finish()
    assert [torch.equal(a, b) for a, b in zip(alone, found, strict=True)] == [True] * len(alone)
    assert auto.runs == [tmp_path / "auto"]
    assert len(words) == 1, words
    given, run = Run(tmp_path / "given"), Run(tmp_path / "auto")
    assert not (tmp_path / "auto" / "errors.log").exists()
    assert run.last_step == STEPS - 1
    for info in (given.info, run.info):
        assert [info[key] for key in ("tags", "owner", "note")] == [["sweep"], "ana", "of a framework"]
    for kind in ("initial_weight", "weight", "gradient", "update"):
        frames = [r.stats(kind).drop(columns="time", errors="ignore") for r in (given, run)]
        pd.testing.assert_frame_equal(*frames)
        assert len(frames[0]) > 0
    assert {*run.scalar_names()} >= scalars
    assert {*given.scalar_names()} - {*run.scalar_names()} == set()
    for scalar in {*given.scalar_names()} - TIMES:
        columns = ["step", "value"]
        pd.testing.assert_frame_equal(given.scalars(scalar)[columns], run.scalars(scalar)[columns])
    assert run.info["config"] == {
        k: v for k, v in given.info["config"].items() if k not in ("output_dir", "logging_dir")
    } | {k: v for k, v in run.info["config"].items() if k in ("output_dir", "logging_dir")}
