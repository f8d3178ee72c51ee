"""Lightning: the callback logs what a plain loop under `watch` logs, and what the module reports."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.amp.autocast_mode import autocast
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils.clip_grad import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader, TensorDataset
from trainings import assert_same_numbers, batch, failures, loss_of, weights_of

from layerwatch import Run, RunError, watch
from layerwatch.hooks import lightning as hook
from layerwatch.hooks.lightning import LayerwatchCallback

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    # Lightning uses what torch has deprecated, and gives advice on a loader so small and on this machine.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings(r"ignore:.*does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:The `srun` command is available"),
    pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty"),
]

BATCHES = 4  # of an epoch
OVERFLOWS = (1,)  # batches whose loss is infinite, where there is a loss scaler
Make = Callable[[nn.Module], torch.optim.Optimizer]
adamw: Make = lambda m: torch.optim.AdamW(m.parameters(), 1e-2)  # noqa: E731
lbfgs: Make = lambda m: torch.optim.LBFGS(m.parameters(), 0.1, max_iter=3)  # noqa: E731


class Net(pl.LightningModule):
    def __init__(self, width: int = 16, dropout: float = 0.0, make: Make = adamw) -> None:
        super().__init__()
        self.save_hyperparameters("width", "dropout")
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 3)
        )  # fmt: skip
        self.make, self.fails_at = make, -1
        self.overflows: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, data: list[Tensor], index: int) -> Tensor:
        if self.global_step == self.fails_at:
            raise ZeroDivisionError("a bug in the user's code")
        return loss_of(self(data[0]).float()) * (torch.inf if index in self.overflows else 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(epoch: int = 0) -> DataLoader:
    return DataLoader(TensorDataset(torch.cat([batch(BATCHES * epoch + i) for i in range(BATCHES)])), 32)


def trainer(path: Path, *callbacks: Any, package: Any = pl, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"accelerator": "cpu", "logger": False, "max_epochs": 2, "default_root_dir": path, **quiet}
    return package.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def scaler() -> GradScaler:
    return GradScaler("cpu", init_scale=2.0**10, growth_interval=2)


def by_hand(
    path: Path, model: Net, *, parts: int = 1, clip: Callable[[Any], Any] = lambda _: None,
    kind: torch.dtype | None = None, scaled: bool = False, epochs: int = 2,
) -> Run:  # fmt: skip
    """The same training in a plain loop under `watch`."""
    optimizer = model.make(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    scaling = scaler() if scaled else GradScaler("cpu", enabled=False)

    def backward(x: Tensor, factor: float = 1.0) -> Tensor:
        with autocast("cpu", dtype=kind, enabled=kind is not None, cache_enabled=False):
            output = model(x)
        loss = loss_of(output.float()) * factor / parts
        scaling.scale(loss).backward()
        return loss

    def closure(x: Tensor, losses: list[Tensor]) -> Tensor:
        optimizer.zero_grad()
        losses[:] = [backward(x)]
        return losses[0]

    with watch(model, optimizer, run=path, every=1) as watcher:
        for _ in range(epochs):
            losses: list[Tensor] = []
            for index, (x,) in enumerate(loader()):
                if isinstance(optimizer, torch.optim.LBFGS):
                    optimizer.step(partial(closure, x, losses))
                else:
                    losses.append(backward(x, torch.inf if index in model.overflows else 1.0).detach())
                    if (index + 1) % parts:
                        continue
                    scaling.unscale_(optimizer)
                    clip(model.parameters())
                    scaling.step(optimizer)
                    scaling.update()
                    optimizer.zero_grad()
                schedule.step()
                watcher.log(train_loss=torch.stack(losses).detach().sum())
                losses = []
    return Run(path)


#: name -> the Trainer's options, the plain loop's
HOW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulation": ({"accumulate_grad_batches": 2}, {"parts": 2}),
    "clipping by norm": ({"gradient_clip_val": 0.1}, {"clip": lambda p: clip_grad_norm_(p, 0.1)}),
    "clipping by value": (
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2},
        {"clip": lambda p: clip_grad_value_(p, 0.01), "parts": 2},
    ),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {"kind": torch.bfloat16}),
    "16-mixed": (
        {"plugins": "16-mixed", "gradient_clip_val": 0.1},
        {"kind": torch.float16, "scaled": True, "clip": lambda p: clip_grad_norm_(p, 0.1)},
    ),
    "LBFGS": ({}, {}),
}


@pytest.mark.parametrize("how", HOW)
def test_the_log_is_that_of_a_plain_loop(tmp_path: Path, how: str) -> None:
    options, loop = HOW[how]
    if "plugins" in options:  # the Trainer would choose bfloat16 on the CPU
        options = {**options, "plugins": MixedPrecision("16-mixed", device="cpu", scaler=scaler())}
    models = [Net(make=lbfgs if how == "LBFGS" else adamw) for _ in range(3)]
    for model in models:
        model.overflows = OVERFLOWS if how == "16-mixed" else ()
    callback = LayerwatchCallback(tmp_path / "run", every=1)
    trainer(tmp_path, callback, **options).fit(models[0], loader())
    raw = by_hand(tmp_path / "raw", models[1], **loop)
    trainer(tmp_path, **options).fit(models[2], loader())
    for other in models[1:]:
        assert_same_weights(models[0], other)
    run = Run(tmp_path / "run")
    assert callback.watcher is not None
    assert failures(callback.watcher) == ""
    assert_same_numbers(run, raw)
    for name in ("grad_norm", "clip_ratio", "loss_scale", "lr", "train_loss"):
        columns = ["step", "value"]
        pd.testing.assert_frame_equal(run.scalars(name)[columns], raw.scalars(name)[columns], obj=name)
    assert len(run.scalars("train_loss")) == run.last_step + 1 >= BATCHES
    if how == "16-mixed":
        weights = run.stats("weight")
        assert set(weights.loc[weights["skipped"], "step"]) == {1, 1 + BATCHES}


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    one, other = weights_of(a), weights_of(b)
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


# What the module reports ------------------------------------------------------------------------------------


class Reporting(Net):
    """Logs in every way there is."""

    def training_step(self, data: list[Tensor], index: int) -> Tensor:
        loss = super().training_step(data, index)
        self.log("index", float(index), on_step=True, on_epoch=True)
        self.log("mean_index", float(index), on_step=False, on_epoch=True)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, data: list[Tensor], index: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.global_step + 0.5, on_step=True, on_epoch=True)


class Returning(Net):
    """Logs its own training loss at each step."""

    def training_step(self, data: list[Tensor], index: int) -> dict[str, Tensor]:  # type: ignore[override]
        loss = super().training_step(data, index)
        self.log("loss", 100.0 + self.global_step)
        return {"loss": loss, "other": loss}

    def validation_step(self, data: list[Tensor], index: int) -> None:
        self.log("loss", 0.25)


def points(run: Run, name: str) -> list[tuple[int, float]]:
    found = run.scalars(name)
    return list(zip(found["step"].tolist(), found["value"].tolist(), strict=True))


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    """With dropout and validation, so that one random number too many would show."""

    def trained(*callbacks: Any) -> Net:
        torch.manual_seed(1)
        model = Reporting(dropout=0.3)
        loaders = DataLoader(TensorDataset(batch(99, 128)), 32, shuffle=True)
        trainer(tmp_path, *callbacks, gradient_clip_val=0.1).fit(model, loaders, loader())
        return model

    everything = {"every": 1, "step_norms": True, "anchors": 2}
    watched = trained(LayerwatchCallback(tmp_path / "run", **everything))
    after = torch.get_rng_state()
    assert_same_weights(watched, trained())
    assert torch.equal(torch.get_rng_state(), after)
    assert len(Run(tmp_path / "run").stats("weight")) > 0


def test_metrics_of_steps_epochs_and_validations(tmp_path: Path) -> None:
    callback = LayerwatchCallback(
        tmp_path / "run", every=1, config={"width": "mine", "note": "x"}, system=False
    )
    fitting = trainer(tmp_path, callback, val_check_interval=2, accumulate_grad_batches=2)
    fitting.fit(Reporting(), loader(), loader())
    run = Run(tmp_path / "run")
    assert points(run, "index") == [(0, 1.0), (1, 3.0), (2, 1.0), (3, 3.0)]
    assert points(run, "index_epoch") == points(run, "mean_index") == [(1, 1.5), (3, 1.5)]
    assert points(run, "val_loss") == [(s, s + 1.5) for s in range(4)]  # none of the sanity check
    losses = dict(points(run, "train_loss"))
    means = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2]
    assert points(run, "train_loss_epoch") == [(1, pytest.approx(means[0])), (3, pytest.approx(means[1]))]
    ours = {"train_loss", "train_loss_epoch", "val_loss", "index", "index_epoch", "mean_index"}
    assert set(run.scalar_names()) == {*ours, "lr", "grad_norm", "overhead"}
    config = {"accumulate_grad_batches": 2, "precision": "32-true", "dropout": 0.0, "note": "x"}
    assert run.info["config"] == {**config, "width": "mine"}


def test_losses_by_their_short_name(tmp_path: Path) -> None:
    trainer(tmp_path, LayerwatchCallback(tmp_path / "run"), max_epochs=1).fit(Returning(), loader(), loader())
    run = Run(tmp_path / "run")
    assert points(run, "train_loss") == [(s, 100.0 + s) for s in range(BATCHES)]
    assert points(run, "val_loss") == [(BATCHES - 1, 0.25)]
    assert run.scalars("loss").empty


def test_several_validation_loaders(tmp_path: Path) -> None:
    fitting = trainer(tmp_path, LayerwatchCallback(tmp_path / "run"), max_epochs=1)
    fitting.fit(Reporting(), loader(), [loader(), loader()])
    names = [n for n in Run(tmp_path / "run").scalar_names() if n.startswith("val")]
    assert names == ["val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"]


# Manual optimization ----------------------------------------------------------------------------------------


class Gan(pl.LightningModule):
    """Two optimizers; the critic steps first."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator, self.critic = nn.Linear(4, 8), nn.Linear(8, 1)

    def losses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fake = self.generator(x[:, :4])
        return self.critic(x).mean() - self.critic(fake.detach()).mean(), self.critic(fake).mean()

    def training_step(self, data: list[Tensor], index: int) -> None:
        optimizers: Any = self.optimizers()
        for which, optimizer in enumerate(optimizers):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            loss = self.losses(data[0])[which]
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            self.log(("critic_loss", "generator_loss")[which], loss)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(m.parameters(), 1e-2) for m in (self.critic, self.generator)]


def gan_by_hand(path: Path, model: Gan) -> Run:
    optimizers = model.configure_optimizers()
    with watch(model, optimizers, run=path, every=1) as watcher:
        for (x,) in loader():
            for which, optimizer in enumerate(optimizers):
                optimizer.zero_grad()
                loss = model.losses(x)[which]
                loss.backward(inputs=[p for g in optimizer.param_groups for p in g["params"]])
                clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.1)
                optimizer.step()
                watcher.log(**{("critic_loss", "generator_loss")[which]: loss})
    return Run(path)


def test_two_optimizers_by_hand(tmp_path: Path) -> None:
    models = [Gan(), Gan()]
    callback = LayerwatchCallback(tmp_path / "run", every=1)
    fitting = trainer(tmp_path, callback, max_epochs=1)
    fitting.fit(models[0], loader())
    raw = gan_by_hand(tmp_path / "raw", models[1])
    assert_same_weights(*models)
    run = Run(tmp_path / "run")
    assert run.last_step == BATCHES - 1 == fitting.global_step / 2 - 1  # the Trainer counts each optimizer
    assert_same_numbers(run, raw, ("weight", "gradient", "update"))
    for name in ("critic_loss", "generator_loss", "grad_norm", "clip_ratio"):
        assert points(run, name) == points(raw, name)
    assert run.scalars("train_loss").empty


# Resuming, once more, accidents -----------------------------------------------------------------------------


def steps_of(path: Path) -> list[int]:
    return sorted(set(Run(path).stats("weight")["step"]))


@pytest.mark.parametrize("named", [True, False])
def test_a_checkpoint_goes_on_in_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """As after a crash: the checkpoint is of step 4, six steps were logged, the process is gone."""
    monkeypatch.chdir(tmp_path)
    where = tmp_path / "run" if named else None
    model = Net()
    model.fails_at = 6
    first = LayerwatchCallback(where, every=1)
    keeping = ModelCheckpoint(tmp_path / "kept", filename="kept", every_n_epochs=1)
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, first, keeping, enable_checkpointing=True).fit(model, loader())
    assert first.watcher is not None
    path = Path(first.watcher.run)
    assert steps_of(path) == list(range(6))
    assert Run(path).info["closed"]

    again = Net()
    second = LayerwatchCallback(where, every=1)
    trainer(tmp_path, second).fit(again, loader(), ckpt_path=tmp_path / "kept" / "kept.ckpt")
    assert second.watcher is not None
    assert second.watcher.run == path
    assert len(Run(path).sessions()) == 2
    raw = by_hand(tmp_path / "raw", Net())
    assert_same_numbers(Run(path), raw)
    assert points(Run(path), "train_loss") == points(raw, "train_loss")


def test_a_gan_resumes_at_its_own_count(tmp_path: Path) -> None:
    keeping = ModelCheckpoint(tmp_path / "kept", filename="kept")
    first = LayerwatchCallback(tmp_path / "run", every=1)
    trainer(tmp_path, first, keeping, max_epochs=1, enable_checkpointing=True).fit(Gan(), loader())
    second = LayerwatchCallback(tmp_path / "run", every=1)
    trainer(tmp_path, second).fit(Gan(), loader(), ckpt_path=tmp_path / "kept" / "kept.ckpt")
    assert steps_of(tmp_path / "run") == list(range(2 * BATCHES))


def test_fit_twice(tmp_path: Path) -> None:
    """The same module goes on after its last step; another one gets a run of its own."""
    callback = LayerwatchCallback(tmp_path / "run", every=1)
    model = Net()
    fitting = trainer(tmp_path, callback, max_epochs=1)
    fitting.fit(model, loader())
    fitting.fit_loop.max_epochs = 2
    fitting.fit(model, loader())
    assert steps_of(tmp_path / "run") == list(range(2 * BATCHES))
    trainer(tmp_path, callback, max_epochs=1).fit(Net(), loader())
    assert steps_of(tmp_path / "run-2") == list(range(BATCHES))
    with pytest.raises(RunError, match="exists already"):
        trainer(tmp_path, LayerwatchCallback(tmp_path / "run")).fit(Net(), loader())


def test_an_error_of_the_users(tmp_path: Path) -> None:
    callback = LayerwatchCallback(tmp_path / "run", every=1)
    model = Net()
    model.fails_at = 3
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, callback).fit(model, loader())
    assert steps_of(tmp_path / "run") == [0, 1, 2]
    assert Run(tmp_path / "run").info["closed"]
    model.fails_at = -1
    trainer(tmp_path, callback, max_epochs=1).fit(model, loader())  # not watched any more: can be again
    assert steps_of(tmp_path / "run") == list(range(3 + BATCHES))


def test_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise AttributeError("Lightning has changed")

    monkeypatch.setattr(hook, "_take", broken)
    model = Net()
    trainer(tmp_path, LayerwatchCallback(tmp_path / "run", every=1)).fit(model, loader())
    monkeypatch.undo()
    assert [r.message for r in caplog.records if "stopped watching" in r.message] != []
    alone = Net()
    trainer(tmp_path).fit(alone, loader())
    assert_same_weights(model, alone)


def test_evaluating_afterwards_is_not_training(tmp_path: Path) -> None:
    fitting = trainer(tmp_path, LayerwatchCallback(tmp_path / "run"), max_epochs=1)
    model = Reporting()
    fitting.fit(model, loader(), loader())
    fitting.validate(model, loader(), verbose=False)
    assert len(Run(tmp_path / "run").scalars("val_loss")) == 1


# Which Lightning --------------------------------------------------------------------------------------------


def test_the_other_name_of_lightning(tmp_path: Path) -> None:
    import pytorch_lightning

    class Old(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def training_step(self, data: list[Tensor], index: int) -> Tensor:
            return loss_of(self.layer(data[0]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    callback = LayerwatchCallback(tmp_path / "run", every=1)
    assert isinstance(callback, pytorch_lightning.Callback)
    assert isinstance(callback, pl.Callback)
    trainer(tmp_path, callback, package=pytorch_lightning, max_epochs=1).fit(Old(), loader())
    assert steps_of(tmp_path / "run") == list(range(BATCHES))
    assert len(Run(tmp_path / "run").scalars("train_loss")) == BATCHES


def test_nothing_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, layerwatch.hooks.lightning as hook\n"
        "assert not {'lightning', 'pytorch_lightning'} & sys.modules.keys()\n"
        "sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "try:\n"
        "    hook.LayerwatchCallback()\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = "layerwatch.hooks.lightning needs Lightning: pip install 'layerwatch[lightning]'"
    assert done.stdout.strip() == expected


def test_an_old_version_is_told_and_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pl, "__version__", "1.9.5")
    with caplog.at_level(logging.WARNING, "layerwatch"):
        trainer(tmp_path, LayerwatchCallback(tmp_path / "run", every=1), max_epochs=1).fit(Net(), loader())
    assert "made for Lightning 2.0 or newer, and this is lightning.pytorch 1.9.5" in caplog.text
    assert steps_of(tmp_path / "run") == list(range(BATCHES))


def test_it_can_be_pickled(tmp_path: Path) -> None:
    """As for the processes that a strategy spawns."""
    callback = pickle.loads(pickle.dumps(LayerwatchCallback(tmp_path / "run", every=2)))
    trainer(tmp_path, callback, max_epochs=1).fit(Net(), loader())
    assert steps_of(tmp_path / "run") == [0, 2, 3]
    assert callback.state_key == "LayerwatchCallback"


def test_two_processes_that_the_trainer_starts(tmp_path: Path) -> None:
    """Without a name for the run, and without a launcher that names the job."""
    here = Path(__file__).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here.parents[1]}{os.pathsep}{here}"}
    script = here / "lightning_ranks.py"
    subprocess.run([sys.executable, "-W", "ignore", script], cwd=tmp_path, env=env, check=True, timeout=150)
    (path,) = (tmp_path / "runs").iterdir()
    run = Run(path)
    assert list(run.ranks()["last_step"]) == [3, 3]
    assert set(run.stats("weight").groupby("tensor").size()) == {4}
    assert run.checksums().groupby(["step", "tensor"])["checksum"].nunique().max() == 1
    assert not [p for p in (path / "stats").iterdir() if p.name.startswith("r1") and len(pd.read_parquet(p))]
