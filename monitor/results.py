"""How two runs ended, scalar by scalar, and whether the seed alone may explain the difference."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .courses import RATE, is_result
from .envelopes import student

if TYPE_CHECKING:
    from .run import Run

#: So many runs of one configuration at least, A among them, before anything is said of seed noise; and how
#: sure a prediction interval is.
FEWEST, LEVEL = 3, 0.95
LOWER = re.compile(r"loss|error|perplexity|ppl|(^|[_/])(mae|mse|rmse|nll|wer|cer)($|[_/])", re.IGNORECASE)
HIGHER = re.compile(
    r"acc|f1|auc|bleu|rouge|precision|recall|iou|(^|[_/])(map|r2|psnr|ssim)($|[_/])", re.IGNORECASE
)
_FIRST = ("val_loss", "val_accuracy", "train_loss")


class Ending(NamedTuple):
    """How a scalar of one run ended: its last value, and the best one with its step where best is known."""

    last: float | None
    best: float | None = None
    step: int | None = None


class Difference(NamedTuple):
    """A number of A and of B, and whether the seed alone may explain the difference.

    Attributes:
        low, high: where 95 of 100 further runs like A would lie; None when too few are known.
        verdict: same; within (the interval); better, worse, or different where nobody knows what is better
            (outside); unknown (no interval, or a number is missing or not finite).
    """

    a: float | None
    b: float | None
    low: float | None
    high: float | None
    runs: int
    verdict: str


@dataclass(frozen=True)
class Metric:
    """A scalar of both runs; `slice_of` names the scalar that it is a part of (val_accuracy/night: of
    val_accuracy), or is empty."""

    name: str
    slice_of: str
    last: Difference
    best: Difference | None = None
    best_steps: tuple[int | None, int | None] = (None, None)


def direction(name: str) -> int:
    """-1: lower is better, 1: higher is; 0: nobody knows."""
    return -1 if LOWER.search(name) else 1 if HIGHER.search(name) else 0


def ending(run: Run, name: str) -> Ending:
    """How a scalar ended."""
    frame = run.scalars(name)
    if frame.empty:
        return Ending(None)
    last, sign = float(frame["value"].iloc[-1]), direction(name)
    finite = frame[np.isfinite(frame["value"])]
    if not sign or finite.empty:
        return Ending(last)
    row = finite.loc[(sign * finite["value"]).idxmax()]
    return Ending(last, float(row["value"]), int(row["step"]))


def metrics(a: Run, b: Run, repeats: Sequence[Run] = ()) -> list[Metric]:
    """The scalars that both have: the losses first, each followed by its slices."""
    in_b = set(b.scalar_names())
    names = [n for n in a.scalar_names() if n in in_b and is_result(n) and not RATE.match(n)]
    first = {name: place for place, name in enumerate(_FIRST)}
    owner = {name: next((n for n in names if name.startswith(f"{n}/")), "") for name in names}

    def place(name: str) -> tuple[int, str, str]:
        top = owner[name] or name
        return first.get(top, len(first)), top, name if owner[name] else ""

    found = []
    for name in sorted(names, key=place):
        sign = direction(name)
        one, two = ending(a, name), ending(b, name)
        more = [ending(run, name) for run in repeats]
        last = judge(one.last, two.last, [end.last for end in more], sign)
        best = None
        if one.best is not None or two.best is not None:
            best = judge(one.best, two.best, [end.best for end in more], sign)
        found.append(Metric(name, owner[name], last, best, (one.step, two.step)))
    return found


def judge(a: float | None, b: float | None, repeats: Sequence[float | None], sign: int) -> Difference:
    """Whether B's number differs from A's by more than further runs like A do; see
    `prediction_interval`."""
    like_a = [x for x in (a, *repeats) if x is not None and math.isfinite(x)]
    inside = prediction_interval(like_a)
    low, high = inside or (None, None)
    if a is not None and a == b:
        verdict = "same"
    elif a is None or b is None or inside is None or not (math.isfinite(a) and math.isfinite(b)):
        verdict = "unknown"
    elif inside[0] <= b <= inside[1]:
        verdict = "within"
    else:
        side = sign if b > inside[1] else -sign
        verdict = {1: "better", -1: "worse", 0: "different"}[side]
    return Difference(a, b, low, high, len(like_a), verdict)


def prediction_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Where a further value of the same normal distribution lies with probability `level`; None of fewer than
    three values.

    mean +- t s sqrt(1 + 1 / n), with t of Student's distribution with n - 1 degrees of freedom (Hahn and
    Meeker 1991, Statistical intervals, section 4.7). It takes what seeds do to a result as normally
    distributed. Of three values it is +- 5.0 s wide, of six 2.8, of eleven 2.3; of two it would be 15.6,
    which says nothing.

    >>> low, high = prediction_interval([1.0, 2.0, 3.0])
    >>> round(low, 2), round(high, 2)
    (-2.97, 6.97)
    """
    count = len(values)
    if count < FEWEST:
        return None
    reach = student((1 + level) / 2, count - 1) * float(np.std(values, ddof=1)) * math.sqrt(1 + 1 / count)
    mean = float(np.mean(values))
    return mean - reach, mean + reach


def to_dict(one: Metric) -> dict[str, Any]:
    """For JSON."""
    best = one.best and {
        **one.best._asdict(), "step_a": one.best_steps[0], "step_b": one.best_steps[1]
    }  # fmt: skip
    return {
        "name": one.name,
        "slice_of": one.slice_of or None,
        "better": {1: "higher", -1: "lower"}.get(direction(one.name)),
        "last": one.last._asdict(),
        "best": best,
    }
