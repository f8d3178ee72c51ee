"""Outputs of modules on captured steps, summarised as they pass by."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from . import functions
from .attention import AttentionTap, Observation
from .pending import Pending
from .tensors import canonical, is_opaque, leaf_modules, model_names
from .units import Units, warm_up

Guard = Callable[[Callable[..., None]], Callable[..., None]]

_NOTHING_SEEN = (
    "no output of any module was seen on a captured step: compiled models (torch.compile) and parts that are "
    "not called as modules cannot be seen"
)


class ActivationTap:
    """Forward hooks on modules that exist only while a captured step is under way.

    Calls within one step (micro-batches, shared modules) merge by addition. Forward passes without gradient
    (evaluation) are not training and are not recorded. Under torch.compile the hook is traced as empty: it
    neither breaks the graph nor sees anything.

    Between `attach` and `detach` steps may be captured; `arm` and `disarm` bracket one that is.
    """

    def __init__(self, models: Sequence[nn.Module], guard: Guard) -> None:
        self._models = list(models)
        self._on_output, self._on_dropout = guard(self._output), guard(self._dropout)
        self._on_attention, self._on_function = guard(self._attention_output), guard(self._function)
        self._handles: list[RemovableHandle] = []
        self._attached = False
        self._watched: list[int] = []  # ids of all modules
        self._leaves: dict[str, nn.Module] = {}
        self._pending = Pending()
        self._found: dict[str, Units] = {}
        self._forward: set[str] = set()  # recorded outside of backward
        self._attention = AttentionTap(self._pending)
        self._notes: list[str] = []
        self._elsewhere: Set[str] = set()
        self._unseen = 0  # captured steps in a row of which nothing was seen
        self.seconds = 0.0

    def attach(self) -> None:
        """Be ready for captured steps."""
        if self._models and not self._attached:
            self._attached = True
            functions.attach()
            warm_up()

    def detach(self) -> None:
        """Leave no trace in the models and in torch."""
        self.disarm()
        if self._attached:
            self._attached = False
            functions.detach()

    def leave_out(self, modules: Set[str]) -> None:
        """Other ranks log the outputs of these."""
        self._elsewhere = modules
        self._watched = []
        if self._handles:
            self.disarm()
            self.arm()

    def arm(self) -> None:
        """Start to record."""
        if self._handles or not self._models:
            return
        self.attach()
        self._follow()
        for name, module in self._leaves.items():
            self._handles.append(module.register_forward_hook(_Hook(self._on_output, name)))
            if isinstance(module, nn.Dropout):
                self._handles.append(module.register_forward_hook(_Hook(self._on_dropout, name)))
        for name, module in self._attention.suspects().items():
            self._handles.append(module.register_forward_hook(_Hook(self._on_attention, name)))
        functions.listen(self._on_function)

    def disarm(self) -> None:
        """Stop to record; what was found stays until `take`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        functions.unlisten(self._on_function)

    def take(self) -> list[Observation]:
        """What was recorded since the last call."""
        self._pending.settle()
        observations = []
        for name, units in self._found.items():
            summary, dead, saturated = units.observed()
            observations.append(Observation(name, "activation", summary, None))
            for kind, share in (("dead_share", dead), ("saturated_share", saturated)):
                if share is not None:
                    observations.append(Observation(name, kind, None, share))
        observations += self._attention.take()
        if observations:
            self._unseen = 0
        elif self._handles and self._leaves:
            self._unseen += 1
            if self._unseen == 2:  # once proves nothing: an accident is captured after its forward
                self._notes.append(_NOTHING_SEEN)
        self._pending.clear()
        self._found.clear()
        self._forward.clear()
        return observations

    def notes(self) -> list[str]:
        """What cannot be seen, each said once; to be called after `take`."""
        notes, self._notes = self._notes + self._attention.notes(), []
        return notes

    def _follow(self) -> None:
        """Modules come and go during training."""
        now = [id(m) for model in self._models for m in model.modules()]
        if now != self._watched:
            self._watched = now
            away = self._elsewhere
            self._leaves = {n: m for n, m in leaf_modules(self._models) if n not in away}
            self._attention.follow({n: m for n, m in _all_modules(self._models) if n not in away})

    # What passes by

    def _output(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        # A checkpoint computes the same once more, inside backward.
        if torch._C._current_graph_task_id() == -1:
            self._forward.add(name)
        elif name in self._forward:
            return
        start = time.perf_counter()
        tensor = first_tensor(output)
        if (
            tensor is not None
            and (tensor.is_floating_point() or tensor.is_complex())
            and functions.plain(tensor)
        ):
            with functions.aside():
                if name not in self._found:
                    self._found[name] = Units(module, self._pending)
                self._found[name].add(tensor.detach(), inputs)
        self.seconds += time.perf_counter() - start

    def _dropout(self, _name: str, _module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        start = time.perf_counter()
        if inputs and isinstance(inputs[0], Tensor):
            self._attention.dropped(inputs[0])
        self.seconds += time.perf_counter() - start

    def _attention_output(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        start = time.perf_counter()
        self._attention.put_out(name, output)
        self.seconds += time.perf_counter() - start

    def _function(self, *call: Any) -> None:
        start = time.perf_counter()
        self._attention.function(*call)
        self.seconds += time.perf_counter() - start


class _Hook:
    """The forward hook of one module. A copied or pickled model carries an empty hook instead."""

    def __init__(self, record: Callable[..., None], name: str) -> None:
        self._record, self._name = record, name

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        self._record(self._name, module, inputs, output)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # Takes anything, does nothing, and is Python's own: a saved model loads where layerwatch is not.
        return getattr, (contextlib.nullcontext(), "__exit__")


def first_tensor(output: Any) -> Tensor | None:
    """The tensor of a module's output: itself, or the first one in a tuple, list or mapping.

    Of a packed sequence its data: (steps of all sequences, units).
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, PackedSequence):
        return output.data
    items = list(output.values()) if isinstance(output, dict) else output
    if isinstance(items, tuple | list):
        first = next((t for t in items if isinstance(t, Tensor | PackedSequence)), None)
        return first.data if isinstance(first, PackedSequence) else first
    return None


def _all_modules(models: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every module that is not inside a compiled or scripted one, each once."""
    for prefix, model in zip(model_names(models), models, strict=True):
        closed = [name for name, m in model.named_modules() if is_opaque(m)]
        for raw, module in model.named_modules():
            if not any(raw == name or raw.startswith(f"{name}.") or not name for name in closed):
                yield (prefix + canonical(f"{raw}.")).strip(".") or type(module).__name__, module
