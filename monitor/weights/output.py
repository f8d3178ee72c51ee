"""What a moved output bias means: shifted logits, and the class prior that it implies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .names import Matched, pattern_of, role_of
from .source import Weights

#: Classes that are named: those whose prior changed most.
SHOWN = 10
#: A bias of more elements is no list of classes or words.
_MOST = 1 << 20


def output_layers(a: Weights, b: Weights, matched: Matched) -> list[dict[str, Any]]:
    """The shift of every output layer's bias.

    A bias adds to its logit whatever the input is. So softmax(bias) is the class distribution that the layer
    predicts for an input that tells nothing, its prior (Lin et al. 2017 set it so in RetinaNet; Menon et al.
    2021 shift it on purpose). Of a single output it is a sigmoid.

    Returns:
        of each output layer with a bias in both states: tensor (of the bias), classes, largest_shift (of a
        logit, the common shift taken off, which changes no probability), kl: the divergence of b's prior
        from a's in nats, moved: the classes whose prior changed most: class, shift, prior_a, prior_b.
    """
    found = []
    for name in _biases(a, b, matched.pairs):
        here, there = matched.pairs[name]
        count = a.entries[here].numbers
        old = a.values(here, 0, count).astype(np.float64)
        new = b.values(there, 0, count).astype(np.float64)
        if np.isfinite(old).all() and np.isfinite(new).all():
            found.append({"tensor": name, "classes": count, **_shift(old, new)})
    return found


def _biases(a: Weights, b: Weights, pairs: Mapping[str, tuple[str, str]]) -> list[str]:
    """By name; where no name tells, of the last of several matrices, if it has fewer outputs than inputs and
    no other block has its like."""
    shapes = {name: a.entries[here].shape for name, (here, _) in pairs.items()}
    heads = [name for name, shape in shapes.items() if role_of(name, shape) == "output"]
    if not heads:
        matrices = [
            n for n, shape in shapes.items() if role_of(n, shape) == "matrix" and n.endswith("weight")
        ]
        likes = Counter((pattern_of(n), shapes[n]) for n in matrices)
        heads = [
            n for n in matrices[-1:]
            if len(matrices) > 1 and shapes[n][0] < shapes[n][1] and likes[pattern_of(n), shapes[n]] == 1
        ]  # fmt: skip
    found = []
    for head in heads:
        bias = head.removesuffix("weight") + "bias"
        if bias in pairs and len(shapes[bias]) == 1 and shapes[bias][0] <= _MOST:
            here, there = pairs[bias]
            floats = a.entries[here].is_float and b.entries[there].is_float
            if floats and b.entries[there].shape == shapes[bias]:
                found.append(bias)
    return found


def _shift(old: NDArray[np.float64], new: NDArray[np.float64]) -> dict[str, Any]:
    one, two = prior(old), prior(new)
    shift = new - old - ((new - old).mean() if len(old) > 1 else 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = float(np.where(two > 0, two * np.log(two / one), 0.0).sum())
    most = np.argsort(-np.abs(two - one), kind="stable")[:SHOWN]
    moved = [
        {"class": int(i), "shift": float(shift[i]), "prior_a": float(one[i]), "prior_b": float(two[i])}
        for i in most
        if i < len(old)
    ]
    return {"largest_shift": float(np.abs(shift).max(initial=0.0)), "kl": max(kl, 0.0), "moved": moved}


def prior(bias: NDArray[np.float64]) -> NDArray[np.float64]:
    """softmax(bias) (classes,); of a single logit the probabilities of yes and no, (2,).

    >>> prior(np.log([0.7, 0.2, 0.1])).round(3).tolist(), prior(np.array([0.0])).tolist()
    ([0.7, 0.2, 0.1], [0.5, 0.5])
    """
    logits = np.array([bias[0], 0.0]) if len(bias) == 1 else bias
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()
