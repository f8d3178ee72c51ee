"""Small networks and loops that know the truth, for the tests of the hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from layerwatch import Run, Watcher, watch

Weights = dict[str, Tensor]


def mlp(seed: int = 0, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))


def weights_of(model: nn.Module) -> Weights:
    """Copies of every parameter, under its own name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients_of(model: nn.Module) -> Weights:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def batch(step: int, size: int = 32, features: int = 8) -> Tensor:
    """The same data for the same step, whatever was drawn before."""
    return torch.randn(size, features, generator=torch.Generator().manual_seed(1000 + step))


def loss_of(output: Any) -> Tensor:
    """Something to minimise for any output."""
    tensor = output[0] if isinstance(output, tuple) else output
    return (tensor - 1).abs().square().mean()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 4,
    *,
    data: Callable[[int], Any] = batch,
    after_backward: Callable[[int], object] | None = None,
    after_step: Callable[[int], object] | None = None,
) -> None:
    """A plain loop; the callbacks look on, or clip."""
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model(data(step))).backward()
        if after_backward is not None:
            after_backward(step)
        optimizer.step()
        if after_step is not None:
            after_step(step)


def watched_training(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4, *, every: int | str = 1,
    watching: dict[str, Any] | None = None, **loop: Any,
) -> Run:  # fmt: skip
    """Train under watch and close: the run."""
    with watch(model, optimizer, run=path, every=every, **(watching or {})):
        train(model, optimizer, steps, **loop)
    return Run(path)


def norm(tensor: Tensor) -> float:
    """In double precision, by numpy."""
    return float(np.linalg.norm(tensor.detach().to(torch.float64).numpy().ravel()))


def column(run: Run, kind: str, name: str, tensor: str) -> dict[int, Any]:
    """step -> value of one column of `stats`."""
    frame = run.stats(kind, tensor)
    assert not frame["step"].duplicated().any()
    return dict(zip(frame["step"].tolist(), frame[name].tolist(), strict=True))


def failures(watcher: Watcher) -> str:
    """What errors.log holds: empty when nothing went wrong."""
    path = Path(watcher.run) / "errors.log"
    return path.read_text() if path.exists() else ""


def hooks_of(model: nn.Module) -> list[Any]:
    """Everything that is hooked into a model's modules."""
    return [
        hook
        for module in model.modules()
        for name, hooks in vars(module).items()
        if name.endswith("_hooks") and isinstance(hooks, dict)
        for hook in hooks.values()
    ]


NUMBERS = ["step", "tensor", "count", "norm", "mean", "std", "min", "max", "zeros", "skipped", "state"]


def assert_same_numbers(
    run: Run, raw: Run, kinds: Sequence[str] = ("weight", "gradient", "update", "activation")
) -> None:
    """Two logs of one training, by a framework and by a plain loop, hold the same rows, bit for bit."""
    for kind in kinds:
        expected = raw.stats(kind)[NUMBERS].sort_values(["step", "tensor"], ignore_index=True)
        assert len(expected) > 0, kind
        found = run.stats(kind)[NUMBERS].sort_values(["step", "tensor"], ignore_index=True)
        pd.testing.assert_frame_equal(found, expected, check_exact=True, obj=kind)
