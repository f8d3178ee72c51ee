"""LoRA adapters as files hold them: which low-rank change belongs to which tensor of the base model.

Known are the layouts of PEFT (its folders, and checkpoints of a model that carries adapters), loralib, and
kohya / diffusers (lora_down, lora_up, alpha).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import WeightsError
from .lowrank import LowRank
from .names import canonical
from .source import Weights

#: owner, part, then the adapter's name in checkpoints of PEFT.
_NAME = re.compile(
    r"(?P<owner>.+?)[._](?P<part>lora_embedding_A|lora_embedding_B|lora_A|lora_B|lora_magnitude_vector"
    r"|lora[._]down|lora[._]up|lora_mid|trainable_tokens_delta)"
    r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_PARTS = {"lora_embedding_A": "A", "lora_embedding_B": "B", "lora_A": "A", "lora_B": "B", "lora_down": "A",
          "lora_up": "B", "lora_magnitude_vector": "magnitude", "lora_mid": "mid",
          "trainable_tokens_delta": "tokens"}  # fmt: skip
#: Settings of PEFT's LoRA that make the change something else than scale * B A.
_OTHER = ("use_qalora", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config", "layer_replication",
          "alora_invocation_tokens")  # fmt: skip
#: Ways to begin that change the base weights, too: the adapter goes with those, not with the published ones.
_MOVES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


class Pair(NamedTuple):
    """The low-rank change of one tensor.

    Attributes:
        owner: the base module's canonical name; in kohya's files with _ in place of dots.
        a, b: stored names of the factors: A (r, in ...) and B (out, r ...).
        scale: what B A is multiplied by.
        turned: the base weight is stored as (in, out), as far as the file tells: embeddings, Conv1D.
        embedding: it is an embedding.
        magnitude: stored name of DoRA's magnitudes. bias: of the change of the bias, times scale as well.
    """

    owner: str
    a: str
    b: str
    scale: float
    turned: bool = False
    embedding: bool = False
    magnitude: str | None = None
    bias: str | None = None


@dataclass
class Adapter:
    """What an adapter changes.

    Attributes:
        weights: where its tensors are.
        pairs: canonical name of the changed tensor, as the adapter knows it -> its change.
        replaced: canonical name -> stored name of tensors that were trained as a whole (modules_to_save).
        problems: tensor or setting -> why it is not covered. The rest is.
        holds_base: the base model is in `weights`, too. own: stored names that are the adapter's.
    """

    weights: Weights
    pairs: dict[str, Pair] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    holds_base: bool = False
    own: set[str] = field(default_factory=set)

    def shape(self, pair: Pair) -> tuple[int, int]:
        """(out, in * ...) of the change: of a convolution's kernel all but the first dimension are one.

        Raises:
            WeightsError: the factors do not fit each other.
        """
        a, b = (as_matrix(self.weights.entries[name].shape) for name in (pair.a, pair.b))
        if 0 in (*a, *b) or a[0] != b[1]:
            raise WeightsError(f"expected factors of (r, in) and (out, r), got {a} and {b}")
        return b[0], a[1]

    def change(self, pair: Pair) -> LowRank:
        """scale * B A, in the shape that `shape` tells."""
        return LowRank(self.matrix(pair.b), self.matrix(pair.a), pair.scale)

    def matrix(self, name: str) -> NDArray[np.floating]:
        """One of its tensors: (first dimension, the others)."""
        entry = self.weights.entries[name]
        return self.weights.values(name, 0, entry.elements).reshape(as_matrix(entry.shape))


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def adapter_of(weights: Weights, *, alpha: float | None = None, name: str | None = None) -> Adapter | None:
    """The adapter that weights hold; None when they hold none.

    Args:
        alpha: LoRA's alpha, where neither the file nor an adapter_config.json beside it tells: the scale is
            alpha / r. It goes before what they tell.
        name: which adapter, where a checkpoint holds several.

    Raises:
        WeightsError: there is no adapter of this name, or there are several and none is called "default".
    """
    config = weights.metadata.get("adapter_config") or {}
    found = _parts(weights)
    if not found and not config:
        return None
    adapter = Adapter(weights, problems=dict(weights.problems))
    adapter.own = {stored for parts in found.values() for stored in parts.values()}
    chosen = _choose({who for _, who in found}, name)
    stored = {canonical(n): n for n in weights.entries if n not in adapter.own}
    leaves = ("weight", "in_proj_weight")
    adapter.holds_base = any(f"{owner}.{leaf}" in stored for owner, _ in found for leaf in leaves)
    if why := _not_covered(config, bool(found), adapter.holds_base):
        adapter.problems["adapter_config.json"] = why
        return adapter
    for (owner, who), parts in found.items():
        if who != chosen:
            adapter.problems[f"{owner} ({who})"] = f"another adapter than {chosen}: not applied"
        elif why := _incomplete(parts, weights):
            adapter.problems[owner] = why
        else:
            _take(adapter, owner, parts, config, alpha)
    if not adapter.holds_base:
        alphas = {f"{owner}.alpha" for owner, _ in found}
        adapter.replaced = {to: n for to, n in stored.items() if to not in alphas}
    return adapter


def _parts(weights: Weights) -> dict[tuple[str, str], dict[str, str]]:
    """(owner, adapter's name) -> part -> stored name."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for stored in weights.entries:
        if match := _NAME.fullmatch(stored):
            part = _PARTS[match["part"].replace("lora.", "lora_")]
            if match["leaf"] == "bias":
                part += " bias"
            if "embedding" in match["part"]:
                part = f"embedding {part}"
            owner = canonical(match["owner"] + ".").removesuffix(".")
            found.setdefault((owner, match["adapter"] or ""), {})[part] = stored
    return found


def _choose(names: set[str], asked: str | None) -> str:
    unknown = asked not in names if asked is not None else len(names) > 1 and "default" not in names
    if unknown:
        raise WeightsError(
            f"expected the name of one of the adapters {', '.join(sorted(names))}, got {asked}: pass name="
        )
    return asked if asked is not None else "default" if "default" in names else min(names, default="")


def _not_covered(config: Mapping[str, Any], has_pairs: bool, holds_base: bool) -> str:
    kind = config.get("peft_type", "LORA")
    merge = "merge it (merge_and_unload) and compare the merged weights"
    if kind != "LORA" or not has_pairs:
        return f"expected an adapter of type LORA with lora_A and lora_B, got type {kind}: {merge}"
    if used := [key for key in _OTHER if config.get(key)]:
        return f"expected plain LoRA or DoRA, got {', '.join(used)}: {merge}"
    began = str(config.get("init_lora_weights", "")).lower()
    if began.startswith(_MOVES_BASE) and not holds_base:
        return (
            f"init_lora_weights={began} changed the base weights before training, and the adapter holds only "
            f"the rest: {merge}"
        )
    return ""


def _incomplete(parts: Mapping[str, str], weights: Weights) -> str:
    if "tokens" in parts:
        return "trained rows of an embedding (trainable_token_indices) are not covered"
    if "mid" in parts:
        return "a kernel in three factors (lora_mid) is not covered"
    for part in ("A", "B"):
        if part not in parts and f"embedding {part}" not in parts:
            return f"its factor {part} is missing or cannot be read"
    dtypes = {n: weights.entries[n].dtype for n in parts.values() if not weights.entries[n].is_float}
    return f"expected factors of floating-point numbers, got {dtypes}" if dtypes else ""


def _take(
    adapter: Adapter, owner: str, parts: Mapping[str, str], config: Mapping[str, Any], alpha: float | None
) -> None:
    embedding = "embedding A" in parts
    a, b = (parts[f"embedding {p}" if embedding else p] for p in ("A", "B"))
    scale = _scale(adapter.weights, owner, a, config, alpha)
    if scale is None:
        adapter.problems[owner] = (
            "its scale is not in the file: keep adapter_config.json beside it, or pass alpha="
        )
        return
    if ".base_layer.out_proj.lora_" in a:  # PEFT's layer for nn.MultiheadAttention adds this product twice,
        scale *= 2  # in its forward pass and when it merges (as of 0.21)
    turned = embedding or bool(config.get("fan_in_fan_out"))
    pair = Pair(owner, a, b, scale, turned, embedding, parts.get("magnitude"), parts.get("B bias"))
    adapter.pairs[f"{owner}.weight"] = pair


def _scale(
    weights: Weights, owner: str, a: str, config: Mapping[str, Any], alpha: float | None
) -> float | None:
    """alpha / r, of rank-stabilised LoRA alpha / sqrt(r) (Kalajdzievski 2023); alpha as PEFT looks it up."""
    rank = weights.entries[a].shape[0] if weights.entries[a].shape else 0
    named = _NAME.fullmatch(a)
    stored = f"{named['owner']}.alpha" if named else ""
    if alpha is None and stored in weights.entries:
        alpha = float(weights.values(stored, 0, 1)[0])
    elif alpha is None and "down" in a:  # kohya's and diffusers' files: without alpha it is r
        return 1.0
    elif alpha is None and "lora_alpha" in config:
        patterns = config.get("alpha_pattern") or {}
        key = next((k for k in patterns if re.match(rf"(.*\.)?({k})$", owner)), None)
        alpha = float(config["lora_alpha"] if key is None else patterns[key])
    if alpha is None or not rank:
        return None if alpha is None else 0.0
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
