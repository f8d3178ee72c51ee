"""Keras 3 on torch: the numbers are those that Keras computed, the names those of the same torch network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trainings import column, failures, norm

from layerwatch import Run, watch

os.environ["KERAS_BACKEND"] = "torch"

import keras
from keras import layers, ops

from layerwatch.hooks.keras import LayerwatchCallback, check

#: Keras's variables as arrays, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

BATCHES, EPOCHS = 4, 2
X = np.random.default_rng(0).normal(size=(BATCHES * 8, 8)).astype("float32")
Y = (X[:, :3] ** 2 - 1).astype("float32")
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.fixture(autouse=True)
def _plain_precision() -> Iterator[None]:
    yield
    keras.mixed_precision.set_global_policy("float32")


def dense(dropout: float = 0.0, **options: Any) -> Any:
    keras.utils.set_random_seed(0)
    middle = layers.Dropout(dropout) if dropout else layers.ReLU()
    return keras.Sequential([keras.Input((8,)), layers.Dense(16, **options), middle, layers.Dense(3)])


def fit(model: Any, *callbacks: Any, optimizer: Any = None, epochs: int = EPOCHS, **options: Any) -> Any:
    if optimizer is not None:
        model.compile(optimizer, loss="mse", metrics=["mae"])
    defaults = {"batch_size": 8, "shuffle": False, "verbose": 0}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **{**defaults, **options})


def steps_of(path: Path) -> list[int]:
    return sorted(set(Run(path).stats("weight")["step"]))


def points(run: Run, name: str) -> list[tuple[int, float]]:
    found = run.scalars(name)
    return list(zip(found["step"].tolist(), found["value"].tolist(), strict=True))


class Truth(keras.callbacks.Callback):
    """What Keras did: the weights around each batch and the gradients in it, by variable."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[list[Tensor]] = []
        self.gradients: list[list[Tensor]] = []
        self.before: list[list[Tensor]] = []

    def trained(self) -> list[Any]:
        model: Any = self.model
        return model.trainable_variables

    def _now(self) -> list[Tensor]:
        return [v.value.detach().clone() for v in self.trained()]

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.before.append(self._now())

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.weights.append(self._now())
        self.gradients.append([v.value.grad.clone() for v in self.trained()])


#: name -> optimizer, micro-batches of a step, factor of the loss, precision
HOW: dict[str, tuple[Callable[[], Any], int, float, str]] = {
    "SGD": (lambda: keras.optimizers.SGD(0.1, momentum=0.9), 1, 1.0, "float32"),
    "clipping": (lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.1), 1, 1.0, "float32"),
    "decay and average": (
        lambda: keras.optimizers.AdamW(0.01, use_ema=True, ema_overwrite_frequency=3), 1, 1.0, "float32",
    ),
    "accumulation": (
        lambda: keras.optimizers.Adam(0.01, clipvalue=0.01, gradient_accumulation_steps=2), 2, 1.0, "float32",
    ),
    "scaled accumulation": (
        lambda: keras.optimizers.SGD(0.01, gradient_accumulation_steps=4, loss_scale_factor=8.0),
        4, 8.0, "float32",
    ),
    "mixed_bfloat16": (lambda: keras.optimizers.RMSprop(0.01), 1, 1.0, "mixed_bfloat16"),
    "mixed_float16": (
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01), initial_scale=2.0**8),
        1, 2.0**8, "mixed_float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", HOW)
def test_the_numbers_are_those_of_keras(tmp_path: Path, how: str) -> None:
    make, parts, scale, precision = HOW[how]
    keras.mixed_precision.set_global_policy(precision)
    callback, truth = LayerwatchCallback(tmp_path / "run", every=1), Truth()
    history = fit(dense(), callback, truth, optimizer=make()).history
    alone = dense()
    assert fit(alone, optimizer=make()).history == history
    run = Run(tmp_path / "run")
    assert callback.watcher is not None
    assert failures(callback.watcher) == ""
    count = BATCHES * EPOCHS // parts
    assert steps_of(tmp_path / "run") == list(range(count))
    for i, name in enumerate(NAMES):
        for step in range(count):
            batches = range(parts * step, parts * (step + 1))
            weight, before = truth.weights[batches[-1]][i], truth.before[batches[-1]][i]
            gradient = sum(truth.gradients[b][i].double() for b in batches) / parts / scale
            assert isinstance(gradient, Tensor)
            for kind, expected in (("weight", weight), ("gradient", gradient), ("update", weight - before)):
                found = column(run, kind, "norm", name)[step]
                assert found == pytest.approx(norm(expected), rel=1e-5, abs=1e-9), (kind, name, step)
    means = [value for _, value in points(run, "train_loss_epoch")]
    assert means == pytest.approx(history["loss"])
    losses = [value for _, value in points(run, "train_loss")]
    assert [np.mean(half) for half in np.split(np.array(losses), EPOCHS)] == pytest.approx(means, rel=1e-3)
    assert set(alone.optimizer.__dict__) & {"apply"} == set()


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    """With dropout, a shuffle and validation, so that one random number too many would show."""

    def trained(*callbacks: Any) -> tuple[Any, list[Any]]:
        model = dense(0.3)
        how = {"shuffle": True, "validation_data": (X, Y)}
        return fit(
            model, *callbacks, optimizer=keras.optimizers.Adam(0.01), **how
        ).history, model.get_weights()

    everything = {"every": 1, "step_norms": True, "anchors": 2}
    history, weights = trained(LayerwatchCallback(tmp_path / "run", **everything))
    again, others = trained()
    assert history == again
    assert all(np.array_equal(a, b) for a, b in zip(weights, others, strict=True))
    run = Run(tmp_path / "run")
    kinds = {"weight", "gradient", "update", "drift", "activation", "second_moment", "momentum"}
    assert kinds <= set(run.kinds())
    assert points(run, "val_loss") == [
        (BATCHES * (e + 1) - 1, pytest.approx(loss)) for e, loss in enumerate(history["val_loss"])
    ]
    assert [value for _, value in points(run, "mae")] == pytest.approx(history["mae"])
    config = run.info["config"]
    assert config["optimizer"] == "Adam"
    assert config["learning_rate"] == pytest.approx(0.01)
    assert config["epochs"] == EPOCHS


# The same network in torch ----------------------------------------------------------------------------------


def images() -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)), layers.Conv2D(4, 3),
            layers.BatchNormalization(momentum=0.9, epsilon=1e-5),
            layers.ReLU(), layers.GlobalAveragePooling2D(), layers.Dense(3),
        ]
    )  # fmt: skip


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def test_the_same_network_in_torch(tmp_path: Path) -> None:
    """Names, shapes and roles are equal; single weights are at the same places."""
    model = images()
    other: Any = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Pool(), nn.Linear(4, 3))
    with torch.no_grad():
        weights = [torch.from_numpy(np.array(w)) for w in model.get_weights()]
        other[0].weight.copy_(weights[0].permute(3, 2, 0, 1))
        other[4].weight.copy_(weights[-2].T)
    for layer in (other[0], other[4]):
        nn.init.zeros_(layer.bias)
    x = np.random.default_rng(1).normal(size=(32, 6, 6, 2)).astype("float32")
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    callback = LayerwatchCallback(tmp_path / "keras", every=1)
    model.fit(x, Y, batch_size=8, epochs=1, shuffle=False, verbose=0, callbacks=[callback])
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    with watch(other, optimizer, run=tmp_path / "torch", every=1):
        for a, b in zip(torch.from_numpy(x).split(8), torch.from_numpy(Y).split(8), strict=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(other(a.permute(0, 3, 1, 2)), b).backward()
            optimizer.step()
    ours, theirs = Run(tmp_path / "keras"), Run(tmp_path / "torch")
    columns = ["tensor", "names", "role", "module", "trainable"]
    assert ours.tensors()[columns].equals(theirs.tensors()[columns])
    assert [list(s) for s in ours.tensors()["shape"]] == [list(s) for s in theirs.tensors()["shape"]]
    assert list(ours.modules()["module"]) == list(theirs.modules()["module"])
    for kind in ("weight", "gradient", "update", "activation"):
        key = ["step", "tensor"]
        a, b = (run.stats(kind).sort_values(key, ignore_index=True) for run in (ours, theirs))
        assert a[key].equals(b[key])
        # a bias before a normalisation gets no gradient but rounding
        assert np.allclose(a["norm"], b["norm"], rtol=1e-3, atol=1e-6), kind
    for name in ("0.weight", "4.weight"):
        (_, a), (_, b) = ours.values(name), theirs.values(name)
        assert np.allclose(a[-1], b[-1], atol=1e-5)


# Names ------------------------------------------------------------------------------------------------------


class Blocks(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.first = layers.Dense(4)
        self.blocks = [layers.Dense(4), layers.LayerNormalization()]
        self.cells = layers.LSTM(5)
        self.wrapped = keras.layers.TorchModuleWrapper(nn.Linear(5, 3))
        self.shift = self.add_weight(shape=(3,), initializer="zeros")

    def call(self, x: Any) -> Any:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.wrapped(self.cells(ops.expand_dims(x, 1))) + self.shift


def functional() -> Any:
    entry = keras.Input((8,))
    shared = layers.Dense(8)
    x = layers.Dense(8, name="stem")(entry)
    x = layers.Dense(8)(shared(shared(x)))
    return keras.Model(entry, layers.Dense(3, name="head")(x))


MADE: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "functional": (
        functional,
        [f"{layer}.{leaf}" for layer in ("stem", "dense", "dense_1", "head") for leaf in ("weight", "bias")],
    ),
    "subclassed": (
        Blocks,
        [
            "variable", "first.weight", "first.bias", "blocks.0.weight", "blocks.0.bias", "blocks.1.weight",
            "blocks.1.bias", "cells.cell.weight", "cells.cell.recurrent_kernel", "cells.cell.bias",
            "wrapped.weight", "wrapped.bias",
        ],
    ),
    "nested": (
        lambda: keras.Sequential([keras.Input((8,)), dense(), layers.Dense(3)]),
        [*(f"0.{name}" for name in NAMES), "1.weight", "1.bias"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("made", MADE)
def test_names_do_not_depend_on_what_was_made_before(tmp_path: Path, made: str) -> None:
    make, names = MADE[made]
    for i in range(2):
        callback = LayerwatchCallback(tmp_path / str(i), every=1)
        fit(make(), callback, optimizer=keras.optimizers.SGD(0.01), epochs=1)
        assert callback.watcher is not None
        assert failures(callback.watcher) == ""
        run = Run(tmp_path / str(i))
        assert sorted(run.tensors()["tensor"]) == sorted(names)
        assert sorted(set(run.stats("gradient")["tensor"])) == sorted(names)
        assert (run.tensors()["names"].map(len) == 1).all()
        assert set(run.stats("activation")["step"]) == set(range(BATCHES))


def test_frozen_layers(tmp_path: Path) -> None:
    callback = LayerwatchCallback(tmp_path / "run", every=1)
    model = dense(trainable=False)
    fit(model, callback, optimizer=keras.optimizers.SGD(0.01), epochs=1)
    states = dict(Run(tmp_path / "run").tensors()[["tensor", "state"]].itertuples(index=False))
    assert states == {
        "0.weight": "frozen",
        "0.bias": "frozen",
        "2.weight": "trainable",
        "2.bias": "trainable",
    }
    model.layers[0].trainable = True
    fit(model, callback, optimizer=keras.optimizers.SGD(0.01), epochs=1)
    assert set(Run(tmp_path / "run").tensors()["state"]) == {"trainable"}
    assert steps_of(tmp_path / "run") == list(range(2 * BATCHES))


# More than the usual training -------------------------------------------------------------------------------


class Gan(keras.Model):
    """Two optimizers in a train_step of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = layers.Dense(8), layers.Dense(1)
        self.generator.build((None, 8))
        self.critic.build((None, 8))
        self.first, self.second = keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.01)

    def call(self, x: Any) -> Any:
        return self.critic(self.generator(x))

    def train_step(self, data: Any) -> dict[str, Any]:
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        losses = {}
        for name, optimizer, layer, sign in (
            ("critic_loss", self.first, self.critic, 1.0),
            ("generator_loss", self.second, self.generator, -1.0),
        ):
            self.zero_grad()
            loss: Any = sign * self(x).mean() - (sign > 0) * self.critic(x).mean()
            losses[name] = loss
            loss.backward()
            variables = layer.trainable_weights
            self.seen.append({v.path: norm(v.value.grad) for v in variables})
            with torch.no_grad():
                optimizer.apply([v.value.grad for v in variables], variables)
        return {name: loss.detach() for name, loss in losses.items()}

    seen: list[dict[str, float]]


def test_two_optimizers(tmp_path: Path) -> None:
    model: Any = Gan()
    object.__setattr__(model, "seen", [])  # not for Keras to track
    model.compile(optimizer=None)
    callback = LayerwatchCallback(tmp_path / "run", every=1)
    model.fit(X, Y, batch_size=8, epochs=1, shuffle=False, verbose=0, callbacks=[callback])
    run = Run(tmp_path / "run")
    assert steps_of(tmp_path / "run") == list(range(BATCHES))
    for which, name in enumerate(("critic", "generator")):
        expected = [next(n for path, n in seen.items() if "kernel" in path) for seen in model.seen[which::2]]
        found = column(run, "gradient", "norm", f"{name}.weight")
        assert list(found.values()) == pytest.approx(expected)
    assert {o["class"] for o in run.info["optimizers"]} == {"KerasAdam", "KerasSGD"}
    assert len(points(run, "critic_loss")) == 1
    assert run.scalars("train_loss").empty


def test_a_loss_scaler_skips_a_step(tmp_path: Path) -> None:
    keras.mixed_precision.set_global_policy("mixed_float16")
    scaling = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=2.0**15)
    x = X.copy()
    x[8:16] *= 100.0  # of the second batch
    callback = LayerwatchCallback(tmp_path / "run", every=1)
    model = dense()
    model.compile(scaling, loss="mse")
    model.fit(x, Y, batch_size=8, epochs=1, shuffle=False, verbose=0, callbacks=[callback])
    weights = Run(tmp_path / "run").stats("weight")
    assert set(weights["step"]) == set(range(BATCHES))
    assert set(weights.loc[weights["skipped"], "step"]) == {1}
    assert int(scaling.inner_optimizer.iterations) == BATCHES - 1


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by the compiler
def test_a_compiled_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By a backend that compiles nothing, but runs what was traced; the tracing takes its time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    callback, truth = LayerwatchCallback(tmp_path / "run", every=1), Truth()
    model = dense()
    model.compile(keras.optimizers.SGD(0.01), loss="mse", jit_compile=True)
    fit(model, callback, truth, epochs=1)
    torch.compiler.reset()
    assert "neither updates nor activations" in caplog.text
    run = Run(tmp_path / "run")
    assert not {"update", "activation"} & set(run.kinds())
    for kind, expected in (("weight", truth.weights), ("gradient", truth.gradients)):
        found = column(run, kind, "norm", "0.weight")
        assert list(found.values()) == pytest.approx([norm(tensors[0]) for tensors in expected])


# Once more, interrupted, elsewhere --------------------------------------------------------------------------


def test_fit_twice_and_from_a_file(tmp_path: Path) -> None:
    callback = LayerwatchCallback(tmp_path / "run", every=1)
    model = dense()
    fit(model, callback, optimizer=keras.optimizers.Adam(0.01), epochs=1)
    fit(model, callback, epochs=1)
    assert steps_of(tmp_path / "run") == list(range(2 * BATCHES))
    model.save(tmp_path / "model.keras")
    fit(model, callback, epochs=1)
    fit(dense(), callback, optimizer=keras.optimizers.Adam(0.01), epochs=1)
    assert steps_of(tmp_path / "run") == list(range(3 * BATCHES))
    assert steps_of(tmp_path / "run-2") == list(range(BATCHES))
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    fit(loaded, LayerwatchCallback(tmp_path / "run", every=1), epochs=2)  # as a new process would
    assert steps_of(tmp_path / "run") == list(range(4 * BATCHES))
    assert (
        "goes on at step 8" in Run(tmp_path / "run").events().query("event == 'restart'")["message"].iloc[-1]
    )


def test_an_error_of_the_users(tmp_path: Path) -> None:
    class Fails(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 2:
                raise ZeroDivisionError

    callback, model = LayerwatchCallback(tmp_path / "run", every=1), dense()
    with pytest.raises(ZeroDivisionError):
        fit(model, callback, Fails(), optimizer=keras.optimizers.SGD(0.01))
    assert steps_of(tmp_path / "run") == [0, 1, 2]
    fit(model, callback, epochs=1)
    assert steps_of(tmp_path / "run") == list(range(3 + BATCHES))
    assert "apply" not in vars(model.optimizer)


def test_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from layerwatch.hooks import keras_steps

    def broken(*_: Any) -> Any:
        raise AttributeError("Keras has changed")

    callback, model, alone = LayerwatchCallback(tmp_path / "run", every=1), dense(), dense()
    monkeypatch.setattr(keras_steps.Stand, "show", broken)
    fit(model, callback, optimizer=keras.optimizers.SGD(0.01))
    fit(alone, optimizer=keras.optimizers.SGD(0.01))
    assert "stopped watching" in caplog.text
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), alone.get_weights(), strict=True))


def test_what_cannot_be_watched_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"Keras 3 or newer, and this is Keras 2\.15\.0"):
        check("2.15.0", "torch")
    model = dense()
    model.compile(optimizer=None)
    callback = LayerwatchCallback(tmp_path / "run")
    callback.set_model(model)
    with pytest.raises(ValueError, match=r"layerwatch\.watch\(model\)"):
        callback.on_epoch_begin(0)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(
        RuntimeError, match="this is the jax backend: set the environment variable KERAS_BACK"
    ):
        LayerwatchCallback(tmp_path / "run")


def test_without_keras() -> None:
    code = "import sys\nsys.modules['keras'] = None\nimport layerwatch.hooks.keras\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: layerwatch.hooks.keras needs Keras: pip install 'layerwatch[keras]'" in done.stderr
