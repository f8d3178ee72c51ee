"""Torch functions that compute attention, listened to while a training is watched.

`scaled_dot_product_attention` and softmax are called by function, so no module hook sees their inputs. They
are replaced where callers look them up: `torch.nn.functional.scaled_dot_product_attention`, from `attach` to
`detach`, and the method `torch.Tensor.softmax` (which `torch.nn.functional.softmax` and `nn.Softmax` call),
while somebody listens.

torch.compile checks that a function is the one it traced: replaced for captured steps only, the first one
would be compiled twice. (It knows methods of tensors by name.) While it traces, the replacement is the
original: no graph break, the same graph. A pickled or copied replacement is the original.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.jit._builtins import _register_builtin
from torch.overrides import get_overridable_functions, has_torch_function
from torch.utils._python_dispatch import _disable_current_modes

#: Called with (name of the function, its arguments, keywords, result) after a call; must not raise.
Listener = Callable[[str, tuple[Any, ...], Mapping[str, Any], Any], None]

_listeners: list[Listener] = []
_attached = 0
_NAME = "scaled_dot_product_attention"
_attention = getattr(F, _NAME)
_softmax = torch.Tensor.softmax
#: Subclasses that compute in their own way (fake, distributed, nested) have another one.
_PLAIN_DISPATCH = getattr(Tensor, "__torch_dispatch__", None)


class _Attention:
    """`scaled_dot_product_attention` that tells the listeners about its calls."""

    def __init__(self) -> None:
        functools.update_wrapper(self, _attention)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            if type(mask).__name__ == "CausalBias":  # asks the same (see below); its module is slow to import
                return type(mask)._dispatch(*args, **kwargs)  # type: ignore[attr-defined]
            return _attention(*args, **kwargs)
        if has_torch_function((*args, *kwargs.values()) if kwargs else args):
            with _put_back():
                result = _attention(*args, **kwargs)
        else:
            result = _attention(*args, **kwargs)
        if _listeners:
            for listener in tuple(_listeners):
                listener(_NAME, args, kwargs, result)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (_attention,)


_replacement = _Attention()


@contextmanager
def _put_back() -> Iterator[None]:
    """An override may ask whether it was called for torch's own function."""
    replaced = getattr(F, _NAME) is _replacement
    if replaced:
        setattr(F, _NAME, _attention)
    try:
        yield
    finally:
        if replaced:
            setattr(F, _NAME, _replacement)


def _softmax_method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return torch.softmax(tensor, *args, **kwargs)  # the same, by the name that a tracer knows
    result = _softmax(tensor, *args, **kwargs)
    for listener in tuple(_listeners):
        listener("softmax", (tensor, *args), kwargs, result)
    return result


def attach() -> None:
    """Prepare to listen; undone by as many calls of `detach`."""
    global _attached
    _attached += 1
    if (
        _attached == 1 and getattr(F, _NAME) is _attention
    ):  # else somebody else has replaced it: leave it alone
        get_overridable_functions()  # torch lists its functions once and for all: not ours
        _register_builtin(_replacement, f"aten::{_NAME}")  # torch.jit.script knows functions by identity
        setattr(F, _NAME, _replacement)


def detach() -> None:
    """The last one leaves torch as it was."""
    global _attached
    _attached -= 1
    if _attached == 0 and getattr(F, _NAME) is _replacement:
        setattr(F, _NAME, _attention)


def listen(listener: Listener) -> None:
    """Tell this listener about every call from now on, by any thread, until `unlisten`."""
    if not _listeners:
        torch.Tensor.softmax = _softmax_method  # type: ignore[method-assign]
    _listeners.append(listener)


def unlisten(listener: Listener) -> None:
    """Undo `listen`."""
    if listener in _listeners:
        _listeners.remove(listener)
        if not _listeners and torch.Tensor.__dict__.get("softmax") is _softmax_method:
            del torch.Tensor.softmax


def calling_module(names: Mapping[int, str]) -> str | None:
    """Name of the innermost module of `names` (by id) whose code is running, found in the Python frames.

    A module is recognised as the first argument of a running function, `self` or `module`: of its own forward
    or of what that hands itself to. A softmax or dropout works for the module that calls it. Inside the graph
    of a compiled model (its Python code does not run) the answer is None.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] in ("self", "module"):
            owner = frame.f_locals.get(code.co_varnames[0])
            if id(owner) in names and not isinstance(owner, (nn.Softmax, nn.Dropout)):
                return names[id(owner)]
            if isinstance(owner, torch.fx.GraphModule):
                return None
        frame = frame.f_back
    return None


def plain(*tensors: Tensor) -> bool:
    """All hold values that may be read now.

    Not: tensors of a tracer or a compiler, inside vmap or grad transforms, nested, distributed, on the meta
    device, or while a CUDA graph is recorded.
    """
    if torch._C._get_tracing_state() is not None:
        return False
    for tensor in tensors:
        own = getattr(type(tensor), "__torch_dispatch__", None) is not _PLAIN_DISPATCH
        if own or tensor.is_nested or is_functorch_wrapped_tensor(tensor):
            return False
        kind = tensor.device.type
        if kind == "meta" or (kind == "cuda" and torch.cuda.is_current_stream_capturing()):
            return False
    return True


def aside(device: str | None = None) -> AbstractContextManager[Any]:
    """For what we compute beside the model: none of the user's modes; given the device, no autograd nor
    autocast.

    Selective checkpointing, for one, would count our operations among the model's and give back wrong ones.
    """
    if device is None and not torch._C._len_torch_dispatch_stack():
        return torch._C.DisableTorchFunction()
    stack = ExitStack()
    stack.enter_context(torch._C.DisableTorchFunction())
    if torch._C._len_torch_dispatch_stack():
        stack.enter_context(_disable_current_modes())
    if device is not None:
        stack.enter_context(torch.no_grad())
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack
