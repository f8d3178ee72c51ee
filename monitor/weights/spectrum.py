"""Singular values and vectors of large matrices and of their change, without holding the matrix.

Up to `EXACT` on the smaller side: from the Gram matrix of that side, in double precision, exact but for
singular values below 1e-7 of the largest. Beyond: the leading ones by a randomised range finder with power
iterations (Halko, Martinsson, Tropp 2011). Each pass reads the matrix in blocks of rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .source import Weights

Floats = NDArray[np.float64]
#: (place of the first row, rows) of a matrix, from its start, each time it is called.
Rows = Callable[[], Iterable[tuple[int, NDArray[np.floating]]]]

#: The smaller side up to which all singular values are computed: about a second.
EXACT = 1024
#: Else so many, with as many more columns as the method recommends, and so many power iterations.
LEADING, EXTRA, ITERATIONS = 64, 16, 2
#: Leading singular vectors that are compared, and the cosine below which one of the tuned matrix is like none
#: of the original: an intruder dimension (Shuttleworth et al. 2024, arXiv 2410.21228).
COMPARED, ALIKE = 10, 0.5


@dataclass(frozen=True)
class Spectrum:
    """Leading singular values, descending (k,), and singular vectors (side, k) of the matrix's smaller side.

    `squares`: |M|^2, the sum of squares of all singular values. `exact`: these are all of them.
    """

    values: Floats
    vectors: Floats
    squares: float
    exact: bool

    @property
    def stable_rank(self) -> float | None:
        """|M|_F^2 / sigma_1^2 (Rudelson, Vershynin 2007); None of a zero matrix."""
        top = float(self.values[0]) if len(self.values) else 0.0
        return self.squares / top**2 if top > 0 else None

    @property
    def effective_rank(self) -> float | None:
        """exp of the entropy of sigma / sum(sigma) (Roy, Vetterli 2007); None of a zero matrix.

        Where only the leading values are known it is a lower bound: what is left of the squares is taken as
        values as large as the last one known, which is the fewest that it can be.
        """
        values = self.values[self.values > 1e-7 * max(self.values.max(initial=0.0), 1e-300)]
        if not len(values):
            return None
        rest = 0.0 if self.exact else max(self.squares - float((values**2).sum()), 0.0) / values[-1] ** 2
        total = values.sum() + rest * values[-1]
        shares = values / total
        entropy = -(shares * np.log(shares)).sum() - rest * shares[-1] * math.log(shares[-1])
        return float(math.exp(entropy))


def spectrum(rows: Rows, shape: tuple[int, int]) -> Spectrum:
    """Singular values and vectors of the matrix (m, n) that `rows` reads. Elements that are not finite count
    as zeros."""
    tall = shape[0] >= shape[1]
    if min(shape) <= EXACT:
        gram = _gram(rows, shape, tall)
        values, vectors = np.linalg.eigh(gram)
        kept = np.sqrt(np.maximum(values[::-1], 0.0))
        return Spectrum(kept, vectors[:, ::-1], float(np.trace(gram)), True)
    return _randomised(rows, shape, tall)


def _clean(block: NDArray[np.floating]) -> Floats:
    return np.nan_to_num(block.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def _gram(rows: Rows, shape: tuple[int, int], tall: bool) -> Floats:
    side = min(shape)
    gram = np.zeros((side, side))
    if tall:
        for _, block in rows():
            clean = _clean(block)
            gram += clean.T @ clean
        return gram
    # Rows against rows: each block with itself and with all before it, which are read again.
    for first, block in rows():
        clean = _clean(block)
        last = first + len(clean)
        gram[first:last, first:last] = clean @ clean.T
        for other, earlier in rows():
            if other >= first:
                break
            gram[first:last, other : other + len(earlier)] = clean @ _clean(earlier).T
            gram[other : other + len(earlier), first:last] = gram[first:last, other : other + len(earlier)].T
    return gram


def _randomised(rows: Rows, shape: tuple[int, int], tall: bool) -> Spectrum:
    count = min(LEADING + EXTRA, min(shape))
    basis = np.random.default_rng(0).standard_normal((shape[1], count))
    squares = 0.0
    for turn in range(ITERATIONS + 1):
        found, squares = _times(rows, basis, shape)
        left = np.linalg.qr(found)[0]
        small = _transposed_times(rows, left, shape)  # (n, count): M^T Q
        basis = np.linalg.qr(small)[0] if turn < ITERATIONS else small
    right, values, inner = np.linalg.svd(basis, full_matrices=False)
    vectors = right if tall else left @ inner.T
    return Spectrum(values[:LEADING], vectors[:, :LEADING], squares, False)


def _times(rows: Rows, basis: Floats, shape: tuple[int, int]) -> tuple[Floats, float]:
    """M @ basis, and |M|^2."""
    found, squares = np.empty((shape[0], basis.shape[1])), 0.0
    for first, block in rows():
        clean = _clean(block)
        squares += float(np.vdot(clean, clean))
        found[first : first + len(clean)] = clean @ basis
    return found, squares


def _transposed_times(rows: Rows, left: Floats, shape: tuple[int, int]) -> Floats:
    found = np.zeros((shape[1], left.shape[1]))
    for first, block in rows():
        clean = _clean(block)
        found += clean.T @ left[first : first + len(clean)]
    return found


def spectra(a: Weights, b: Weights, pair: tuple[str, str], until: float = math.inf) -> dict[str, Any]:
    """What the singular values and vectors tell of a matrix that became another one of its shape.

    Args:
        until: when to give up, by time.monotonic().

    Returns:
        stable_rank_a, stable_rank_b, stable_rank_change; effective_rank_change (`effective_rank_exact`: else
        a lower bound); overlap: the share of b's leading 10 singular vectors that lies in the span of a's
        leading 10, of the smaller side; intruders: how many of b's leading 10 are like none of a's (|cos| <
        0.5), intruders_undecided: of how many that could not be told.

    Raises:
        TimeoutError: there was no time for it.
    """
    shape = a.entries[pair[0]].shape
    matrix = (shape[0], math.prod(shape[1:]))

    def change() -> Iterable[tuple[int, NDArray[np.floating]]]:
        for (first, old), (_, new) in zip(a.rows(pair[0]), b.rows(pair[1]), strict=True):
            yield first, new.astype(np.float64) - old

    one = spectrum(_timed(lambda: a.rows(pair[0]), until), matrix)
    two = spectrum(_timed(lambda: b.rows(pair[1]), until), matrix)
    moved = spectrum(_timed(change, until), matrix)
    return {
        "stable_rank_a": one.stable_rank,
        "stable_rank_b": two.stable_rank,
        "stable_rank_change": moved.stable_rank,
        "effective_rank_change": moved.effective_rank,
        "effective_rank_exact": moved.exact,
        **_directions(one, two),
    }


def _timed(rows: Rows, until: float) -> Rows:
    def blocks() -> Iterable[tuple[int, NDArray[np.floating]]]:
        for block in rows():
            if time.monotonic() > until:
                raise TimeoutError
            yield block

    return blocks


def _directions(one: Spectrum, two: Spectrum) -> dict[str, Any]:
    nothing = {"overlap": None, "intruders": None, "intruders_undecided": None}
    if not len(one.values) or not one.values[0] or not two.values[0]:
        return nothing
    count = min(COMPARED, int((one.values > 0).sum()), int((two.values > 0).sum()))
    cosines = one.vectors.T @ two.vectors[:, :count]
    best = np.abs(cosines).max(axis=0)
    # What lies outside of the vectors of a that are known could be like one that is not.
    outside = np.zeros(count) if one.exact else 1.0 - (cosines**2).sum(axis=0)
    unlike = best < ALIKE
    decided = outside < ALIKE**2
    return {
        "overlap": float((cosines[:count] ** 2).sum() / count),
        "intruders": int((unlike & decided).sum()),
        "intruders_undecided": int((unlike & ~decided).sum()),
    }
