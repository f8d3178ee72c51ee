"""Small linear sketches of large tensors: they add, subtract, and tell distances.

A count-sketch (Charikar, Chen, Farach-Colton 2002) of m counters holds sum(sign(i) x[i]) over the elements i
that a hash sends to each counter. It is linear: shards add to the whole, and the sketch of a difference is
the difference of the sketches. Its sum of squares estimates |x|^2 without bias, with a relative standard
deviation of at most sqrt(2 / m), so that a distance is off by sqrt(2 / m) at most in 95 of 100 cases (two
standard deviations), whichever elements moved. Sampled coordinates have no such bound: a few rows of an
embedding are missed.

The hash is fixed, so that processes and runs agree. With the seed of a tensor's name and the element's index
i in the whole tensor (row-major; of complex elements the real and imaginary parts in turn)

    z = splitmix64(seed + i)        counter = z mod m        sign = + if z < 2^63 else -
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from . import kernels

if TYPE_CHECKING:
    from .reader import LogReader
    from .run import Run

#: Counters of an anchor's sketch; tensors of up to so many elements are stored as they are.
COUNTERS = 4096


def seed_of(name: str) -> int:
    """The seed of a tensor: the first 8 bytes, little endian, of the BLAKE2b digest of its name in UTF-8."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def add_sketch(x: NDArray[np.floating], name: str, counters: NDArray[np.float64], *, start: int = 0) -> float:
    """Add the sketch of a part of a tensor to `counters`.

    Args:
        x: flat, contiguous (n,), float32 or float64. name: of the tensor, which seeds the hash.
        counters: (m,), m a power of two; zeros, or the sketch of other parts.
        start: the index in the whole tensor of x's first element.

    Returns:
        |x|^2.
    """
    return kernels.add_sketch(x, np.uint64((seed_of(name) + start) % 2**64), counters)


def sketch(x: NDArray[np.floating], name: str, counters: int) -> NDArray[np.float64]:
    """The sketch of a whole tensor, (counters,); see `add_sketch`."""
    found = np.zeros(counters)
    add_sketch(x, name, found)
    return found


def relative_error(counters: int) -> float:
    """Two standard deviations of an estimated distance, as a share of it.

    >>> round(relative_error(4096), 3), round(relative_error(16384), 3)
    (0.022, 0.011)
    """
    return math.sqrt(2 / counters)


def between(a: pd.DataFrame, b: pd.DataFrame, sizes: Mapping[str, int]) -> pd.DataFrame:
    """Distances of the tensors that two anchors hold in one size.

    Args:
        a, b: tensor, values (a sketch, or the tensor itself up to `COUNTERS` elements), norm.
        sizes: tensor -> elements; of complex ones twice as many. Their order is that of the result.

    Returns:
        See `Run.drift_between`. The cosine follows from the distance and the exact norms.
    """
    both = a.merge(b, on="tensor", suffixes=("_a", "_b"))
    same = [len(x) == len(y) for x, y in zip(both["values_a"], both["values_b"], strict=True)]
    both = both[np.array(same, bool) & both["tensor"].isin(list(sizes))]
    both = both.set_index("tensor").reindex([t for t in sizes if t in set(both["tensor"])]).reset_index()
    pairs = zip(both["values_a"], both["values_b"], strict=True)
    distance = np.array([np.linalg.norm(np.subtract(y, x)) for x, y in pairs], np.float64)
    size_a, size_b = both["norm_a"].to_numpy(np.float64), both["norm_b"].to_numpy(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = (size_a**2 + size_b**2 - distance**2) / (2 * size_a * size_b)
        relative = np.where(size_a > 0, distance / size_a, np.nan)
    exact = np.array([sizes[t] <= COUNTERS for t in both["tensor"]], bool)
    return pd.DataFrame(
        {
            "tensor": both["tensor"],
            "relative_l2": relative,
            "distance": distance,
            "cosine": np.clip(cosine, -1.0, 1.0),
            "error": np.where(exact, 0.0, relative_error(COUNTERS)),
        }
    )


def anchor(run: Run, log: LogReader, step: int | str) -> pd.DataFrame:
    """tensor, values and norm at an anchor of a run, or at "initial"."""
    initial = step == "initial"
    where: dict[str, Sequence[Any]] = {"kind": ["initial_sketch" if initial else "sketch"]}
    norms = run.stats("initial_weight" if initial else "weight", columns=["step", "tensor", "norm"])
    if not initial:
        where["step"] = [step] if step in run.anchors() else []
        norms = norms[norms["step"] == step]
    rows = log.table("values", ["tensor", "values"], where).to_pandas()
    if rows.empty:
        raise ValueError(f"expected an anchor of {run.name}, got {step!r}: it has {run.anchors()}")
    return rows.merge(norms[["tensor", "norm"]], "left", "tensor")
