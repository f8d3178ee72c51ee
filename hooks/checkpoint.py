"""The state that drift is measured from: a state_dict or a checkpoint, matched to the model's tensors."""

from __future__ import annotations

import os
import re
import weakref
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..monitor.weights.opening import files_of
from .shards import is_sharded, local, region_of
from .tensors import WatchedTensor, canonical

#: What torch says of a pickle that names something else than tensors.
_CODE = re.compile(r"GLOBAL (\S+) was not an allowed global")

Source = str | Path | Mapping[str, Any] | None


class MappedFile:
    """A checkpoint whose bytes tensors are mapped from: one open file, or several.

    A training may write its own checkpoint over the one it started from. Replacing the file does no harm, as
    the old one stays mapped; writing into it changes the tensors, and reading behind its new end kills the
    process. So `unchanged` is asked before each use: a system call, no reading.
    """

    def __init__(self, path: Path, files: Sequence[Path] = ()) -> None:
        self.path = path
        self._descriptors: list[int] = []
        for file in files or [path]:
            self._descriptors.append(os.open(file, os.O_RDONLY))
            weakref.finalize(self, os.close, self._descriptors[-1])
        self._seen = self._look()

    def _look(self) -> list[tuple[int, int]]:
        found = [os.fstat(descriptor) for descriptor in self._descriptors]
        return [(f.st_size, f.st_mtime_ns) for f in found]

    def unchanged(self) -> bool:
        return self._look() == self._seen


@dataclass(frozen=True)
class State:
    """Tensors by canonical name, the file that they are mapped from, if they are, and what is missing."""

    tensors: Mapping[str, Tensor]
    file: MappedFile | None = None
    notes: Sequence[str] = ()


def load_state(source: Source, names: Callable[[str], str] = canonical) -> State:
    """A reference as tensors by name.

    Args:
        source: a state_dict, or the path of a .safetensors, .pt, .pth or .bin file (read with
            weights_only=True); the index of a sharded checkpoint; a folder with either, as Hugging Face
            saves it, of which shards may be missing. Below "state_dict", "model_state_dict" or "model" is
            looked into as well.
        names: what the tensors' names become.

    Raises:
        TypeError: it is neither.
        ValueError: the file does not exist, is of another type or damaged, or holds no tensors.
    """
    if not isinstance(source, str | Path | Mapping):
        raise TypeError(
            f'expected reference="start", None, a state_dict or a path, got {type(source).__name__}'
        )
    notes: list[str] = []
    state, file = (source, None) if isinstance(source, Mapping) else _read(Path(source), notes)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    named = state.items() if isinstance(state, Mapping) else ()
    tensors = {names(k): v for k, v in named if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise ValueError(
            "expected a reference that maps names to tensors, got none: pass model.state_dict() or its file"
        )
    return State(tensors, file, notes)


def _read(path: Path, notes: list[str]) -> tuple[Any, MappedFile | None]:
    if not path.is_dir() and not path.name.endswith(".index.json"):
        return _read_checkpoint(path)
    files = files_of(path)
    here = [file for file in files if file.is_file()]
    if not here:
        raise ValueError(f"expected the shards of {path}, but {files[0].name} and the others are missing")
    if gone := [file.name for file in files if file not in here]:
        notes.append(f"of the reference {path} these shards are missing: {', '.join(gone)}")
    parts = [_read_checkpoint(file) for file in here]
    mapped = all(file is not None for _, file in parts)
    whole = {name: tensor for part, _ in parts for name, tensor in part.items()}
    return whole, MappedFile(path, here) if mapped else None


def _read_checkpoint(path: Path) -> tuple[Any, MappedFile | None]:
    if not path.is_file():
        raise ValueError(
            f'expected reference="start", None, a state_dict or a checkpoint file, got {str(path)!r}: '
            "no such file"
        )
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"expected a .safetensors, .pt or .bin checkpoint as reference, got {path.name!r}")
    try:
        file = MappedFile(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path), file
        # Only checkpoints of the zip format, the usual one since torch 1.6, can be mapped.
        mapped = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        return state, file if mapped else None
    except Exception as error:  # every kind of damage has its own type of error
        raise ValueError(unreadable(path, error)) from None


def unreadable(path: object, error: Exception) -> str:
    """Why torch.load could not read a file, and what to do."""
    code = _CODE.search(str(error))
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if code:
        reason = f"it asks to run {code[1]}, code that is never run"
    elif isinstance(error, EOFError) or "central directory" in reason:
        reason = "it is cut short or damaged"
    return (
        f"expected a checkpoint that holds tensors only, but {path} cannot be read ({reason:.120}): save "
        "model.state_dict()"
    )


def match(
    tensors: Sequence[WatchedTensor], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
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
        there = None if name is None else _part(state[name], tensor)
        if there is None:
            missing.append(tensor.name)
        else:
            matched[tensor.name] = there
    return matched, missing


def _part(there: Tensor, tensor: WatchedTensor) -> Tensor | None:
    """What corresponds to the part of the parameter that is here; None when it cannot."""
    parameter, piece = tensor.parameter, tensor.piece
    if tuple(there.shape) != tensor.shape:
        return None
    if piece is not None:
        return None if is_sharded(there) else there.reshape(-1)[piece.start : piece.start + piece.numel]
    if is_sharded(there):
        same = tuple(there.placements) == tuple(getattr(parameter, "placements", ()))  # type: ignore[attr-defined]
        return local(there) if same else None
    region = region_of(parameter) if is_sharded(parameter) else None
    if region is None:
        return None if is_sharded(parameter) else there
    return there[tuple(slice(o, o + n) for o, n in zip(*region, strict=True))]


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
