"""What drift is measured from: a copy of the weights at the start, or a checkpoint."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..monitor import kernels
from ..monitor.summary import Summary
from .statistics import Array, parts_of
from .tensors import WatchedTensor, canonical

#: Tensors up to this size keep a copy in full precision; larger ones a bf16 copy, half the memory.
EXACT_ELEMENTS = 65_536

Source = str | Path | Mapping[str, Any] | None


class Reference:
    """Copies of the reference tensors, and the distance of the weights from them.

    A bf16 copy r' of r differs from it by the rounding residual. The distance to r' is larger than the one to
    r by the residual's norm, as the residual is independent of the training's direction: |w - r|^2 = |w -
    r'|^2 - |r - r'|^2 up to their correlation (measured: an error of at most 0.07 % on real trajectories).
    """

    def __init__(self) -> None:
        self._exact: dict[str, Array] = {}
        self._rounded: dict[str, tuple[Array, float]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._exact or name in self._rounded

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a copy of a reference tensor."""
        values = parts_of(tensor)
        if values.size <= EXACT_ELEMENTS or values.dtype == np.float64:
            self._exact[name] = values.copy()
            return
        rounded = torch.from_numpy(values).to(torch.bfloat16)
        residual = torch.from_numpy(values).double() - rounded.double()
        self._rounded[name] = (rounded.view(torch.int16).numpy(), float(residual.square().sum()))

    def measure(self, name: str, weight: Tensor) -> Summary | None:
        """The drift row of a weight; None when the reference does not have it or its shape is another."""
        now, out = parts_of(weight), np.zeros(4)
        residual = None
        if name in self._exact:
            reference = self._exact[name]
            if reference.size != now.size:
                return None
            kernels.drift32(now, reference.astype(now.dtype, copy=False), out)
        elif name in self._rounded:
            bits, residual = self._rounded[name]
            if bits.size != now.size:
                return None
            kernels.drift_bf16(now.astype(np.float32, copy=False), bits, out)
        else:
            return None
        distance, dot, squares, flips = (float(v) for v in out)
        return Summary(
            count=weight.numel(),
            sum_sq=distance,
            dot=dot,
            ref_sum_sq=squares,
            sign_flips=int(flips),
            residual_sq=residual,
        )


def load_state(source: Source) -> Mapping[str, Tensor]:
    """A reference as a mapping of names to tensors.

    Args:
        source: a state_dict, or the path of a .safetensors, .pt, .pth or .bin file (read with
            weights_only=True). Below "state_dict", "model_state_dict" or "model" is looked into as well.

    Raises:
        TypeError: it is neither.
        ValueError: the file does not exist, is of another type or damaged, or holds no tensors.
    """
    if not isinstance(source, str | Path | Mapping):
        raise TypeError(
            f'expected reference="start", None, a state_dict or a path, got {type(source).__name__}'
        )
    state = source if isinstance(source, Mapping) else _read_checkpoint(Path(source))
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    named = state.items() if isinstance(state, Mapping) else ()
    tensors = {canonical(k): v for k, v in named if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise ValueError(
            "expected a reference that maps names to tensors, got none: pass model.state_dict() or its file"
        )
    return tensors


def _read_checkpoint(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(
            f'expected reference="start", None, a state_dict or a checkpoint file, got {str(path)!r}: '
            "no such file"
        )
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise ValueError(f"expected a .safetensors, .pt or .bin checkpoint as reference, got {path.name!r}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # Only checkpoints of the zip format, the usual one since torch 1.6, can be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # every kind of damage has its own type of error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"expected a checkpoint that holds tensors only, but {path} cannot be read ({reason:.120}): "
            "save model.state_dict()"
        ) from None


def match(tensors: list[WatchedTensor], state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The reference tensor of each watched one, by any of its names, else by the longest common ending of
    names.

    Returns:
        matched (watched name -> reference tensor) and the watched names that have none of the same shape.
    """
    endings: dict[str, list[str]] = {}
    for name in state:
        parts = name.split(".")
        for start in range(len(parts)):
            endings.setdefault(".".join(parts[start:]), []).append(name)
    matched, missing = {}, []
    for tensor in tensors:
        name = next((n for n in tensor.names if n in state), None) or _by_ending(tensor, state, endings)
        if name is not None and state[name].shape == tensor.parameter.shape:
            matched[tensor.name] = state[name]
        else:
            missing.append(tensor.name)
    return matched, missing


def _by_ending(
    tensor: WatchedTensor, state: Mapping[str, Tensor], endings: dict[str, list[str]]
) -> str | None:
    """`0.auto_model.encoder.x` is `encoder.x` of a bare checkpoint, and the other way round; only when it is
    the only one."""
    for own in tensor.names:
        parts = own.split(".")
        for start in range(1, len(parts)):
            ending = ".".join(parts[start:])
            if "." in ending and ending in state:
                return ending
        longer = endings.get(own, [])
        if len(longer) == 1:
            return longer[0]
    return None
