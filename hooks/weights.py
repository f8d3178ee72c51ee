"""Torch's state_dicts and checkpoints as `monitor.weights` reads them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..monitor.errors import WeightsError
from ..monitor.weights import STORAGE, Entry, Weights
from .checkpoint import load_state
from .torch_file import TorchFile, packed

#: Types that numpy lacks: seen as integers of the same size.
_AS_INTEGERS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}


def open_torch(path: Path) -> Weights:
    """A file that torch.save wrote: read in blocks; of the format before torch 1.6, or with a torch before
    2.6, loaded.

    Raises:
        WeightsError: it holds no tensors, or something else than tensors, or it is damaged.
    """
    if zipfile.is_zipfile(path) and hasattr(torch.UntypedStorage, "_checkpoint_offset"):
        return TorchFile(path)
    return StateWeights(path)


class StateWeights(Weights):
    """A state_dict, or a checkpoint that holds one.

    Args:
        state: names -> tensors, on any device; below "state_dict", "model_state_dict" or "model" is looked
            into as well. A path: of a file that torch.save wrote, loaded with weights_only=True; `open_torch`
            reads it without holding it.

    Raises:
        WeightsError: it holds no tensors, or something else than tensors, or it is damaged.
    """

    def __init__(self, state: Mapping[str, Any] | str | Path, label: str | None = None) -> None:
        is_path = isinstance(state, str | Path)
        super().__init__(label or (str(state) if is_path else "state_dict"))
        try:
            loaded = load_state(state, names=str)
        except (TypeError, ValueError) as error:
            raise WeightsError(str(error)) from None
        self._tensors: dict[str, Tensor] = {}
        for name, tensor in loaded.tensors.items():
            kind = str(tensor.dtype).removeprefix("torch.")
            no_data = "it has no data (device meta)" if tensor.device.type == "meta" else ""
            if why := packed(tensor, kind) or no_data:
                self.problems[name] = why
            else:
                self.entries[name] = Entry(name, tuple(tensor.shape), kind)
                self._tensors[name] = tensor.detach()

    def stored(self, name: str, start: int, stop: int) -> NDArray[Any]:
        whole = self._tensors[name]
        if whole.is_complex():
            whole = torch.view_as_real(whole.resolve_conj())
        part = whole.reshape(-1)[start:stop]
        kept = part.view(_AS_INTEGERS.get(part.dtype, part.dtype)).cpu().numpy()
        return kept.view(STORAGE[self.entries[name].dtype])
