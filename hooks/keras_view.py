"""A Keras model on the torch backend as torch would hold it: names of modules, (out, in) kernels.

Nothing is copied: a parameter of the view shares its elements with the variable, which Keras changes in
place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

#: What Keras calls a variable -> what torch calls the parameter.
NAMES = {"kernel": "weight", "embeddings": "weight", "gamma": "weight", "beta": "bias"}


class Part(nn.Module):
    """One layer. Its class carries the name of the layer's class."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        vars(self)["layer"] = layer  # not as a child: Keras registers its variables in its own way
        self.variables: dict[str, Any] = {}

    def register_forward_hook(self, hook: Any, **how: Any) -> RemovableHandle:  # type: ignore[override]
        """The layer is what is called."""
        return vars(self)["layer"].register_forward_hook(hook, **how)

    def add(self, name: str, variable: Any) -> None:
        """Show a variable of the layer as a parameter."""
        plain = re.sub(r"[./]", "_", re.sub(r"^variable_\d+$", "variable", name))
        name = NAMES.get(plain, plain)
        for i in range(1, len(self.variables) + 1):
            name = f"{plain}_{i}" if name in self.variables else name
        value = in_torch_order(variable.value.detach(), type(self).__name__, variable.name)
        self.variables[name] = variable
        self.register_parameter(name, nn.Parameter(value, requires_grad=bool(variable.trainable)))


def in_torch_order(value: Tensor, kind: str, name: str) -> Tensor:
    """A view of a variable's elements, or of its gradient's, with the dimensions as torch has them.

    Args:
        kind: the layer's class. name: the variable's.

    >>> import torch
    >>> in_torch_order(torch.empty(8, 16), "Dense", "kernel").shape
    torch.Size([16, 8])
    >>> in_torch_order(torch.empty(3, 3, 8, 16), "Conv2D", "kernel").shape
    torch.Size([16, 8, 3, 3])
    """
    if not name.endswith("kernel"):
        return value
    if value.ndim == 2:
        return value.T
    if "Conv" not in kind:
        return value
    *window, before_last, last = range(value.ndim)
    depthwise = "Depthwise" in kind or name.startswith("depthwise")
    return value.permute(*((before_last, last) if depthwise else (last, before_last)), *window)


def view_of(model: Any) -> Part:
    """The view of a built model."""
    return _part(model, {})


def variables_of(view: nn.Module) -> dict[int, tuple[Any, nn.Parameter, str]]:
    """id of a Keras variable -> the variable, its parameter in the view, and the class of its layer."""
    return {
        id(variable): (variable, part.get_parameter(name), type(part).__name__)
        for part in view.modules()
        if isinstance(part, Part)
        for name, variable in part.variables.items()
    }


def _part(layer: Any, known: dict[int, Part]) -> Part:
    if id(layer) in known:
        return known[id(layer)]
    part = known[id(layer)] = type(type(layer).__name__, (Part,), {})(layer)
    inner = layer.module if type(layer).__name__ == "TorchModuleWrapper" else nn.Module()
    torch_names = {id(parameter): name for name, parameter in inner.named_parameters()}
    for variable in layer._trainable_variables:  # those of a frozen layer too; no statistics
        part.add(torch_names.get(id(variable.value), variable.name), variable)
    for name, child in _children(layer):
        *way, last = name.split(".")
        parent: nn.Module = part
        for step in way:
            if step not in parent._modules:
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        parent.add_module(last, _part(child, known))
    return part


def _children(layer: Any) -> Iterator[tuple[str, Any]]:
    """Name and layer of what a layer is made of.

    Of a Sequential by place, as in `nn.Sequential`; of a functional model by the layer's name; else by
    attribute, with the place in a list or the key in a dictionary.
    """
    kinds = {kind.__name__ for kind in type(layer).__mro__}
    if "Sequential" in kinds:
        yield from ((str(i), child) for i, child in enumerate(layer.layers))
    elif "Functional" in kinds:
        layers = [child for child in layer.layers if type(child).__name__ != "InputLayer"]
        yield from zip(steady_names(layers), layers, strict=True)
    else:
        yield from _attributes(layer)


def _attributes(layer: Any) -> Iterator[tuple[str, Any]]:
    left = {id(child): child for child in layer._layers}
    for name, value in [*layer._modules.items(), *vars(layer).items()]:
        if name == "_layers":
            continue
        for suffix, item in _items(value):
            if left.pop(id(item), None) is not None:
                yield name + suffix, item
    yield from zip(steady_names(left.values()), left.values(), strict=True)


def _items(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f".{key}", item) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [(f".{i}", item) for i, item in enumerate(value)]
    return [("", value)]


def steady_names(layers: Iterable[Any]) -> list[str]:
    """The layers' names, with the numbers that Keras gave counted anew: those depend on all models that the
    process has made before."""
    counts: dict[str, int] = {}
    names = []
    for layer in layers:
        made = _snake_case(type(layer).__name__)
        if not re.fullmatch(rf"{made}(_\d+)?", layer.name):
            names.append(layer.name.replace(".", "_"))
            continue
        counts[made] = counts.get(made, -1) + 1
        names.append(f"{made}_{counts[made]}" if counts[made] else made)
    return names


def _snake_case(name: str) -> str:
    """As Keras does it."""
    apart = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub("([a-z])([A-Z])", r"\1_\2", apart).lower()
