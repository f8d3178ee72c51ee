"""What the user chose in `watch`, for the parts that act on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

Anchors = int | Sequence[int] | None


@dataclass(frozen=True)
class Settings:
    """See `watch` for the meaning of each.

    `reference` is a loaded state ({} when drift is measured from the start, None when it is not measured).
    """

    activations: bool = True
    updates: bool = True
    reference: Mapping[str, Tensor] | None = None
    reference_memory: int | None = None
    anchors: Anchors = None
    step_norms: bool = False

    @property
    def from_start(self) -> bool:
        """Drift is measured from the weights before the first step."""
        return self.reference is not None and not self.reference
