"""Trainings of one configuration with different seeds, made without torch, for the tests of baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerwatch.monitor.detectors import Arrays, History

Change = Callable[[str, str, NDArray[np.int64], NDArray[np.float64]], NDArray[np.float64]]


def seed_run(
    seed: int, *, steps: int = 200, every: int = 1, layers: int = 5, width: int = 16,
    change: Change = lambda signal, name, steps, values: values, name: str = "",
) -> Arrays:  # fmt: skip
    """A training whose numbers are those of all seeds, but for an offset of the seed, a slow drift and noise.

    `change` may alter any of them: signal (gradient, update, weight, activation, train_loss, val_loss).
    """
    rng = np.random.default_rng([seed, 77])
    at = np.arange(0, steps, every)
    entries: list[dict[str, Any]] = [
        {"tensor": f"{i}.{part}", "module": str(i), "role": "matrix" if part == "weight" else "bias",
         "shape": [width, width] if part == "weight" else [width]}
        for i in range(layers) for part in ("weight", "bias")
    ]  # fmt: skip
    common = 0.05 * rng.standard_normal()
    course = {
        "gradient": lambda at: np.exp(-at / 150), "update": lambda at: 1e-3 * np.exp(-at / 400),
        "weight": lambda at: 5 + at / 100, "activation": lambda at: 1 + at / 300,
    }  # fmt: skip
    sizes = {
        "gradient": (0.1, 0.2),
        "update": (0.06, 0.12),
        "weight": (0.02, 0.0),
        "activation": (0.05, 0.05),
    }
    rows: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in course}
    for kind, (between, noise) in sizes.items():
        names = [str(i) for i in range(layers)] if kind == "activation" else [e["tensor"] for e in entries]
        for layer in names:
            wide = 2.0 if layer.endswith("bias") else 1.0
            slow = np.cumsum(rng.standard_normal(at.size)) / np.sqrt(at.size) * 0.5 * between * wide
            offset = wide * between * rng.standard_normal() + slow + noise * rng.standard_normal(at.size)
            values = change(kind, layer, at, course[kind](at) * np.exp(offset + between * common))
            column = {"update": "ratio", "activation": "rms"}.get(kind, "norm")
            rows[kind][layer] = {"step": at, column: values}
    every_step, evaluations = np.arange(steps), np.arange(9, steps, 10)
    end = 0.4 * np.exp(0.03 * rng.standard_normal())
    losses: Any = {
        name: (where, change(name, "", where, (end + 2 * np.exp(-where / 40)) * np.exp(spread * noise)))
        for name, where, spread, noise in (
            ("train_loss", every_step, 0.1, rng.standard_normal(steps)),
            ("val_loss", evaluations, 0.02, rng.standard_normal(evaluations.size)),
        )
    }
    leaves = [{"module": str(i), "type": "Linear"} for i in range(layers)]
    return Arrays(name=name or f"seed{seed}", losses=losses, layers=entries, leaves=leaves, rows=rows)


def history(seed: int, **options: Any) -> History:
    return History(seed_run(seed, **options))


def scaled(signal: str, name: str, since: int, factor: float) -> Change:
    """One signal of one layer times `factor` from a step on."""

    def change(
        kind: str, layer: str, at: NDArray[np.int64], values: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        return np.where((at >= since) & (kind == signal) & (layer == name), values * factor, values)

    return change


def both(*changes: Change) -> Change:
    def change(
        kind: str, layer: str, at: NDArray[np.int64], values: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        for one in changes:
            values = one(kind, layer, at, values)
        return values

    return change
