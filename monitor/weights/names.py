"""Names of tensors: the same one in two checkpoints, its role, its block, its like in other blocks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .source import Entry

#: Parts that wrappers put into names: DDP and EMA copies, compile, FSDP, checkpointing, Lightning; then PEFT:
#: the model, a layer beside its adapter, the trained copy of a module.
_WRAPPERS = re.compile(
    r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module"
    r"|base_model\.model|base_layer|modules_to_save\.\w+)\."
)
_NORM = re.compile(r"(norm|(^|[._])(ln|bn)([._]|\d|$))", re.IGNORECASE)
_EMBEDDING = re.compile(r"(embed|(^|\.)(wte|wpe|tok_emb|pos_emb)\.)", re.IGNORECASE)
_OUTPUT = re.compile(
    r"(^|\.)(lm_head|score|classifier|head|fc_out|output_projection|cls\.predictions\.decoder)\."
)
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def canonical(name: str) -> str:
    """A parameter's name without what wrappers add.

    >>> canonical("module._orig_mod.layers.0.weight")
    'layers.0.weight'
    >>> canonical("base_model.model.layers.0.base_layer.weight")
    'layers.0.weight'
    """
    return _WRAPPERS.sub("", name)


def role_of(name: str, shape: tuple[int, ...]) -> str:
    """bias, norm_gain, norm_bias, embedding, lora_a, lora_b, output, conv, matrix, scalar or other, by name
    and shape alone: a file does not tell what module a tensor belongs to. A guess where names are unusual.

    >>> role_of("encoder.layer.0.attention.self.query.weight", (384, 384))
    'matrix'
    >>> role_of("lm_head.weight", (32000, 4096)), role_of("model.norm.weight", (4096,))
    ('output', 'norm_gain')
    >>> role_of("embed.lora_embedding_A", (8, 100))
    'lora_a'
    """
    owner, _, leaf = name.rpartition(".")
    lower = name.lower().replace("lora_embedding_", "lora_")
    for lora, other in (("lora_a", "lora_down"), ("lora_b", "lora_up")):
        if lora in lower or other in lower:
            return lora
    if len(shape) < 2 and _NORM.search(owner):
        return "norm_bias" if leaf in ("bias", "beta") else "norm_gain"
    if leaf.endswith("bias") or leaf.startswith("bias"):
        return "bias"
    if _EMBEDDING.search(name) and len(shape) == 2:
        return "embedding"
    if _OUTPUT.search(name) and len(shape) == 2:
        return "output"
    if len(shape) >= 3:
        return "conv"
    if len(shape) == 2:
        return "matrix"
    return "scalar" if not shape or shape == (1,) else "other"


def block_of(name: str) -> str:
    """The block that a tensor belongs to: its name up to the first number; else what holds its module.

    >>> block_of("encoder.layer.11.output.dense.weight"), block_of("bert.embeddings.word_embeddings.weight")
    ('encoder.layer.11', 'bert.embeddings')
    >>> block_of("head.weight"), block_of("w")
    ('head', 'w')
    """
    number = _NUMBER.search(name)
    return name[: number.end()] if number else ".".join(name.split(".")[:-2]) or name.partition(".")[0]


def pattern_of(name: str) -> str:
    """The name with * in place of its numbers: tensors of one pattern are each other's like.

    >>> pattern_of("layers.3.mlp.experts.7.weight")
    'layers.*.mlp.experts.*.weight'
    """
    return _NUMBER.sub("*", name)


class Matched(NamedTuple):
    """Which tensors of two states are the same one.

    Attributes:
        pairs: canonical name, the shorter one of both -> (stored name in a, stored name in b).
        only_in_a, only_in_b: stored names without a counterpart.
    """

    pairs: dict[str, tuple[str, str]]
    only_in_a: list[str]
    only_in_b: list[str]


def matched(a: Mapping[str, Entry], b: Mapping[str, Entry]) -> Matched:
    """Match tensors by canonical name; then, of what is left, by the pair of prefixes that matches most.

    A bare encoder and the same encoder inside of a model differ by a prefix (`encoder.` against
    `0.auto_model.encoder.`). Prefixes are found by the endings that names of both sides share; the pair with
    the most matches of equal shape is taken, then the next, until none is left.
    """
    left_a = _by_canonical(a)
    left_b = _by_canonical(b)
    pairs = {name: (left_a.pop(name), left_b.pop(name)) for name in list(left_a) if name in left_b}
    while found := _best_prefixes(left_a, left_b, a, b):
        here, there = found
        for name in [n for n in left_a if n.startswith(here) and there + n[len(here) :] in left_b]:
            other = there + name[len(here) :]
            pairs[min(name, other, key=len)] = (left_a.pop(name), left_b.pop(other))
    order = {name: place for place, name in enumerate(b)}
    pairs = dict(sorted(pairs.items(), key=lambda item: order[item[1][1]]))
    return Matched(pairs, list(left_a.values()), list(left_b.values()))


def _by_canonical(entries: Iterable[str]) -> dict[str, str]:
    """Canonical name -> stored name; a stored name that is canonical itself goes first."""
    found: dict[str, str] = {}
    for name in sorted(entries, key=lambda n: canonical(n) != n):
        found.setdefault(canonical(name), name)
    order = {name: place for place, name in enumerate(entries)}
    return dict(sorted(found.items(), key=lambda item: order[item[1]]))


def _best_prefixes(
    left_a: Mapping[str, str], left_b: Mapping[str, str], a: Mapping[str, Entry], b: Mapping[str, Entry]
) -> tuple[str, str] | None:
    """The pair of prefixes that matches most of what is left. A name votes when the longest ending that it
    shares with the other side, of two parts at least, is one name's there, and the shapes are equal."""
    endings: dict[str, list[str]] = {}
    for name in left_b:
        for ending in _endings(name):
            endings.setdefault(ending, []).append(name)
    votes: Counter[tuple[str, str]] = Counter()
    for name in left_a:
        shared = next((ending for ending in _endings(name) if ending in endings), None)
        if shared is None or len(endings[shared]) > 1:
            continue
        other = endings[shared][0]
        here, there = name.removesuffix(shared), other.removesuffix(shared)
        numbered = (
            here.rstrip(".").rpartition(".")[2].isdigit() and there.rstrip(".").rpartition(".")[2].isdigit()
        )
        if not numbered and a[left_a[name]].shape == b[left_b[other]].shape:  # layer 3 is not layer 4
            votes[here, there] += 1
    # The most votes; of equal ones the shortest prefixes, which explain the names with the least.
    best = max(votes.items(), key=lambda item: (item[1], -len(item[0][0]) - len(item[0][1])), default=None)
    return best[0] if best else None


def _endings(name: str) -> list[str]:
    """The name and its endings of two whole parts at least, longest first; of one part the name itself."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(max(len(parts) - 1, 1))]
