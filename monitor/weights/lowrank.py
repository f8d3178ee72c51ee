"""A product of two thin matrices, measured without ever forming it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LowRank:
    """scale * left @ right, such as the change that LoRA makes: scale * B A (Hu et al. 2021, LoRA).

    Attributes:
        left: (n, r). right: (r, m). Floats; results are float64. What is not finite makes them NaN.
    """

    left: NDArray[np.floating]
    right: NDArray[np.floating]
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def part(self, start: int, stop: int) -> NDArray[np.floating]:
        """Elements start to stop of the flattened product: (stop - start,), in the factors' precision."""
        width = self.shape[1]
        first, last = start // width, -(-stop // width)
        begin, end = start - first * width, stop - first * width
        if last - first <= 1:  # within one row: no more of its columns than asked for
            return (self.left[first:last] @ self.right[:, begin:end]).reshape(-1) * self.scale
        return (self.left[first:last] @ self.right).reshape(-1)[begin:end] * self.scale

    @cached_property
    def _finite(self) -> bool:
        return bool(np.isfinite(self.left).all() and np.isfinite(self.right).all())

    @cached_property
    def norm(self) -> float:
        """|scale * left right|, Frobenius; its square is scale^2 tr((left^T left)(right right^T))."""
        if not self._finite:
            return math.nan
        left, right = self.left.astype(np.float64), self.right.astype(np.float64)
        return abs(self.scale) * math.sqrt(max(float(np.sum((left.T @ left) * (right @ right.T))), 0.0))

    @cached_property
    def singular_values(self) -> NDArray[np.float64]:
        """(min(r, n, m),), descending: with left = Q R and right^T = P S (QR) those of the small R S^T."""
        if not self._finite:
            return np.full(min(*self.shape, self.left.shape[1]), np.nan)
        r = np.linalg.qr(self.left.astype(np.float64), mode="r")
        s = np.linalg.qr(self.right.T.astype(np.float64), mode="r")
        return abs(self.scale) * np.linalg.svd(r @ s.T, compute_uv=False)

    @property
    def rank(self) -> int:
        """Singular values above rounding, drawn as `numpy.linalg.matrix_rank` does; 0 where not finite."""
        found = self.singular_values
        rounding = max(self.shape) * float(np.finfo(np.result_type(self.left, self.right)).eps)
        return int((found > found.max(initial=0.0) * rounding).sum()) if self._finite else 0

    @property
    def stable_rank(self) -> float:
        """|.|_F^2 / |.|_2^2, at most the rank (Rudelson and Vershynin 2007); NaN of zeros."""
        largest = self.singular_values.max(initial=0.0)
        return (self.norm / largest) ** 2 if largest > 0 else math.nan

    def dot(self, rows: Iterable[tuple[int, NDArray[np.floating]]]) -> tuple[float, float]:
        """<W, scale * left right> and |W|^2 of a matrix W of this shape, in one pass over it.

        Args:
            rows: the place of the first row and (k, m) whole rows, as `Weights.rows` gives them. No more than
                (k, r) is formed: <W, left right> = sum of left * (W right^T).
        """
        total = squares = 0.0
        right = self.right.T.astype(np.float64)
        for first, block in rows:
            block = block.astype(np.float64)
            total += float(np.sum(self.left[first : first + len(block)] * (block @ right)))
            squares += float(np.vdot(block, block))
        return self.scale * total, squares
