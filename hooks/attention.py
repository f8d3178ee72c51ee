"""Attention on captured steps: whose it is, where its weights are seen, what is said when they are not."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..monitor.summary import Summary, merge
from . import attention_math as math_of
from . import functions
from .pending import Pending
from .statistics import array_of

#: What attention is called in names and types of modules.
_LIKE = re.compile(r"attn|attention|attend|mha(?![a-z])", re.IGNORECASE)


class Observation(NamedTuple):
    """One row of statistics and/or of values about a module, at a captured step.

    `tensor` is the module's name. Kinds: "activation" (summary of the output), "dead_share" and
    "saturated_share" (values per unit), "attention_entropy" and "attention_logit" (summary, values per head).
    """

    tensor: str
    kind: str
    summary: Summary | None
    values: NDArray[np.float64] | None


@dataclass
class _Seen:
    """What one module attended to so far: numbers of summaries and vectors in `Pending`, call by call."""

    entropy: list[tuple[int, int, int]] = field(default_factory=list)  # summary, heads, edges
    logit: list[tuple[int, int, int]] = field(default_factory=list)
    verdicts: list[int] = field(default_factory=list)  # weights that were only guessed to be attention's
    computed: bool = False  # by a function that was listened to


class AttentionTap:
    """Entropy and logits of the attention that watched modules compute, from the functions they call.

    Where no such function is called, from weights that pass by: the input of an nn.Dropout, an output of a
    module whose type is called attention. Forward passes without gradient are not recorded.
    """

    def __init__(self, pending: Pending) -> None:
        self._names: dict[int, str] = {}
        self._modules: dict[str, nn.Module] = {}
        self._pending = pending
        self._seen: dict[str, _Seen] = {}
        self._forward: set[str] = set()  # seen outside of backward: a checkpoint's second pass is no news
        self._called: set[str] = set()
        self._noted: set[str] = set()

    def follow(self, modules: Mapping[str, nn.Module]) -> None:
        """The watched modules by name, all of them."""
        self._modules = dict(modules)
        self._names = {id(m): name for name, m in modules.items()}

    def suspects(self) -> dict[str, nn.Module]:
        """The innermost modules whose type is called attention: they should be seen to attend."""
        like = {n: m for n, m in self._modules.items() if _LIKE.search(type(m).__name__)}
        return {n: m for n, m in like.items() if not any(o.startswith(n + ".") for o in like)}

    # What passes by

    def function(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """A torch function was called (see `functions.Listener`)."""
        if not torch.is_grad_enabled() or not isinstance(result, Tensor) or not result.numel():
            return
        owner = functions.calling_module(self._names)
        if owner is None or not self._counts(owner):
            return
        heads = math_of.heads_of(self._modules[owner])
        if name == "scaled_dot_product_attention":
            given = math_of.bind(*args, **kwargs)
            tensors = [t for t in given.values() if isinstance(t, Tensor)]
            if not functions.plain(*tensors) or given["query"].ndim < 2:
                return
            with functions.aside(result.device.type):
                self._add(owner, math_of.of_scaled_dot_product(**given, heads=heads))
        elif functions.plain(args[0], result) and self._is_attention(owner, args, kwargs):
            with functions.aside(result.device.type):
                self._add(owner, math_of.of_softmax(args[0], heads))
        else:
            return
        self._seen[owner].computed = True

    def dropped(self, weights: Tensor) -> None:
        """The input of an nn.Dropout."""
        owner = functions.calling_module(self._names)
        if owner is not None:
            self._look(owner, weights)

    def put_out(self, name: str, output: Any) -> None:
        """The output of one of the `suspects`."""
        self._called.add(name)
        items = list(output.values()) if isinstance(output, dict) else output
        for item in items if isinstance(items, tuple | list) else ():
            if isinstance(item, Tensor):
                self._look(name, item)

    def _is_attention(self, owner: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """A softmax over the last of at least three dimensions, in something called attention or square."""
        scores, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else None)
        if scores.ndim < 3 or dim not in (-1, scores.ndim - 1) or scores.shape[-1] < 2:
            return False
        called = f"{owner} {type(self._modules[owner]).__name__}"
        return scores.shape[-1] == scores.shape[-2] or bool(_LIKE.search(called))

    def _look(self, owner: str, weights: Tensor) -> None:
        """Take weights, if that is what they are and no function has shown them before."""
        known = self._seen.get(owner)
        if (known is not None and known.computed) or weights.ndim < 3 or weights.shape[-1] < 2:
            return
        if not (weights.is_floating_point() and weights.numel() and functions.plain(weights)):
            return
        if weights.device.type == "cpu" and not _first_row_sums_to_one(weights.detach()):
            return
        with functions.aside(weights.device.type):
            if self._counts(owner):
                sample = math_of.of_weights(weights, math_of.heads_of(self._modules.get(owner)))
                self._add(owner, sample)
                verdict = self._pending.add_vector(math_of.sums_to_one(sample.weights, weights.dtype)[None])
                self._seen[owner].verdicts.append(verdict)

    def _counts(self, owner: str) -> bool:
        """Not a checkpoint's second pass, inside backward, over what was seen before it."""
        if torch._C._current_graph_task_id() == -1:
            self._forward.add(owner)
            return True
        return owner not in self._forward

    def _add(self, owner: str, sample: math_of.Sample) -> None:
        seen = self._seen.setdefault(owner, _Seen())
        for found, reading in ((seen.entropy, math_of.entropy(sample)), (seen.logit, math_of.logits(sample))):
            if reading is not None:
                heads = self._pending.add_vector(reading.heads.reshape(-1))
                edges = self._pending.add_vector(reading.edges)
                found.append((self._pending.add_summary(reading.values), heads, edges))

    # What is made of it

    def take(self) -> list[Observation]:
        """What was seen since the last call; `pending` has settled."""
        seen, self._seen = self._seen, {}
        self._forward.clear()
        computed = [name for name, found in seen.items() if found.computed]
        observations = []
        for name, found in seen.items():
            if not found.computed and not self._believed(name, found, computed):
                continue
            self._noted.add(name)
            for kind, calls in (("attention_entropy", found.entropy), ("attention_logit", found.logit)):
                if calls:
                    summary = merge([self._summary(s, edges) for s, _, edges in calls])
                    values = _per_head(kind, [self._pending.vector(heads) for _, heads, _ in calls])
                    observations.append(Observation(name, kind, summary, values))
        return [o for o in observations if o.summary is not None and o.summary.count]

    def notes(self) -> list[str]:
        """Attention that ran since the last call of `take` and was not seen, said once."""
        seen = self._noted
        blind = [n for n in sorted(self._called) if not any(_related(n, other) for other in seen)]
        self._called.clear()
        self._noted.update(blind)
        if not blind:
            return []
        some = ", ".join(blind[:3]) + (" ..." if len(blind) > 3 else "")
        return [
            f"attention in {some} cannot be seen: it calls neither torch's scaled_dot_product_attention nor "
            "its softmax, and returns no weights"
        ]

    def _believed(self, name: str, found: _Seen, computed: list[str]) -> bool:
        """Weights that a function has not shown under a related name, and that sum to one."""
        if any(_related(name, other) for other in computed):
            return False
        return all(bool(self._pending.vector(v)[0]) for v in found.verdicts)

    def _summary(self, number: int, edges: int) -> Summary:
        """Take what is not usable, and was summarised as zeros, out again."""
        summary = self._pending.summary(number)
        low, high, hidden = self._pending.vector(edges).tolist()
        summary.count -= int(hidden)
        summary.zeros -= int(hidden)
        if math.isfinite(low) and math.isfinite(high):  # else what the summary found among finite ones
            summary.min, summary.max = low, high
        return summary


def _per_head(kind: str, calls: list[NDArray]) -> NDArray[np.float64] | None:
    """Mean entropy, or largest logit, of each head; NaN where it has none, None when heads differ by call."""
    if len({v.size for v in calls}) > 1:
        return None
    together = np.stack(calls).astype(np.float64)
    if kind == "attention_logit":
        largest = together.max(axis=0)
        return np.where(np.isfinite(largest), largest, math.nan)
    total, number = together.sum(axis=0).reshape(2, -1)
    return np.divide(total, number, out=np.full_like(total, math.nan), where=number > 0)


def _first_row_sums_to_one(weights: Tensor) -> bool:
    """A quick look: most of what passes a Dropout is no attention."""
    with functions.aside():
        row = array_of(weights[(0,) * (weights.ndim - 1)])
    return bool(abs(row.sum() - 1) <= math_of.tolerance(weights.dtype) and row.min() >= 0)


def _related(name: str, other: str) -> bool:
    return name == other or name.startswith(other + ".") or other.startswith(name + ".")
