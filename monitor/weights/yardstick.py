"""Is that far? Against the same tensor of other blocks, and against what the logged updates could reach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .names import pattern_of

if TYPE_CHECKING:
    from ..run import Run

#: So many tensors make a yardstick.
FEWEST = 4
#: Of more than so many a tensor is compared with all, itself among them.
MANY = 256
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
        like = likes.get(row["tensor"])
        if far is not None and like is not None:
            row |= _against(far, like, reasons)
        reach = (reaches or {}).get(row["tensor"])
        if reach is not None and row.get("distance") is not None:
            row |= _against_updates(row["distance"], reach, reasons)
        if row.get("not_finite"):
            reasons.append(f"NaN or infinite elements: {row['not_finite']}")
        row["unusual"] = "; ".join(reasons) or None


class Likes(NamedTuple):
    """The others that a tensor is compared with: how many, and of how far they moved the median, smallest and
    share above zero; of the logarithms the median and the robust spread."""

    name: str
    count: int
    middle: float
    least: float
    moved: float
    log_middle: float
    log_spread: float

    @classmethod
    def of(cls, name: str, values: NDArray[np.float64]) -> Likes:
        logs = np.log(values[values > 0])
        middle = float(np.median(logs)) if len(logs) else math.nan
        spread = 1.4826 * float(np.median(np.abs(logs - middle))) if len(logs) else math.nan
        share = len(logs) / len(values)
        return cls(name, len(values), float(np.median(values)), float(values.min()), share, middle, spread)


def _likes(rows: Sequence[dict[str, Any]]) -> dict[str, Likes]:
    """Tensor -> the others of its pattern, or where those are too few of its role."""
    known = [row for row in rows if row.get("relative_l2") is not None]
    groups: dict[str, list[str]] = {}
    for row in known:
        for name in (pattern_of(row["tensor"]), f"role {row['role']}"):
            groups.setdefault(name, []).append(row["tensor"])
    far = {row["tensor"]: float(row["relative_l2"]) for row in known}
    found: dict[str, Likes] = {}
    for name, members in sorted(groups.items(), key=lambda item: item[0].startswith("role ")):
        left = [tensor for tensor in members if tensor not in found]
        if len(members) < FEWEST or not left:
            continue
        values = np.array([far[tensor] for tensor in members])
        if len(members) > MANY:  # one more or less makes no difference
            found |= dict.fromkeys(left, Likes.of(name, values))
        else:
            found |= {t: Likes.of(name, np.delete(values, members.index(t))) for t in left}
    return found


def _against(far: float, like: Likes, reasons: list[str]) -> dict[str, Any]:
    name = f"{like.count} others of {like.name}"
    if like.middle == 0:
        if far > 0 and like.moved <= 0.25:
            reasons.append(f"moved, though most of the {name} did not at all")
        return {"like": like.name, "times_like": None}
    times = far / like.middle
    if far == 0:
        if like.least > 0:
            reasons.append(f"did not move at all, though all {name} did")
        return {"like": like.name, "times_like": 0.0}
    away = (math.log(far) - like.log_middle) / max(like.log_spread, _LEAST_SPREAD)
    if times >= TIMES and away > DEVIATIONS:  # less is usual: early layers move less than late ones
        reasons.append(f"moved {times:.3g} times as far as the median of the {name}")
    return {"like": like.name, "times_like": times}


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
