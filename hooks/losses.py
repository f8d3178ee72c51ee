"""The training loss of a loop that logs none: what backward was called on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from .tensors import model_names

NAME = "train_loss"


class Losses:
    """Adds up the losses of a step: the numbers whose gradient the optimizer uses.

    A loss belongs to the optimizer that steps next. Where there are several models and that optimizer trains
    one of them (a GAN), it is logged as `train_loss/<name of the model>`; else as `train_loss`.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._models = models
        self._sums: dict[str, float | Tensor] = {}
        self._pending: float | Tensor | None = None  # of no optimizer yet
        self._names: dict[int, str] = {}

    def add(self, loss: float | Tensor) -> None:
        """Backward is called on this number."""
        self._pending = _sum(self._pending, loss)

    def stepped(self, optimizer: Optimizer, *, ours: bool) -> None:
        """This optimizer has used the gradients; `ours`: it trains one of the models."""
        if not ours:
            self._pending = None
        elif self._pending is not None:
            if id(optimizer) not in self._names:
                self._names[id(optimizer)] = self._name(optimizer)
            self._assign(self._names[id(optimizer)])

    def take(self, *, all_passes: bool) -> dict[str, float | Tensor]:
        """The step is over: its losses, by name. `all_passes`: with those that no optimizer has used."""
        if all_passes:
            self._assign(NAME)
        sums, self._sums = self._sums, {}
        return sums

    def _assign(self, name: str) -> None:
        if self._pending is not None:
            self._sums[name] = _sum(self._sums.get(name), self._pending)
            self._pending = None

    def _name(self, optimizer: Optimizer) -> str:
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = [
            prefix.removesuffix(".")
            for prefix, model in zip(model_names(self._models), self._models, strict=True)
            if any(id(p) in owned for p in model.parameters())
        ]
        return f"{NAME}/{names[0]}" if len(names) == 1 and len(self._models) > 1 else NAME


def _sum(a: float | Tensor | None, b: float | Tensor) -> float | Tensor:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        b = b.to(a.device)
    return b if a is None else a + b
