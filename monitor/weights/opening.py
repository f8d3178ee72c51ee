"""Files, sharded files and folders of weights, opened as one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..errors import WeightsError
from .safetensors_file import SafetensorsFile
from .source import Weights

Reader = Callable[[Path], Weights]

#: What folders hold, best first: Hugging Face's names, diffusers', then PyTorch's.
NAMES = (
    "model.safetensors.index.json", "model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors", "adapter_model.safetensors", "pytorch_model.bin.index.json",
    "pytorch_model.bin", "adapter_model.bin",
)  # fmt: skip
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


class Shards(Weights):
    """Several sources as one; a name that two of them hold is the first one's."""

    def __init__(self, label: str, parts: list[Weights]) -> None:
        super().__init__(label)
        self.parts = parts
        self._owner: dict[str, Weights] = {}
        for part in parts:
            for name, entry in part.entries.items():
                if self._owner.setdefault(name, part) is part:
                    self.entries[name] = entry
            self.problems |= {n: why for n, why in part.problems.items() if n not in self._owner}
            self.metadata = part.metadata | self.metadata

    def stored(self, name: str, start: int, stop: int) -> NDArray[Any]:
        return self._owner[name].stored(name, start, stop)

    def close(self) -> None:
        for part in self.parts:
            part.close()


def open_path(path: str | Path, readers: Mapping[str, Reader] | None = None) -> Weights:
    """A weight file, the index of a sharded one, or a folder with either, as Hugging Face saves it.

    Args:
        readers: suffix -> what reads files of PyTorch's own formats; see `layerwatch.open_weights`.

    Raises:
        WeightsError: nothing there can be read. What can be is opened, `problems` lists the rest.
    """
    path = Path(path)
    known = {".safetensors": SafetensorsFile, **(readers or {})}
    if path.is_dir():
        return _folder(path, known)
    if not path.exists():
        raise WeightsError(f"expected a weight file or a folder with one, but {path} does not exist")
    if path.name.endswith(".index.json"):
        return _indexed(path, known)
    if path.suffix not in known:
        raise WeightsError(
            f"expected a weight file ({', '.join(SUFFIXES)}), the index of a sharded one, or a folder with "
            f"one, got {path.name}"
        )
    return _with_config(known[path.suffix](path), path)


def _folder(path: Path, known: Mapping[str, Reader]) -> Weights:
    found = next((path / name for name in NAMES if (path / name).exists()), None)
    if found is None:
        opened: Weights = files_as_one(str(path), files_of(path), known)
    elif found.name.endswith(".index.json"):
        opened = _indexed(found, known)
    else:
        opened = open_path(found, known)
    opened.label = str(path)
    return opened


def _with_config(weights: Weights, path: Path) -> Weights:
    """An adapter's file with what the adapter_config.json beside it says, as PEFT saves it: in metadata."""
    beside = path.parent / "adapter_config.json"
    if path.stem == "adapter_model" and beside.is_file():
        try:
            config = json.loads(beside.read_bytes())
        except (OSError, ValueError):
            config = None
        if isinstance(config, dict):
            weights.metadata = weights.metadata | {"adapter_config": config}
        else:
            weights.problems[beside.name] = (
                "expected a JSON object, but it is damaged: save the adapter again"
            )
    return weights


def files_of(path: Path) -> list[Path]:
    """The files that hold the weights of a folder, or of the index of a sharded checkpoint; else the path.

    Raises:
        WeightsError: the folder holds none, or the index is damaged.
    """
    if path.is_dir():
        found = next((path / name for name in NAMES if (path / name).exists()), None)
        files = sorted(p for p in path.iterdir() if p.suffix == ".safetensors")
        if found is None and not files:
            raise WeightsError(
                f"expected weights in {path}, but it holds no .safetensors or pytorch_model.bin"
            )
        return files_of(found) if found is not None else files
    if not path.name.endswith(".index.json"):
        return [path]
    return sorted({path.parent / file for file in _places(path).values()})


def _places(path: Path) -> dict[str, str]:
    """What an index says: tensor -> the file that holds it."""
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        return {str(name): str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise WeightsError(
            f"expected the index of a sharded checkpoint (a JSON object with weight_map), but {path} is none"
        ) from None


def _indexed(path: Path, known: Mapping[str, Reader]) -> Weights:
    places = _places(path)
    opened = files_as_one(str(path), files_of(path), known)
    for name, file in places.items():
        if name not in opened.entries and name not in opened.problems:
            why = opened.problems.get(
                str(path.parent / file), "the index promises it, but its shard lacks it"
            )
            opened.problems[name] = why
    return opened


def files_as_one(label: str, files: list[Path], known: Mapping[str, Reader]) -> Shards:
    """All files that can be read; the others become problems.

    Raises:
        WeightsError: none can.
    """
    parts: list[Weights] = []
    problems: dict[str, str] = {}
    for file in files:
        try:
            parts.append(open_path(file, known))
        except WeightsError as error:
            problems[str(file)] = "this shard is missing" if not file.exists() else str(error)
    if not parts:
        raise WeightsError(
            f"expected the shards of {label}: {next(iter(problems.values()), 'there are none')}"
        )
    opened = Shards(label, parts)
    opened.problems |= problems
    return opened
