"""Keras 3 on torch, with one more callback: python examples/keras_callback.py

The log has the names and the layout of the same network in torch, so that both can be compared.
"""

from __future__ import annotations

import os

import numpy as np

from layerwatch import Run

os.environ["KERAS_BACKEND"] = "torch"  # before keras is imported

import keras
from keras import layers

from layerwatch.hooks.keras import LayerwatchCallback

keras.utils.set_random_seed(0)
points = np.random.default_rng(0).normal(size=(2048, 2)).astype("float32")
inside = (np.linalg.norm(points, axis=1) < 1).astype("float32")[:, None]

model = keras.Sequential(
    [keras.Input((2,)), layers.Dense(32), layers.ReLU(), layers.Dense(1, activation="sigmoid")]
)
model.compile(keras.optimizers.Adam(0.01, clipnorm=1.0), loss="binary_crossentropy", metrics=["accuracy"])
model.fit(
    points,
    inside,
    batch_size=64,
    epochs=5,
    validation_split=0.2,
    verbose=0,  # type: ignore[arg-type]
    callbacks=[LayerwatchCallback(run="runs/keras", every=10)],
)

run = Run("runs/keras")
accuracy = run.scalars("val_accuracy")["value"]
print(f"{run.last_step + 1} steps, val_accuracy {accuracy.iloc[0]:.2f} to {accuracy.iloc[-1]:.2f}")
print(run.tensors()[["tensor", "shape", "role"]].to_string(index=False))
