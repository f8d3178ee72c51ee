"""Which modules of this process are being trained, when nobody says."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def owned_by(optimizers: Iterable[Optimizer]) -> dict[int, int]:
    """id of each trainable parameter in their groups -> its place in their order."""
    parameters = (p for o in optimizers for group in o.param_groups for p in group["params"])
    return {id(p): place for place, p in enumerate(parameters) if p.requires_grad}


def reached_by(root: Tensor | None) -> dict[int, int]:
    """The same for the leaves that backward on `root` gives a gradient."""
    found: dict[int, int] = {}
    seen, stack = set(), [root.grad_fn if root is not None else None]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack.extend(f for f, _ in node.next_functions)
        if hasattr(node, "variable"):
            found.setdefault(id(node.variable), len(found))
    return found


def find_models(wanted: Mapping[int, int]) -> list[nn.Module]:
    """The outermost modules that hold these parameters, in the order of the parameters.

    All living modules are looked at (a fraction of a second). Of several outermost modules that hold the same
    parameters one is enough: a user's own before torch's wrappers, those before what a compiler has made.
    """
    found = _outermost(wanted)
    if len(found) > 1:  # one may have been thrown away
        del found
        gc.collect()
        found = _outermost(wanted)
    return found


def _outermost(wanted: Mapping[int, int]) -> list[nn.Module]:
    modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module)]
    inner = {id(c) for m in modules if not isinstance(m, torch.fx.GraphModule) for c in _children(m)}
    held = {i: _held(m, wanted) for i, m in enumerate(modules) if id(m) not in inner}

    def order(i: int) -> tuple[int, bool, bool, int]:
        module = modules[i]
        made = isinstance(module, torch.fx.GraphModule)
        return -len(held[i]), made, type(module).__module__.startswith("torch."), i

    chosen, covered = [], set()
    for i in sorted((i for i in held if held[i]), key=order):
        if not covered >= held[i].keys():
            covered |= held[i].keys()
            chosen.append(i)
    return [modules[i] for i in sorted(chosen, key=lambda i: min(held[i].values()))]


def _children(module: nn.Module) -> Sequence[nn.Module]:
    try:
        return list(module.children())
    except Exception:  # its own __init__ has not run, or it is no ordinary one
        return ()


def _held(module: nn.Module, wanted: Mapping[int, int]) -> dict[int, int]:
    try:
        return {id(p): wanted[id(p)] for p in module.parameters() if id(p) in wanted}
    except Exception:
        return {}
