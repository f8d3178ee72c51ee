"""Which tensors a model has: canonical names, roles, aliases, and the state each is in.

A watched tensor is a registered parameter, and no other thing. Of a weight that is computed from others its
sources are watched, under the names that `named_parameters` gives them:
`parametrizations.weight.original` (spectral_norm, orthogonal and other parametrizations),
`parametrizations.weight.original0` and `.original1` (weight_norm's magnitude and direction), `weight_orig`,
`weight_g` and `weight_v` (the old torch.nn.utils functions of these names). Buffers are not watched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..monitor.weights.names import canonical
from .shards import Piece, is_sharded, local, pieces, summed

Patterns = str | Sequence[str] | None


@dataclass
class WatchedTensor:
    """One parameter, under the first of its names."""

    name: str
    parameter: nn.Parameter
    role: str
    module: str
    module_type: str
    names: list[str] = field(default_factory=list)
    mine: bool = True  # this process writes it, or its part of it
    piece: Piece | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor, wherever its parts are."""
        return tuple(self.parameter.shape) if self.piece is None else self.piece.shape

    @property
    def weight(self) -> Tensor:
        """What this process holds of it."""
        parameter = self.parameter
        return parameter if type(parameter) is nn.Parameter else local(parameter)

    @property
    def gradient(self) -> Tensor | None:
        """The same of its gradient; None too where that is still to be summed over ranks."""
        gradient = self.parameter.grad
        if gradient is None or type(gradient) is Tensor or not is_sharded(gradient):
            return gradient
        same = tuple(gradient.placements) == tuple(getattr(self.parameter, "placements", ()))  # type: ignore[attr-defined]
        return local(gradient) if same and summed(gradient) else None

    def entry(self) -> dict[str, Any]:
        """For run.json."""
        lazy = isinstance(self.parameter, UninitializedParameter)
        return {
            "tensor": self.name,
            "names": self.names,
            "role": self.role,
            "shape": [] if lazy else list(self.shape),
            "elements": 0 if lazy else math.prod(self.shape),
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


class Tensors(Sequence[WatchedTensor]):
    """The models' parameters that `include` and `exclude` choose, each once, in order of definition.

    `refresh` follows what happens to the models later. A name keeps its `WatchedTensor` and its role for as
    long as it exists: the parameter behind it may be replaced.

    Args:
        models: modules; their parts may change, the list may not.
        include, exclude: regular expressions on names; a tensor is watched when any of `include` (all when
            None) and none of `exclude` is found in it.

    Raises:
        ValueError: a pattern is no regular expression, or the patterns leave no tensor to watch.
    """

    def __init__(
        self, models: Sequence[nn.Module], include: Patterns = None, exclude: Patterns = None
    ) -> None:
        self._models = models
        self._include = None if include is None else _compiled(include)
        self._exclude = _compiled(exclude or ())
        self._all: dict[str, WatchedTensor] = {}
        self._scan()
        if self._all and not self._chosen:
            names = ", ".join(list(self._all)[:3])
            raise ValueError(
                f"include={include!r}, exclude={exclude!r} leave no tensor to watch: names are like {names}"
            )

    @overload
    def __getitem__(self, index: int) -> WatchedTensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[WatchedTensor]: ...
    def __getitem__(self, index: int | slice) -> WatchedTensor | list[WatchedTensor]:
        return self._chosen[index]

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[WatchedTensor]:
        return iter(self._chosen)

    def refresh(self) -> bool:
        """Follow the models; True when modules or parameters came, went, were replaced or materialised.

        A parameter whose `data` changes, as `model.to()` and `load_state_dict` usually do, is the same one.
        """
        # As cheap as Python allows, as this runs at every capture. Torch's registration hooks would cost
        # everybody who builds modules, and do not see what is written into `_parameters` and `_modules`.
        if (
            sum(map(len, self._tables)) == self._entries
            and list(chain.from_iterable(self._children)) == self._known_children
            and not [key for table, key, parameter in self._known if table.get(key) is not parameter]
            and all(isinstance(p, UninitializedParameter) for p in self._lazy)
        ):
            return False
        self._scan()
        return True

    def _scan(self) -> None:
        found = watched_tensors(self._models)
        for i, tensor in enumerate(found):
            known = self._all.get(tensor.name)
            if known is not None:
                if known.role == "output" and tensor.role == "matrix":
                    tensor.role = "output"  # though it may not be the last any more
                tensor.mine = known.mine
                vars(known).update(vars(tensor))
                found[i] = known
        if found and all(t.role != "output" for t in found):
            new = [t for t in found if t.name not in self._all and t.role == "matrix"]
            for tensor in new[-1:]:
                tensor.role = "output"
        self._all = {t.name: t for t in found}
        self._chosen = [
            t
            for t in found
            if (self._include is None or any(p.search(t.name) for p in self._include))
            and not any(p.search(t.name) for p in self._exclude)
        ]
        self._remember()

    def _remember(self) -> None:
        """What `refresh` compares with: the dictionaries of all modules, and what is in them now."""
        modules = dict.fromkeys(m for model in self._models for m in model.modules())
        modules = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]  # those cannot change
        self._tables = [t for m in modules for t in (m._parameters, m._modules)]
        self._entries = sum(map(len, self._tables))
        self._children = [m._modules.values() for m in modules if m._modules]
        self._known_children = list(chain.from_iterable(self._children))
        self._known = [(m._parameters, key, p) for m in modules for key, p in m._parameters.items()]
        self._lazy = [p for _, _, p in self._known if isinstance(p, UninitializedParameter)]


def _compiled(patterns: str | Sequence[str]) -> list[re.Pattern[str]]:
    try:
        return [re.compile(p) for p in ([patterns] if isinstance(patterns, str) else patterns)]
    except re.error as error:
        raise ValueError(
            f"expected regular expressions as include and exclude, got {patterns!r}: {error}"
        ) from None


def watched_tensors(models: Sequence[nn.Module]) -> list[WatchedTensor]:
    """Every parameter once, in order of definition; a tied parameter carries all its names."""
    found: dict[int, WatchedTensor] = {}
    names: dict[str, int] = {}
    cut = pieces(models)
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
            piece = cut.get(id(parameter))
            shown = parameter if piece is None else torch.empty(piece.shape, device="meta")
            role = role_of(raw, shown, modules.get(owner))
            module = prefix + canonical(owner + ".").removesuffix(".") if owner else prefix.removesuffix(".")
            kind = type(modules.get(owner)).__name__
            found[id(parameter)] = WatchedTensor(name, parameter, role, module, kind, [name], piece=piece)
    return list(found.values())


def role_of(name: str, parameter: Tensor, module: nn.Module | None) -> str:
    """matrix, conv, bias, norm_gain, norm_bias, embedding, lora_a, lora_b, scalar or other.

    The owning module's type decides where name and shape cannot.
    """
    leaf = name.rpartition(".")[2]
    kind = type(module).__name__.lower()
    if "norm" in kind and "parametri" not in kind:
        return "norm_bias" if leaf == "bias" else "norm_gain"
    for lora in ("lora_a", "lora_b"):
        if lora in name.lower().replace("lora_embedding_", "lora_"):
            return lora
    if "embedding" in kind:
        return "embedding"
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


def ready(tensors: Sequence[WatchedTensor]) -> list[WatchedTensor]:
    """Those that have values and are this process's to write: not lazy, not on the meta device, no copies."""
    return [t for t in tensors if t.mine and _is_ready(t.parameter)]


def _is_ready(parameter: Tensor) -> bool:
    if type(parameter) is nn.Parameter and parameter.is_cpu:  # nearly always, and quickly told
        return True
    lazy = isinstance(parameter, UninitializedParameter)
    return not lazy and parameter.device.type != "meta" and local(parameter).numel() > 0


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
