"""Real data that is already installed: handwritten digits, and English prose from Python's own manual."""

from __future__ import annotations

import itertools
import pydoc_data.topics
import random
import re
from collections.abc import Iterator

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

Batch = tuple[Tensor, Tensor]
Pair = tuple[str, str]


def digits() -> tuple[Batch, Batch]:
    """1,797 scanned digits as (images, labels) for training (3/4) and validation (1/4), stratified.

    Images are float32 of shape (n, 1, 8, 8), scaled to about zero mean and unit variance;
    labels int64 of shape (n,).
    """
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 1, 8, 8).astype(np.float32) - 4.9) / 6.0
    x, x_valid, y, y_valid = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train, valid = ((torch.from_numpy(a), torch.from_numpy(b)) for a, b in ((x, y), (x_valid, y_valid)))
    return train, valid


def batches(data: Batch, size: int, steps: int) -> Iterator[Batch]:
    """`steps` random batches: epochs, each in a new order, without the incomplete batch at the end."""
    x, y = data
    done = 0
    while True:
        for chosen in torch.randperm(len(x)).split(size):
            if done == steps:
                return
            if len(chosen) == min(size, len(x)):
                yield x[chosen], y[chosen]
                done += 1


def shifted(images: Tensor) -> Tensor:
    """Each image moved by up to one pixel in each direction; the blank border moves in."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=images.min().item())
    corners = torch.randint(0, 3, (len(images), 2)).tolist()
    return torch.stack(
        [image[:, i : i + 8, j : j + 8] for image, (i, j) in zip(padded, corners, strict=True)]
    )


def passages() -> tuple[list[Pair], list[Pair]]:
    """Neighbouring passages of Python's help topics, for training and, from other topics, for validation.

    Pairs of one topic are spread over the list, so that a batch of consecutive ones mixes topics.
    """
    topics = sorted(pydoc_data.topics.topics)
    random.Random(0).shuffle(topics)
    held_out = len(topics) // 4
    return _pairs(topics[held_out:]), _pairs(topics[:held_out])


def _pairs(topics: list[str]) -> list[Pair]:
    by_topic = [_neighbours(pydoc_data.topics.topics[topic]) for topic in topics]
    longest = max(len(pairs) for pairs in by_topic)
    return [pairs[i] for i in range(longest) for pairs in by_topic if i < len(pairs)]


def _neighbours(text: str) -> list[Pair]:
    """Pairs of consecutive paragraphs of prose; headings, grammar and code are left out."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    prose = [part for part in paragraphs if len(part) > 120 and part.endswith(".")]
    return list(itertools.pairwise(prose))
