"""Sets of whole numbers from 0 on, as sorted intervals that do not touch."""

from __future__ import annotations

from collections.abc import Iterable

Intervals = list[tuple[int, int]]  # low <= x < high

#: Beyond every number.
ENDLESS = 1 << 62
EVERYTHING: Intervals = [(0, ENDLESS)]


def union(a: Intervals, b: Iterable[tuple[int, int]]) -> Intervals:
    """What is in one of them or in both."""
    merged: Intervals = []
    for low, high in sorted([*a, *b]):
        if merged and low <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        elif low < high:
            merged.append((low, high))
    return merged


def intersection(a: Intervals, b: Intervals) -> Intervals:
    """What is in both."""
    found = [(max(p, r), min(q, s)) for p, q in a for r, s in b if max(p, r) < min(q, s)]
    return union(found, [])


def subtract(a: Intervals, b: Intervals) -> Intervals:
    """What is in `a` and not in `b`."""
    for low, high in b:
        a = [piece for p, q in a for piece in ((p, min(q, low)), (max(p, high), q)) if piece[0] < piece[1]]
    return a


def widened(a: Intervals, size: int) -> Intervals:
    """All bins of this size that it reaches into."""
    return union([(low // size * size, -(-high // size) * size) for low, high in a], [])
