"""How right findings are: by run, then over all runs."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from layerwatch.monitor import Finding


@dataclass(frozen=True)
class Verdict:
    """What the findings of one run are worth. An alarm is a warning or a critical finding."""

    run: str
    wanted: str  # the fault's code; "" for a healthy run
    named: tuple[str, ...]  # codes of the alarms
    false: tuple[str, ...]  # those that are not true of this run
    layer: bool | None  # the right finding's first layer is the guilty one; None when no layer is
    delay: int | None  # steps from the fault to the right finding's first step

    @property
    def hit(self) -> bool:
        return self.wanted in self.named

    @property
    def root(self) -> bool:
        return self.named[:1] == (self.wanted,)

    @property
    def right(self) -> bool:
        return self.hit and not self.false if self.wanted else not self.named


def verdict(run: str, label: dict[str, Any], findings: Iterable[Finding]) -> Verdict:
    codes = label["codes"]
    alarms = [f for f in findings if f.alarm]
    true = {*codes, *label.get("also", ())}
    wanted = codes[0] if codes else ""
    mine = next((f for f in alarms if f.problem == wanted), None)
    layer = None
    if label.get("layers"):
        layer = bool(mine and mine.layers and re.search(label["layers"], mine.layers[0]))
    named = tuple(f.problem for f in alarms)
    delay = mine.first_step - label.get("onset", 0) if mine else None
    return Verdict(run, wanted, named, tuple(n for n in named if n not in true), layer, delay)


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share."""
    if n == 0:
        return 0.0, 1.0
    p, d = hits / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return max(0.0, (p + z * z / (2 * n)) / d - half), min(1.0, (p + z * z / (2 * n)) / d + half)


def by_code(verdicts: Sequence[Verdict]) -> dict[str, tuple[int, int, int]]:
    """code -> hits, misses, false alarms; of the codes that some run has."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for v in verdicts:
        if v.wanted:
            counts[v.wanted][0 if v.hit else 1] += 1
    for v in verdicts:
        for code in v.false:
            if code in counts:
                counts[code][2] += 1
    return {code: (a, b, c) for code, (a, b, c) in sorted(counts.items())}


def summary(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """macro_f1, detected, root, healthy_alarms, layer, delay."""
    faulty, healthy = [v for v in verdicts if v.wanted], [v for v in verdicts if not v.wanted]
    f1 = [2 * a / (2 * a + b + c) for a, b, c in by_code(verdicts).values()]
    layers = [v.layer for v in faulty if v.layer is not None]
    delays = [v.delay for v in faulty if v.delay is not None and v.delay >= -2]
    return {
        "macro_f1": _mean(f1),
        "detected": _mean([bool(set(v.named) - set(v.false)) for v in faulty]),
        "hit": _mean([v.hit for v in faulty]),
        "root": _mean([v.root for v in faulty]),
        "healthy_alarms": _mean([bool(v.named) for v in healthy]),
        "false_in_faulty": _mean([bool(v.false) for v in faulty]),
        "layer": _mean(layers),
        "delay": statistics.median(delays) if delays else math.nan,
    }


def _mean(values: Sequence[float | bool]) -> float:
    return sum(values) / len(values) if values else math.nan


def confusion(verdicts: Sequence[Verdict]) -> list[tuple[str, str, int]]:
    """(fault, first alarm, how often) where these differ."""
    pairs = Counter((v.wanted or "healthy", v.named[0] if v.named else "silence") for v in verdicts
                    if not (v.root or (not v.wanted and not v.named)))  # fmt: skip
    return [(*pair, n) for pair, n in pairs.most_common()]
