"""Weight files and state_dicts: read in blocks, matched, compared. numpy and numba only."""

from .adapted import Adapted, AdapterChange, applied, effective
from .adapters import Adapter, adapter_of
from .lowrank import LowRank
from .names import block_of, canonical, matched, pattern_of, role_of
from .opening import Shards, open_path
from .safetensors_file import SafetensorsFile
from .source import BLOCK, STORAGE, ArrayWeights, Entry, Weights, decoded

__all__ = [
    "BLOCK",
    "STORAGE",
    "Adapted",
    "Adapter",
    "AdapterChange",
    "ArrayWeights",
    "Entry",
    "LowRank",
    "SafetensorsFile",
    "Shards",
    "Weights",
    "adapter_of",
    "applied",
    "block_of",
    "canonical",
    "decoded",
    "effective",
    "matched",
    "open_path",
    "pattern_of",
    "role_of",
]
