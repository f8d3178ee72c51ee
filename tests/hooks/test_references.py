"""Drift from a pretrained reference is the same in every integration, and from every kind of checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trainings import batch, loss_of, mlp, weights_of
from transformers import Trainer, TrainingArguments

from layerwatch import Run, watch
from layerwatch.hooks.autowatch import AutoWatch

os.environ["KERAS_BACKEND"] = "torch"

import keras

from layerwatch.hooks.keras import LayerwatchCallback as KerasCallback
from layerwatch.hooks.lightning import LayerwatchCallback as LightningCallback
from layerwatch.hooks.transformers import LayerwatchCallback as TransformersCallback

pytestmark = [
    # Lightning uses what torch has deprecated, and gives advice on a loader so small and on this machine.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings(r"ignore:.*does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:The `srun` command is available"),
    # Keras turns torch's tensors into arrays so.
    pytest.mark.filterwarnings(r"ignore:__array__ implementation doesn't accept a copy keyword"),
]

STEPS = 4
PRETRAINED = {name: weight + 0.01 for name, weight in weights_of(mlp()).items()}


def file(folder: Path) -> Path:
    safetensors.torch.save_file(PRETRAINED, folder / "base.safetensors")
    return folder / "base.safetensors"


def hugging_face(folder: Path) -> Path:
    """A folder with a configuration and one file."""
    safetensors.torch.save_file(PRETRAINED, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def sharded(folder: Path, suffix: str = ".safetensors") -> Path:
    places = {name: f"model-{1 + i % 2}-of-2{suffix}" for i, name in enumerate(PRETRAINED)}
    for shard in set(places.values()):
        part = {name: PRETRAINED[name] for name in places if places[name] == shard}
        if suffix == ".safetensors":
            safetensors.torch.save_file(part, folder / shard)
        else:
            torch.save(part, folder / shard)
    kind = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    (folder / f"{kind}.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def old_shards(folder: Path) -> Path:
    return sharded(folder, ".bin")


def index(folder: Path) -> Path:
    return sharded(folder) / "model.safetensors.index.json"


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 0.05)


def plain_loop(run: Path, reference: Any) -> None:
    model = mlp()
    optimizer = adam(model)
    with watch(model, optimizer, run=run, every=1, reference=reference):
        steps(model, optimizer)


def steps(
    model: nn.Module, optimizer: Any, backward: Callable[[Tensor], Any] = torch.Tensor.backward
) -> None:
    for step in range(STEPS):
        backward(loss_of(model(batch(step))))
        optimizer.step()
        optimizer.zero_grad()


class Lit(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def training_step(self, rows: list[Tensor], _: int) -> Tensor:
        return loss_of(self.net(rows[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adam(self)


def lightning(run: Path, reference: Any) -> None:
    data = DataLoader(TensorDataset(torch.cat([batch(step) for step in range(STEPS)])), 32)
    callback = LightningCallback(run=run, every=1, reference=reference)
    pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=run.parent, callbacks=[callback],
    ).fit(Lit(), data)  # fmt: skip


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": loss_of(self.net(x))}


def transformers(run: Path, reference: Any) -> None:
    rows: Any = [{"x": row} for step in range(STEPS) for row in batch(step)]
    model = Scored()
    callback = TransformersCallback(run=run, every=1, reference=reference)
    arguments = TrainingArguments(
        str(run.parent / "out"), max_steps=STEPS, per_device_train_batch_size=32, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
    )  # fmt: skip

    class InOrder(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(rows, 32)

    optimizer = adam(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    InOrder(
        model, arguments, train_dataset=rows, callbacks=[callback], optimizers=(optimizer, schedule)
    ).train()


def accelerate(run: Path, reference: Any) -> None:
    accelerator = Accelerator(cpu=True)
    bare = mlp()
    model, optimizer = accelerator.prepare(bare, adam(bare))
    with watch(model, optimizer, run=run, every=1, reference=reference):
        steps(model, optimizer, accelerator.backward)


def fabric(run: Path, reference: Any) -> None:
    launched = Fabric(accelerator="cpu")
    bare = mlp()
    model, optimizer = launched.setup(bare, adam(bare))
    with watch(model, optimizer, run=run, every=1, reference=reference):
        steps(model, optimizer, launched.backward)


def zero_code(run: Path, reference: Any) -> None:
    auto = AutoWatch({"run": run, "every": 1, "reference": reference}, lambda _: None)
    auto.start()
    try:
        model = mlp()
        steps(model, adam(model))
    finally:
        auto.finish()


def drift_of(path: Path) -> pd.DataFrame:
    assert not (path / "errors.log").exists()
    run = Run(path)
    frame = run.drift()[["step", "tensor", "relative_l2", "cosine", "sign_flips"]]
    assert frame["step"].nunique() == STEPS
    bare = frame["tensor"].str.removeprefix("net.")  # the part of the user's module that holds the network
    return frame.assign(tensor=bare).sort_values(["tensor", "step"], ignore_index=True)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Of a plain loop, from a state_dict; checked against plain numpy at its last step."""
    path = tmp_path_factory.mktemp("plain")
    plain_loop(path / "run", PRETRAINED)
    model = mlp()
    steps(model, adam(model))
    frame = drift_of(path / "run")
    for name, weight in weights_of(model).items():
        w, r = (t.double().numpy().ravel() for t in (weight, PRETRAINED[name]))
        last = frame[frame["tensor"] == name].iloc[-1]
        assert last["relative_l2"] == pytest.approx(np.linalg.norm(w - r) / np.linalg.norm(r), rel=1e-9)
    return frame


@pytest.mark.parametrize("checkpoint", [file, hugging_face, sharded, old_shards, index])
def test_every_kind_of_checkpoint(
    tmp_path: Path, expected: pd.DataFrame, checkpoint: Callable[[Path], Path]
) -> None:
    plain_loop(tmp_path / "run", checkpoint(tmp_path))
    pd.testing.assert_frame_equal(drift_of(tmp_path / "run"), expected)
    run = Run(tmp_path / "run")
    assert {entry["form"] for entry in run.info["references"].values()} == {"mapped"}  # takes no memory
    assert sum(entry["bytes"] for entry in run.info["references"].values()) == 0
    assert not any("counterpart" in note for note in run.info["notes"])


@pytest.mark.parametrize("integration", [lightning, transformers, accelerate, fabric, zero_code])
def test_every_integration_measures_what_a_plain_loop_does(
    tmp_path: Path, expected: pd.DataFrame, integration: Callable[[Path, Any], None]
) -> None:
    integration(tmp_path / "run", sharded(tmp_path))
    pd.testing.assert_frame_equal(drift_of(tmp_path / "run"), expected, rtol=1e-6, atol=1e-9)


def test_keras(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model: Any = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16), keras.layers.Dense(3)])
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    pretrained = {  # as it is logged: (out, in), as torch stores it
        name: torch.from_numpy((value + 0.1).T.copy())
        for name, value in zip(names, model.get_weights(), strict=True)
    }
    safetensors.torch.save_file(pretrained, tmp_path / "model.safetensors")
    model.compile(keras.optimizers.SGD(0.5), loss="mse")
    x = batch(0).numpy()
    callback = KerasCallback(run=tmp_path / "run", every=1, reference=tmp_path)
    model.fit(x, x[:, :3], batch_size=8, epochs=1, verbose=0, callbacks=[callback])
    last = Run(tmp_path / "run").drift().groupby("tensor").last()
    assert set(last.index) == set(names)
    for name, value in zip(names, model.get_weights(), strict=True):
        r = pretrained[name].double().numpy().T
        true = np.linalg.norm(value.astype(float) - r) / np.linalg.norm(r)
        assert last.loc[name, "relative_l2"] == pytest.approx(true, rel=1e-6)


def test_the_command_line_takes_folders_and_budgets(tmp_path: Path) -> None:
    script = "import torch\nfrom torch import nn\nmodel = nn.Linear(4, 2)\n"
    script += "o = torch.optim.SGD(model.parameters(), 1.0)\nfor _ in range(3):\n"
    script += "    model(torch.ones(8, 4)).square().mean().backward(); o.step(); o.zero_grad()\n"
    (tmp_path / "train.py").write_text(script)
    base = {"weight": torch.ones(2, 4), "bias": torch.ones(2)}
    safetensors.torch.save_file(base, tmp_path / "model.safetensors")
    command = [sys.executable, "-m", "layerwatch", "run", "--run", "run", "--every", "1", "--reference", "."]
    command += ["--drift-limit", "weight=0.01", "--drift-limit", "bias=0.5", "train.py"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120)
    run = Run(tmp_path / "run")
    assert run.info["drift_limit"] == {"weight": 0.01, "bias": 0.5}
    assert run.drift()["relative_l2"].min() > 0.1
    finding = next(f for f in run.findings() if f.problem == "excessive_drift")
    assert finding.layers[0] == "weight"
    assert finding.evidence["budget"] == "weight"


def test_missing_shards_are_named_and_cost_their_tensors_only(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    plain_loop(tmp_path / "run", tmp_path)
    run = Run(tmp_path / "run")
    assert set(run.drift()["tensor"]) == {"0.weight", "2.weight"}
    notes = " ".join(run.info["notes"])
    assert "these shards are missing: model-2-of-2.safetensors" in notes
    assert "2 of 4 tensors have no counterpart" in notes


@pytest.mark.parametrize("what", ["nothing", "no shard", "a damaged index"])
def test_folders_that_cannot_be_read_are_told(tmp_path: Path, what: str) -> None:
    words = "holds no .safetensors"
    if what == "no shard":
        sharded(tmp_path)
        for shard in tmp_path.glob("model-*"):
            shard.unlink()
        words = "are missing"
    elif what == "a damaged index":
        (tmp_path / "model.safetensors.index.json").write_text("[]")
        words = "index of a sharded checkpoint"
    with pytest.raises(ValueError, match=words):
        watch(mlp(), run=tmp_path / "run", reference=tmp_path)
    assert not (tmp_path / "run").exists()
