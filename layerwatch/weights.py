"""Where weights of all kinds come in: files, folders, state_dicts, arrays, models."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .monitor.errors import WeightsError
from .monitor.weights import Adapted, ArrayWeights, Weights, adapter_of, applied, open_path

_TORCH = (".pt", ".pth", ".bin", ".ckpt")


def open_weights(source: Any) -> Weights:
    """Weights to be read block by block; use it in a `with` statement, or `close` it.

    Args:
        source: a .safetensors file; a .pt, .pth, .bin or .ckpt file (read with weights_only=True: code in it
            never runs); the index of a sharded checkpoint; a folder as Hugging Face saves it; a state_dict;
            a torch module; a mapping of names to numpy arrays.

    Raises:
        WeightsError: nothing of it can be read. What can be is opened, and `problems` lists the rest.
        ModuleNotFoundError: torch is needed and not installed.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, str | Path):
        return open_path(source, dict.fromkeys(_TORCH, _torch_file))
    if hasattr(source, "state_dict"):
        source = source.state_dict()
    if not isinstance(source, Mapping):
        raise WeightsError(
            "expected a path, a state_dict, a module or a mapping of names to arrays, "
            f"got {type(source).__name__}"
        )
    if any(type(value).__module__.partition(".")[0] == "numpy" for value in source.values()):
        return ArrayWeights(source)
    from .hooks.weights import StateWeights

    return StateWeights(source)


def open_adapted(base: Any, adapter: Any, *, alpha: float | None = None, name: str | None = None) -> Adapted:
    """A base model and its LoRA adapter as one state: W0 + scale * B A, computed where it is asked for.

    Args:
        base, adapter: as `open_weights` takes them; a PEFT folder; a checkpoint that holds both, given twice.
        alpha: LoRA's alpha, where no adapter_config.json is beside the adapter: the scale is alpha / r.
        name: which adapter, where a checkpoint holds several.

    Raises:
        WeightsError: one of them cannot be read, or nothing of the adapter can be applied. What can be is
            applied, and `problems` lists the rest.
    """
    with ExitStack() as opened:
        trained = opened.enter_context(open_weights(adapter))
        found = adapter_of(trained, alpha=alpha, name=name)
        if found is None:
            raise WeightsError(
                f"expected an adapter (lora_A and lora_B, or lora_down and lora_up), got {trained.label}"
            )
        whole = trained if base is adapter else opened.enter_context(open_weights(base))
        together = applied(whole, found)
        opened.pop_all()  # they stay open as long as what they are together
    return together


def _torch_file(path: Path) -> Weights:
    try:
        from .hooks.weights import StateWeights
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} is a file of PyTorch's, which reading takes torch: pip install 'layerwatch[torch]'"
        ) from error
    return StateWeights(path)
