"""Is that far? Against the same tensor of other blocks, and against what the logged updates could reach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .names import pattern_of

if TYPE_CHECKING:
    from ..run import Run

#: So many tensors make a yardstick.
FEWEST = 4
#: Unusual: so many times as far as the median of its like ...
TIMES = 5.0
#: ... and so many robust standard deviations of the logarithm away from it (1.4826 x the median deviation).
DEVIATIONS = 4.0
#: A spread below this share is rounding: likes that all moved by the very same share.
_LEAST_SPREAD = 0.05
#: Moved further than all logged updates together reach, by more than sampling explains.
BEYOND = 1.5


class Reach(NamedTuple):
    """What updates could do to a tensor: `walk` if their directions are independent, sqrt(sum |u|^2); `path`
    if all point the same way, sum |u|. Updates of steps that were not captured are taken as the next captured
    one's."""

    walk: float
    path: float
    captured: int
    steps: int


def judge(rows: Sequence[dict[str, Any]], reaches: Mapping[str, Reach] | None = None) -> None:
    """Add to each row `like` (whom it was compared with), `times_like`, `unusual` (the reason, or None), and
    `random_walk`, `times_random_walk` where the updates are known."""
    likes = _likes(rows)
    for row in rows:
        row |= {"like": None, "times_like": None, "unusual": None}
        row |= {"random_walk": None, "times_random_walk": None}
        far, reasons = row.get("relative_l2"), []
        like, others = likes.get(row["tensor"], (None, []))
        if far is not None and like is not None:
            row |= _against(far, like, others, reasons)
        reach = (reaches or {}).get(row["tensor"])
        if reach is not None and row.get("distance") is not None:
            row |= _against_updates(row["distance"], reach, reasons)
        if row.get("not_finite"):
            reasons.append(f"{row['not_finite']} elements are NaN or infinite")
        row["unusual"] = "; ".join(reasons) or None


def _likes(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[str, list[float]]]:
    """Tensor -> its pattern, or its role, and how far the others of it moved."""
    known = [row for row in rows if row.get("relative_l2") is not None]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in known:
        groups.setdefault(pattern_of(row["tensor"]), []).append(row)
        groups.setdefault(f"role {row['role']}", []).append(row)
    found = {}
    for row in known:
        for name in (pattern_of(row["tensor"]), f"role {row['role']}"):
            others = [other["relative_l2"] for other in groups[name] if other is not row]
            if len(others) >= FEWEST - 1:
                found[row["tensor"]] = (name, others)
                break
    return found


def _against(far: float, like: str, others: Sequence[float], reasons: list[str]) -> dict[str, Any]:
    middle = float(np.median(others))
    name = f"{len(others)} others of {like}"
    if middle == 0:
        if far > 0 and sum(o > 0 for o in others) * 4 <= len(others):
            reasons.append(f"moved, though most of the {name} did not at all")
        return {"like": like, "times_like": None}
    times = far / middle
    if far == 0:
        if min(others) > 0:
            reasons.append(f"did not move at all, though all {name} did")
        return {"like": like, "times_like": 0.0}
    logs = np.log([o for o in others if o > 0])
    spread = 1.4826 * float(np.median(np.abs(logs - np.median(logs))))
    away = (math.log(far) - float(np.median(logs))) / max(spread, _LEAST_SPREAD)
    if times >= TIMES and away > DEVIATIONS:  # less is usual: early layers move less than late ones
        reasons.append(f"moved {times:.3g} times as far as the median of the {name}")
    return {"like": like, "times_like": times}


def _against_updates(distance: float, reach: Reach, reasons: list[str]) -> dict[str, Any]:
    if not reach.walk:
        if distance > 0:
            reasons.append("moved, though no update of it was logged")
        return {}
    if distance > BEYOND * reach.path:
        reasons.append(
            f"moved {distance / reach.path:.3g} times as far as its {reach.steps} updates together can "
            "reach: something besides the optimizer changed it"
        )
    return {"random_walk": reach.walk, "times_random_walk": distance / reach.walk}


def reaches(run: Run, first: int | None = None, last: int | None = None) -> dict[str, Reach]:
    """What the updates that a run logged could reach, by tensor; of the steps first to last, both
    included."""
    frame = run.stats("update", columns=["step", "tensor", "norm"], steps=(first, last))
    begin = -1 if first is None else first - 1
    found = {}
    for tensor, rows in frame.groupby("tensor", sort=False):
        steps, norms = rows["step"].to_numpy(), rows["norm"].to_numpy(np.float64)
        gaps = np.diff(steps, prepend=begin)
        sizes = np.where(np.isfinite(norms), norms, 0.0)
        found[str(tensor)] = Reach(
            math.sqrt(float((gaps * sizes**2).sum())),
            float((gaps * sizes).sum()),
            len(steps),
            int(gaps.sum()),
        )
    return found
