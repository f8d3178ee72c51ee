"""Do the advised number formats hurt? Weights are rounded for a moment, and the user's metric is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..monitor.weights import canonical
from ..monitor.weights.formats import Scheme, limited, quantised, scheme_of
from ..monitor.weights.precision import PrecisionReport
from .shards import is_sharded

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class PrecisionTrial:
    """What a metric says with rounded weights.

    Attributes:
        before: of the weights as they are. after: with all the advised formats at once.
        formats: tensor -> format that was tried. each: tensor -> the metric with that tensor alone rounded;
            empty if that was not asked for.
    """

    before: float
    after: float
    formats: dict[str, str]
    each: dict[str, float] = field(default_factory=dict)

    @property
    def change(self) -> float:
        """after - before."""
        return self.after - self.before

    def frame(self) -> pd.DataFrame:
        """tensor, format, metric, change: each tensor alone, the largest change first."""
        import pandas as pd

        rows = [(t, self.formats[t], value, value - self.before) for t, value in self.each.items()]
        found = pd.DataFrame(rows, columns=["tensor", "format", "metric", "change"])
        return found.sort_values("change", key=abs, ascending=False, kind="stable", ignore_index=True)


def try_precision(
    model: nn.Module,
    formats: PrecisionReport | Mapping[str, str],
    metric: Callable[[nn.Module], float],
    *,
    each: bool = False,
) -> PrecisionTrial:
    """Ask a metric what rounding the weights costs; the model is left bit for bit as it was.

    Weights only: activations stay in the type that the model computes in, and what is rounded is written back
    into the parameters' own type. In the meantime a copy of every rounded tensor is kept.

    Args:
        model: any module; its mode (train or eval) is the metric's business.
        formats: the report of `layerwatch.precision(model)`, whose advice is tried; or tensor -> format, such
            as {"layers.0.weight": "int8 per channel"}.
        metric: gets the model, returns a number. Called once, then once with all rounded, and with `each`
            once for each tensor rounded alone.

    Raises:
        ValueError: a tensor is not in the model or is sharded, or a format is unknown. What `metric` raises
            goes through; the weights are restored beforehand.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> with torch.no_grad(): _ = net.weight.copy_(torch.tensor([[0.3, 1.0]]))
    >>> try_precision(net, {"weight": "int4 per tensor"}, lambda m: round(m.weight[0, 0].item(), 4)).after
    0.2857
    """
    wanted = formats.recommended() if isinstance(formats, PrecisionReport) else dict(formats)
    schemes = {name: scheme_of(label) for name, label in wanted.items()}
    parameters = _parameters(model, wanted)
    before = float(metric(model))
    with _rounded(parameters, schemes):
        after = float(metric(model))
    alone = {}
    for name in schemes if each else ():
        with _rounded(parameters, {name: schemes[name]}):
            alone[name] = float(metric(model))
    return PrecisionTrial(before, after, wanted, alone)


def _parameters(model: nn.Module, wanted: Mapping[str, str]) -> dict[str, Tensor]:
    known = {canonical(n): p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    known |= {canonical(n): b.detach() for n, b in model.named_buffers() if canonical(n) not in known}
    if missing := [name for name in wanted if name not in known]:
        raise ValueError(
            f"expected tensors of the model, but it has no {', '.join(missing[:3])}: "
            "give the report of this model"
        )
    if cut := [name for name in wanted if is_sharded(known[name])]:
        raise ValueError(f"expected whole tensors, but {cut[0]} is sharded: gather the full state first")
    return known


@contextmanager
def _rounded(parameters: Mapping[str, Tensor], schemes: Mapping[str, Scheme]) -> Iterator[None]:
    kept: dict[str, Tensor] = {}
    try:
        for name, scheme in schemes.items():
            tensor = parameters[name]
            kept[name] = tensor.clone()
            with torch.no_grad():
                tensor.copy_(_quantised(kept[name], scheme))
        yield
    finally:
        with torch.no_grad():
            for name, copy in reversed(kept.items()):  # of tied weights the first copy is the original
                parameters[name].copy_(copy)


def _quantised(tensor: Tensor, scheme: Scheme) -> Tensor:
    """A tensor as it is read back from a format; elements that are not finite stay what they are."""
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    whole = tensor.to("cpu", wide).numpy()
    rows = whole.reshape(whole.shape[0], -1) if whole.ndim >= 2 else whole.reshape(1, -1)
    good = np.isfinite(rows)
    found, _ = quantised(np.where(good, rows, 0).astype(rows.dtype), scheme)
    return torch.from_numpy(np.where(good, limited(found, scheme), rows).reshape(whole.shape))
