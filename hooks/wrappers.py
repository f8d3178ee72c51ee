"""What frameworks wrap around models and optimizers."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The one whose step changes the weights.

    The wrappers of Accelerate, Lightning and Fabric are an `Optimizer` by their class only: they have no
    hooks of their own, and Accelerate's step() does nothing on micro-steps.
    """
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer) and not takes_hooks(optimizer):
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer


def takes_hooks(optimizer: Optimizer) -> bool:
    """A wrapper that has not called `Optimizer.__init__` (DeepSpeed's, for one) takes none."""
    return "_optimizer_step_post_hooks" in vars(optimizer)


def inner_model(model: nn.Module) -> nn.Module:
    """The one that is called: Fabric's wrapper holds the user's model beside what a strategy made of it."""
    if "_forward_module" in model._modules and "_original_module" in model._modules:
        return model.get_submodule("_forward_module")
    return model
