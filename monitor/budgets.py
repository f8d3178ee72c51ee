"""How far weights may drift: one limit for all, or one for each of some parts of the names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

#: Part of names -> the largest relative L2 distance, or one for all.
Limit = float | Mapping[str, float]


def checked(limit: Any, names: Iterable[str]) -> float | dict[str, float] | None:
    """A limit that can be held against these tensors, plain enough for run.json.

    Raises:
        ValueError: it is no number above 0 and no mapping of parts of these names to such numbers.
    """
    if limit is None:
        return None
    if not isinstance(limit, Mapping):
        return _above_0(limit, "drift_limit")
    if not limit:
        raise ValueError('expected a drift_limit such as {"layers.0-5": 0.01}, got an empty mapping')
    known = list(names)
    for part in limit:
        if not isinstance(part, str) or not any(covers(part, name) for name in known):
            raise ValueError(
                f"expected parts of tensors' names in drift_limit (layers.0-5 for layers.0 to layers.5), but "
                f"{part!r} is in none: names are like {', '.join(known[:3])}"
            )
    return {part: _above_0(value, f"drift_limit of {part}") for part, value in limit.items()}


def _above_0(value: Any, what: str) -> float:
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"expected a {what} above 0 (a relative L2 distance), got {value!r}")
    return number


def covers(part: str, name: str) -> bool:
    """Whether a tensor's name holds these parts, whole and in a row; 0-5 is any number from 0 to 5.

    >>> covers("layers.0-5", "model.layers.5.mlp.weight"), covers("layers.1", "layers.11.weight")
    (True, False)
    """
    wanted, parts = part.split("."), name.split(".")
    return any(
        all(_fits(want, have) for want, have in zip(wanted, parts[start:], strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )


def _fits(want: str, have: str) -> bool:
    low, dash, high = want.partition("-")
    if dash and low.isdecimal() and high.isdecimal():
        return have.isdecimal() and int(low) <= int(have) <= int(high)
    return want == have
