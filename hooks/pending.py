"""Numbers that are computed where their tensors are, and read once, at the end of a capture.

Tensors on the host are summarised on the spot. On an accelerator everything is only enqueued, so that the
training does not wait while its forward runs; `settle` fetches all of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..monitor.summary import Summary
from .statistics import array_of, summarise_array


class Pending:
    """Summaries and vectors by number; `settle` first, then `summary` and `vector`."""

    def __init__(self) -> None:
        self._summaries: list[Summary | int] = []
        self._vectors: list[NDArray | Tensor] = []
        self._batch: Any = None

    def add_summary(self, tensor: Tensor) -> int:
        """Summarise a strided tensor of any shape; its number."""
        if tensor.device.type == "cpu":
            return self.add_known(summarise_array(array_of(tensor)))
        if self._batch is None:
            from .device import DeviceBatch

            self._batch = DeviceBatch()
        self._summaries.append(self._batch.summary(tensor))
        return len(self._summaries) - 1

    def add_known(self, summary: Summary) -> int:
        """A summary that is known already."""
        self._summaries.append(summary)
        return len(self._summaries) - 1

    def add_vector(self, values: NDArray | Tensor) -> int:
        """Numbers of one dimension; their number."""
        on_host = isinstance(values, Tensor) and values.device.type == "cpu"
        self._vectors.append(values.numpy() if on_host else values)  # type: ignore[union-attr]
        return len(self._vectors) - 1

    def settle(self) -> None:
        """Wait for what is still on its way: one copy per device for all summaries, one for all vectors."""
        if self._batch is not None:
            self._batch.send()
            self._batch.wait()
            results = self._batch.results()
            self._summaries = [results[s] if isinstance(s, int) else s for s in self._summaries]
        places: dict[torch.device, list[int]] = {}
        for i, vector in enumerate(self._vectors):
            if isinstance(vector, Tensor):
                places.setdefault(vector.device, []).append(i)
        for numbers in places.values():
            tensors = [v for i in numbers if isinstance(v := self._vectors[i], Tensor)]
            together = torch.cat([t.double() for t in tensors]).cpu().numpy()
            ends = np.cumsum([t.numel() for t in tensors])[:-1]
            for i, part in zip(numbers, np.split(together, ends), strict=True):
                self._vectors[i] = part

    def clear(self) -> None:
        """Forget everything."""
        self.__init__()

    def summary(self, number: int) -> Summary:
        """What `add_summary` or `add_known` numbered so."""
        found = self._summaries[number]
        if not isinstance(found, Summary):
            raise RuntimeError("expected `settle` to be called first")
        return found

    def vector(self, number: int) -> NDArray:
        """What `add_vector` numbered so."""
        found = self._vectors[number]
        if not isinstance(found, np.ndarray):
            raise RuntimeError("expected `settle` to be called first")
        return found
