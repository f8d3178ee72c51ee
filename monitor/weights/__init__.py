"""Weight files and state_dicts: read in blocks, matched, compared. numpy and numba only."""

from .names import block_of, canonical, matched, pattern_of, role_of
from .opening import Shards, open_path
from .safetensors_file import SafetensorsFile
from .source import BLOCK, STORAGE, ArrayWeights, Entry, Weights, decoded

__all__ = [
    "BLOCK",
    "STORAGE",
    "ArrayWeights",
    "Entry",
    "SafetensorsFile",
    "Shards",
    "Weights",
    "block_of",
    "canonical",
    "decoded",
    "matched",
    "open_path",
    "pattern_of",
    "role_of",
]
