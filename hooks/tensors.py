"""Which tensors a model has: canonical names, roles, aliases, and the state each is in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

#: Prefixes that wrappers (DDP, compile, FSDP, checkpointing) put into names.
_WRAPPERS = re.compile(
    r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)


def canonical(name: str) -> str:
    """A parameter's name without what wrappers add.

    >>> canonical("module._orig_mod.layers.0.weight")
    'layers.0.weight'
    """
    return _WRAPPERS.sub("", name)


@dataclass
class WatchedTensor:
    """One parameter, under the first of its names."""

    name: str
    parameter: nn.Parameter
    role: str
    module: str
    module_type: str
    names: list[str] = field(default_factory=list)

    def entry(self) -> dict[str, Any]:
        """For run.json."""
        lazy = isinstance(self.parameter, UninitializedParameter)
        return {
            "tensor": self.name,
            "names": self.names,
            "role": self.role,
            "shape": [] if lazy else list(self.parameter.shape),
            "elements": 0 if lazy else self.parameter.numel(),
            "dtype": str(self.parameter.dtype).removeprefix("torch."),
            "module": self.module,
            "module_type": self.module_type,
            "trainable": self.parameter.requires_grad,
            "state": "trainable" if self.parameter.requires_grad else "frozen",
        }


def model_names(models: Sequence[nn.Module]) -> list[str]:
    """A prefix per model: none for one model; class names, numbered when they repeat, for several."""
    if len(models) == 1:
        return [""]
    kinds = [type(m).__name__ for m in models]
    return [f"{k}." if kinds.count(k) == 1 else f"{k}{kinds[:i].count(k)}." for i, k in enumerate(kinds)]


def watched_tensors(models: Sequence[nn.Module]) -> list[WatchedTensor]:
    """Every parameter once, in order of definition; a tied parameter carries all its names."""
    found: dict[int, WatchedTensor] = {}
    names: dict[str, int] = {}
    for prefix, model in zip(model_names(models), models, strict=True):
        modules = dict(model.named_modules(remove_duplicate=False))
        for raw, parameter in model.named_parameters(remove_duplicate=False):
            name = prefix + canonical(raw)
            if names.setdefault(name, id(parameter)) != id(parameter):
                name = prefix + raw  # a user's own part is called `module`: two names would be one
            if id(parameter) in found:
                if name not in found[id(parameter)].names:
                    found[id(parameter)].names.append(name)
                continue
            owner = raw.rpartition(".")[0]
            role = role_of(raw, parameter, modules.get(owner))
            module = prefix + canonical(owner + ".").removesuffix(".") if owner else prefix.removesuffix(".")
            kind = type(modules.get(owner)).__name__
            found[id(parameter)] = WatchedTensor(name, parameter, role, module, kind, [name])
    tensors = list(found.values())
    matrices = [t for t in tensors if t.role == "matrix"]
    if matrices:
        matrices[-1].role = "output"
    return tensors


def role_of(name: str, parameter: Tensor, module: nn.Module | None) -> str:
    """matrix, conv, bias, norm_gain, norm_bias, embedding, lora_a, lora_b, scalar or other.

    The owning module's type decides where name and shape cannot.
    """
    leaf = name.rpartition(".")[2]
    kind = type(module).__name__.lower()
    if "norm" in kind and "parametri" not in kind:
        return "norm_bias" if leaf == "bias" else "norm_gain"
    if "embedding" in kind:
        return "embedding"
    for lora in ("lora_a", "lora_b"):
        if lora in name.lower():
            return lora
    if leaf.startswith("bias") or leaf.endswith("bias"):
        return "bias"
    if isinstance(parameter, UninitializedParameter):
        return "conv" if "conv" in kind else "matrix"
    if "conv" in kind and parameter.ndim >= 3:
        return "conv"
    if parameter.ndim >= 2:
        return "matrix"
    return "scalar" if parameter.numel() == 1 else "other"


def leaf_modules(models: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Canonical name and module of every module without children, each once, in order of definition.

    Compiled and scripted parts are left out: nothing inside them can be seen.
    """
    seen: set[int] = set()
    for prefix, model in zip(model_names(models), models, strict=True):
        stack = [("", model)]
        while stack:
            raw, module = stack.pop()
            if id(module) in seen or is_opaque(module):
                continue
            seen.add(id(module))
            children = [(f"{raw}.{name}" if raw else name, child) for name, child in module.named_children()]
            stack.extend(reversed(children))
            if not children:
                yield (prefix + canonical(f"{raw}.")).strip(".") or type(module).__name__, module


def is_opaque(module: nn.Module) -> bool:
    """Compiled (by torch.compile or in place) or scripted: forward hooks inside would not fire."""
    compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    return compiled or isinstance(module, torch.jit.ScriptModule)


def is_sharded(parameter: Tensor) -> bool:
    """A DTensor: this process holds a part of it."""
    return hasattr(parameter, "placements") and hasattr(parameter, "to_local")


def ready(tensors: Sequence[WatchedTensor]) -> list[WatchedTensor]:
    """Those whose values this process holds, whole: not lazy, not on the meta device, not sharded."""
    return [
        t
        for t in tensors
        if not isinstance(t.parameter, UninitializedParameter)
        and t.parameter.device.type != "meta"
        and not is_sharded(t.parameter)
    ]


def state_of(parameter: nn.Parameter, learning_rate: float | None, gradient_is_zero: bool) -> str:
    """The six states of a parameter, most decisive first.

    frozen (requires_grad is off), no_optimizer (in no param group), lr_zero, unused (no gradient arrived),
    zero_gradient (it is exactly zero), trainable.
    """
    if not parameter.requires_grad:
        return "frozen"
    if learning_rate is None:
        return "no_optimizer"
    if learning_rate == 0:
        return "lr_zero"
    if parameter.grad is None:
        return "unused"
    return "zero_gradient" if gradient_is_zero else "trainable"


def learning_rates(optimizers: Sequence[torch.optim.Optimizer]) -> dict[int, float]:
    """id of each parameter in a param group -> its group's learning rate."""
    return {
        id(p): float(group.get("lr", 1.0))
        for o in optimizers
        for group in o.param_groups
        for p in group["params"]
    }
