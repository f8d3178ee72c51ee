"""What the user chose in `watch`, for the parts that act on it."""

from __future__ import annotations

from dataclasses import dataclass

from .reference import Reference
from .sketch import AnchorSketches
from .system import Sampler


@dataclass(frozen=True)
class Settings:
    """See `watch` for the meaning of each. `reference` is None when drift is not measured, `system` when
    the machine is not."""

    activations: bool = True
    updates: bool = True
    reference: Reference | None = None
    anchors: AnchorSketches | None = None
    step_norms: bool = False
    log_loss: bool = False
    local_gradients: bool = False
    system: Sampler | None = None
