"""A base model and its adapter as one state, as if merged: W0 + scale * B A, made where it is asked for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import WeightsError
from .adapters import Adapter, Pair, adapter_of, as_matrix
from .lowrank import LowRank
from .names import canonical, matched
from .source import Entry, Weights, decoded

_KOHYA = re.compile(r"^lora_(unet|te\d?|transformer)_")


class _Use(NamedTuple):
    """How one tensor of the base changes: as a weight by a product, or as a bias by `Pair.bias`."""

    pair: Pair
    transposed: bool
    bias: bool = False


@dataclass(frozen=True)
class AdapterChange:
    """The change that an adapter makes to one weight, from its factors and one pass over the base weight.

    Attributes:
        norm: |scale * B A|. base_norm: |W0|. dot: <W0, scale * B A>.
        relative_l2: norm / base_norm. cosine: between W0 and W0 + scale * B A. None of zeros, or not finite.
        rank: the numerical rank. stable_rank: norm^2 over the largest singular value's; None of zeros.
        singular_values: descending, at most r.
    """

    tensor: str
    norm: float
    base_norm: float
    dot: float
    rank: int
    stable_rank: float | None
    singular_values: list[float]

    @property
    def relative_l2(self) -> float | None:
        return _finite(self.norm / self.base_norm) if self.base_norm > 0 else None

    @property
    def cosine(self) -> float | None:
        after = self.base_norm**2 + 2 * self.dot + self.norm**2
        both = self.base_norm * math.sqrt(max(after, 0.0))
        return _finite((self.base_norm**2 + self.dot) / both) if both > 0 else None


class Adapted(Weights):
    """Base weights with an adapter applied. Values of changed tensors are as if merged in float32 (in float64
    where the base or the adapter is), whatever the base is stored in; the factors' product is made for the
    asked rows only.

    `entries` has the base's stored names and types. `problems` lists what of the adapter could not be
    applied, with the reason: those tensors are as in the base. `stored` serves unchanged tensors only.

    Args:
        base: the frozen model; of an adapter that `holds_base` its own weights.
    """

    computed: ClassVar[bool] = True

    def __init__(self, base: Weights, adapter: Adapter) -> None:
        super().__init__(f"{base.label} + {adapter.weights.label}")
        self.base, self.adapter = base, adapter
        self.problems = base.problems | adapter.problems
        own = adapter.own if adapter.weights is base else set()
        skip = own | {name for name in base.entries if ".original_module." in name and adapter.holds_base}
        self.entries = {name: entry for name, entry in base.entries.items() if name not in skip}
        self._uses: dict[str, _Use] = {}
        self._replaced: dict[str, str] = {}
        self._change = lru_cache(4)(adapter.change)  # blocks of a tensor are asked for one after the other
        self._magnitudes = lru_cache(4)(adapter.matrix)
        self._apply()

    def _apply(self) -> None:
        targets = self._targets()
        for_bias = {f"{p.owner}.bias": p for p in self.adapter.pairs.values() if p.bias}
        replaced = self.adapter.replaced
        wanted = {name: self.adapter.weights.entries[stored] for name, stored in replaced.items()}
        wanted |= {name: self._entry(name, pair, pair.turned) for name, pair in targets.items()}
        wanted |= {name: self.adapter.weights.entries[str(pair.bias)] for name, pair in for_bias.items()}
        found = matched(wanted, self.entries)
        places = dict(found.pairs.values())
        turned = self._seen_turned(targets, places)
        for name, pair in targets.items():
            if why := self._use(pair, places.get(name), turned):
                self.problems[pair.owner] = why
        for name, pair in for_bias.items():
            if name in places:
                self._uses[places[name]] = _Use(pair, False, True)
        for name, stored in replaced.items():
            place = places.get(name, name)
            self.entries[place] = replace(self.adapter.weights.entries[stored], name=place)
            self._replaced[place] = stored

    def _targets(self) -> dict[str, Pair]:
        """The adapter's pairs by the base's canonical names, where those are no mere `owner.weight`."""
        owners = {canonical(name).rpartition(".")[0] for name in self.entries}
        flat = {owner.replace(".", "_"): owner for owner in owners}
        names = {canonical(name) for name in self.entries}
        found = {}
        for name, pair in self.adapter.pairs.items():
            bare = _KOHYA.sub("", pair.owner)
            if bare != pair.owner and bare in flat:
                name = f"{flat[bare]}.weight"
            elif name not in names and f"{pair.owner}.in_proj_weight" in names:  # nn.MultiheadAttention
                name = f"{pair.owner}.in_proj_weight"
            found[name] = pair
        return found

    def _entry(self, name: str, pair: Pair, turned: bool) -> Entry:
        """The tensor that a pair changes, as its factors tell; `turned`: stored as (in, out)."""
        a, b = (self.adapter.weights.entries[n].shape for n in (pair.a, pair.b))
        shape = (*b[:1], *a[1:])
        return Entry(name, shape[::-1] if turned and len(shape) == 2 else shape, "float32")

    def _seen_turned(self, targets: dict[str, Pair], places: dict[str, str]) -> bool | None:
        """Whether matrices that are not square are stored as (in, out); None: none is there, or they differ.
        A square one does not tell, and fan_in_fan_out is PEFT's guess for the last layer that it adapted."""
        seen = set()
        for name, pair in targets.items():
            straight = self._entry(name, pair, turned=False).shape
            if name in places and not pair.embedding and len(straight) == 2 and straight[0] != straight[1]:
                shape = self.entries[places[name]].shape
                seen |= {shape == straight[::-1]} if shape in (straight, straight[::-1]) else set()
        return seen.pop() if len(seen) == 1 else None

    def _use(self, pair: Pair, place: str | None, seen_turned: bool | None) -> str:
        """Note that the pair changes the tensor; else why it cannot."""
        if place is None:
            return "the base has no tensor that it changes"
        entry = self.entries[place]
        if not entry.is_float:
            return (
                f"the base weight is packed or quantised ({entry.dtype}): give the base as it was before that"
            )
        try:
            n, m = self.adapter.shape(pair)
        except WeightsError as error:
            return str(error)
        straight, turned = as_matrix(entry.shape) == (n, m), entry.shape == (m, n)
        if not straight and not turned:
            return f"it changes a weight of {(n, m)}, the base's has the shape {entry.shape}"
        flag = pair.turned if pair.embedding or seen_turned is None else seen_turned
        transposed = turned and (flag or not straight)
        if pair.magnitude and transposed:
            return (
                "DoRA of a weight stored as (in, out) is not covered: merge it and compare the merged weights"
            )
        count = self.adapter.weights.entries[pair.magnitude].elements if pair.magnitude else n
        if count != n:
            return f"expected {n} magnitudes of DoRA, got {count}"
        self._uses[place] = _Use(pair, transposed)
        return ""

    def stored(self, name: str, start: int, stop: int) -> NDArray[Any]:
        if name in self._uses:
            raise WeightsError(f"{name} is computed from its base and its adapter: ask for its values")
        return self._unchanged(name, start, stop)

    def _unchanged(self, name: str, start: int, stop: int) -> NDArray[Any]:
        if name in self._replaced:
            return self.adapter.weights.stored(self._replaced[name], start, stop)
        return self.base.stored(name, start, stop)

    def values(self, name: str, start: int, stop: int) -> NDArray[np.floating]:
        use = self._uses.get(name)
        if use is None:
            return super().values(name, start, stop)
        if use.bias:
            before = decoded(self._unchanged(name, start, stop), self.entries[name].dtype)
            change = self.adapter.weights.values(str(use.pair.bias), start, stop) * use.pair.scale
            return before + change
        if use.pair.magnitude:
            return self._dora(name, use.pair, start, stop)
        return self.base.values(name, start, stop) + self._product(use).part(start, stop)

    def _product(self, use: _Use) -> LowRank:
        found = self._change(use.pair)
        return LowRank(found.right.T, found.left.T, found.scale) if use.transposed else found

    def _dora(self, name: str, pair: Pair, start: int, stop: int) -> NDArray[np.floating]:
        """Each row of W0 + scale * B A, at the length that its magnitude says (Liu et al. 2024, DoRA)."""
        change = self._change(pair)
        width = change.shape[1]
        first, last = start // width, -(-stop // width)
        whole = self.base.values(name, first * width, last * width)
        rows = (whole + change.part(first * width, last * width)).reshape(last - first, width)
        lengths = np.linalg.norm(rows, axis=1)
        magnitudes = self._magnitudes(str(pair.magnitude)).reshape(-1)[first:last]
        with np.errstate(divide="ignore", invalid="ignore"):
            rows *= (magnitudes / lengths)[:, None]
        return rows.reshape(-1)[start - first * width : stop - first * width]

    @property
    def adapted(self) -> list[str]:
        """Stored names of the weights that the adapter changes by a product."""
        return [name for name, use in self._uses.items() if not use.bias]

    @property
    def empty(self) -> bool:
        """The adapter changes nothing of this base."""
        return not self._uses and not self._replaced

    def product(self, name: str) -> LowRank | None:
        """What is added to a weight, as a matrix (rows, the other dimensions) like the stored weight; None of
        DoRA, which also scales rows, and of what the adapter does not change by a product."""
        use = self._uses.get(name)
        return None if use is None or use.bias or use.pair.magnitude else self._product(use)

    def change(self, name: str) -> AdapterChange | None:
        """The change of a weight in closed form; None where `product` is none."""
        product = self.product(name)
        if product is None:
            return None
        dot, squares = product.dot(self.base.rows(name))
        return AdapterChange(
            canonical(name), product.norm, math.sqrt(squares), dot, product.rank,
            _finite(product.stable_rank), product.singular_values.tolist(),
        )  # fmt: skip

    def __enter__(self) -> Adapted:
        return self

    def close(self) -> None:
        self.base.close()
        self.adapter.weights.close()


def effective(weights: Weights, base: Weights | None = None, *, alpha: float | None = None) -> Weights:
    """Weights with the adapter that they hold applied: to the base that they hold as well, else to `base`.
    Weights without an adapter are given back as they are.

    Args:
        alpha: see `adapter_of`.

    Raises:
        WeightsError: they hold an adapter alone and there is no base, or nothing of it can be applied.
    """
    adapter = adapter_of(weights, alpha=alpha)
    if adapter is None:
        return weights
    on = weights if adapter.holds_base else base
    other = None if on is None else adapter_of(on)
    if on is None or (other is not None and not other.holds_base):
        raise WeightsError(f"{weights.label} is an adapter: expected the weights of its base model as well")
    return applied(on, adapter)


def applied(base: Weights, adapter: Adapter) -> Adapted:
    """Base weights with the adapter.

    Raises:
        WeightsError: nothing of it can be applied.
    """
    found = Adapted(base, adapter)
    if found.empty:
        problems = adapter.problems | found.problems
        why = next((f": {name}: {why}" for name, why in problems.items()), "")
        raise WeightsError(f"the adapter {adapter.weights.label} cannot be applied to {base.label}{why}")
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
