"""Where numbers stopped being finite: in the forward pass of a loss, or among the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .shards import local
from .tensors import WatchedTensor

#: Operations whose result is infinite or NaN for some finite input, and how that input is recognised:
#: node name -> (which saved tensor, what to look for, words).
_SINGULAR: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "LogBackward0": ("self", lambda x: x <= 0, "the logarithm of a number that is not positive"),
    "Log2Backward0": ("self", lambda x: x <= 0, "the logarithm of a number that is not positive"),
    "Log10Backward0": ("self", lambda x: x <= 0, "the logarithm of a number that is not positive"),
    "Log1PBackward0": ("self", lambda x: x <= -1, "log1p of a number that is not above -1"),
    "DivBackward0": ("other", lambda x: x == 0, "a division by zero"),
    "RsqrtBackward0": ("result", lambda x: ~torch.isfinite(x), "one over the square root of zero"),
    "ReciprocalBackward0": ("result", lambda x: ~torch.isfinite(x), "one over zero"),
}

#: What may stand between a parameter and the operation that uses it.
_VIEWS = {
    "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Expand", "Unsqueeze", "Squeeze",
    "ToCopy", "Slice", "Select", "Alias", "Split", "Unbind", "Unfold", "AsStrided",
}  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """What broke first.

    `layer` is a tensor's or module's name, None when it cannot be known; `where` is "input", "weight",
    "output", "loss", "gradient" or "unknown"; `words` complete the sentence "the loss is nan: ...";
    `layers` are all tensors concerned, in order of definition.
    """

    layer: str | None
    where: str
    words: str
    layers: tuple[str, ...] = ()


def of_loss(loss: Tensor | None, tensors: Sequence[WatchedTensor]) -> Origin:
    """Walk the graph of a loss that is not finite, in the order in which the forward pass built it.

    Looks at what the operations have saved for backward. What checkpointing, offloading or other hooks have
    packed is left alone: unpacking would compute, or copy, and may be done once only.
    """
    owners = {id(t.parameter): t for t in tensors}
    broken = [t.name for t in tensors if not _finite(t.weight)]
    if broken:
        return Origin(
            broken[0], "weight", f"the weights of {_some(broken)} are not finite already", tuple(broken)
        )
    if loss is None:
        return Origin(None, "unknown", "where it began cannot be known: it was seen after its backward pass")
    nodes = sorted(_graph(loss), key=lambda n: n._sequence_nr())
    hidden = False
    for node in nodes:
        for name, saved in _saved(node):
            data = _unhooked(saved)
            hidden = hidden or (data is None and saved is not None)
            if data is None or not (data.is_floating_point() or data.is_complex()):
                continue
            found = _judge(node, name, data, owners, hidden)
            if found is not None:
                return found
    last = _layers_before(loss.grad_fn, owners)
    if hidden:
        return Origin(
            None, "unknown", "where it began cannot be known: the forward is checkpointed or packed"
        )
    if not nodes or not last:
        return Origin(None, "unknown", "where it began cannot be known: its graph holds no layer")
    return Origin(
        _layer(last),
        "loss",
        f"all layers are finite up to the last, {_name(last)}: it began in the loss itself",
    )


def _judge(
    node: Any, name: str, data: Tensor, owners: dict[int, WatchedTensor], hidden: bool
) -> Origin | None:
    """Is it this saved tensor where the forward pass broke?"""
    singular = _SINGULAR.get(node.name())
    here = singular is not None and name == singular[0] and bool(singular[1](local(data)).any())
    if not here and _finite(data):
        return None
    own, before = _parameters(node, owners), _layers_before(node, owners)
    is_output = name.startswith(("result", "output"))
    if own and not is_output:  # its input is broken: whoever comes before did it
        before = [t for t in before if t not in own]
        if not before:
            words = f"the input of {_name(own)}, the first layer, is not finite: look at this batch"
            return Origin(_layer(own), "input", words)
    unsure = " (or in a checkpointed or packed part before it)" if hidden else ""
    if not before:
        return Origin(None, "input", f"the model's input is not finite already{unsure}")
    after = f"after {_name(before)}"
    if here and singular is not None:
        return Origin(_layer(before), "loss", f"{singular[2]} {after}{unsure}")
    return Origin(_layer(before), "output", f"first seen in the output of {_name(before)}{unsure}")


def of_gradients(tensors: Sequence[WatchedTensor]) -> Origin | None:
    """The gradients that are not finite: backward runs from the end, so the last one was the first.

    The order is that of definition. None when all are finite.
    """
    broken = [t.name for t in tensors if (gradient := t.gradient) is not None and not _finite(gradient)]
    if not broken:
        return None
    having = sum(t.gradient is not None for t in tensors)
    words = f"the gradients of {len(broken)} of {having} tensors, from {broken[-1]} back to {broken[0]}"
    if len(broken) == 1:
        words = f"the gradient of {broken[0]}"
    return Origin(broken[-1], "gradient", words, tuple(broken))


def _finite(tensor: Tensor) -> bool:
    values = local(tensor).detach()
    if values.layout != torch.strided:
        values = values._values() if values.is_sparse else values.to_dense()
    return values.device.type == "meta" or bool(torch.isfinite(values).all())


def _graph(root: Tensor) -> Iterator[Any]:
    """The nodes below a tensor, each once; the leaves that gather gradients are left out."""
    seen, stack = set(), [root.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen or hasattr(node, "variable"):
            continue
        seen.add(node)
        stack.extend(f for f, _ in node.next_functions)
        yield node


def _saved(node: Any) -> Iterator[tuple[str, Any]]:
    for attribute in dir(node):
        if attribute.startswith("_raw_saved_"):
            saved = getattr(node, attribute)
            name = attribute.removeprefix("_raw_saved_")
            if "mask" in name or name == "attn_bias":
                continue  # of attention: -inf is what it is made of
            for one in saved if isinstance(saved, list | tuple) else [saved]:
                yield name, one


def _unhooked(saved: Any) -> Tensor | None:
    """The tensor itself, unless a hook has packed it (or this torch does not tell)."""
    if getattr(saved, "unpack_hook", saved) is not None:
        return None
    data = saved.data
    return data.detach() if isinstance(data, Tensor) else None


def _parameters(node: Any, owners: dict[int, WatchedTensor]) -> list[WatchedTensor]:
    """The watched tensors that an operation uses, directly or through views and casts of them."""
    found = []
    for child, _ in node.next_functions:
        while child is not None and child.name().partition("Backward")[0] in _VIEWS:
            child = child.next_functions[0][0]
        variable = getattr(child, "variable", None)
        if variable is not None and id(variable) in owners:
            found.append(owners[id(variable)])
    return sorted(found, key=lambda t: t.role in ("bias", "norm_bias"))


def _layers_before(node: Any, owners: dict[int, WatchedTensor]) -> list[WatchedTensor]:
    """What the last layer at or before this node uses."""
    reached = [n for n in _below(node) if _parameters(n, owners)]
    if not reached:
        return []
    return _parameters(max(reached, key=lambda n: n._sequence_nr()), owners)


def _below(node: Any) -> Iterable[Any]:
    seen, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen and not hasattr(node, "variable"):
            seen.add(node)
            stack.extend(f for f, _ in node.next_functions)
    return seen


def _modules(layer: Sequence[WatchedTensor]) -> list[str]:
    return list(dict.fromkeys(t.module or t.name for t in layer))


def _layer(layer: Sequence[WatchedTensor]) -> str | None:
    """Its name; None for a compiled part, whose layers cannot be told apart."""
    modules = _modules(layer)
    return modules[0] if len(modules) == 1 else None


def _name(layer: Sequence[WatchedTensor]) -> str:
    modules = _modules(layer)
    if len(modules) > 1:
        return f"one of {_some(modules)} (a compiled part)"
    return f"layer {modules[0]!r} ({layer[0].module_type})"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
