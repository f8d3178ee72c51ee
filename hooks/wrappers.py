"""What frameworks wrap around optimizers."""

from __future__ import annotations

from torch.optim import Optimizer


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The one whose step changes the weights.

    Accelerate's wrapper is an `Optimizer` by its class only: its step() does nothing on micro-steps, and it
    has no hooks.
    """
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer) and not hasattr(optimizer, "_optimizer_step_post_hooks"):
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer
