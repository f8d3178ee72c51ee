"""What happened to a run, in one list: findings, and events of the run itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .text import integer, words

if TYPE_CHECKING:
    from ..monitor import Run
    from .judging import Judgement

#: Kinds in the order of the timeline's lanes, from the top: kind -> what it is called.
KINDS = {
    "critical": "Critical",
    "warning": "Warnings",
    "info": "Remarks",
    "accident": "Accidents",
    "skipped": "Skipped steps",
    "error": "Errors",
    "gap": "Lost captures",
    "thinned": "Thinning",
    "restart": "Starts and ends",
    "checkpoint": "Checkpoints",
    "alert": "Alerts told",
    "untold": "Alerts not told",
    "note": "Notes",
    "other": "Other events",
}
ALARMS = ("critical", "warning")
FINDINGS = (*ALARMS, "info")
TONES = {
    "accident": "critical",
    "error": "critical",
    "gap": "warning",
    "skipped": "warning",
    "thinned": "warning",
    "untold": "warning",
}
_KIND_OF = {"start": "restart", "close": "restart", "thinning ended": "thinned"}
_TITLES = {
    "close": "End",
    "gap": "Lost captures",
    "thinned": "Thinning begins",
    "thinning ended": "Thinning ends",
}
#: What became of a message to people, by how the event begins: kind and title.
_OUTCOMES = {
    "sent": ("alert", "Alert sent"),
    "held": ("alert", "Alert held"),
    "delayed": ("untold", "Alert delayed"),
    "not sent": ("untold", "Alert not sent"),
}
MOST_RANGES = 200  # of skipped steps; more are joined across short pauses
_STEPS = re.compile(r"from step (\d+) to (\d+)")
_SINCE = re.compile(r"since step (\d+)")


@dataclass(frozen=True)
class Happening:
    """One line of the list. Steps are -1 where none is known."""

    kind: str
    first: int
    last: int
    time: float | None
    title: str
    text: str
    layers: tuple[str, ...] = ()
    problem: str = ""

    @property
    def tone(self) -> str:
        """The colour: a severity, or "event"."""
        return self.kind if self.kind in FINDINGS else TONES.get(self.kind, "event")


def happenings(run: Run, judged: Judgement | None) -> list[Happening]:
    """Everything, the latest first."""
    found = [*_findings(run, judged), *_events(run)]
    return sorted(found, key=lambda h: (h.first, h.time or 0.0), reverse=True)


def _findings(run: Run, judged: Judgement | None) -> list[Happening]:
    found = []
    for f in judged.findings if judged else []:
        last, when = max(f.last_step, f.first_step), time_of(run, f.first_step)
        found.append(
            Happening(f.severity, f.first_step, last, when, words(f.problem), f.summary, f.layers, f.problem)
        )
    return found


def _events(run: Run) -> list[Happening]:
    events = run.events()
    skipped = events["event"] == "skipped"
    rest = events.loc[~skipped, ["step", "time", "event", "message"]].itertuples(index=False)
    found = [_event(int(step), float(time), str(event), str(text)) for step, time, event, text in rest]
    lost = events[skipped]
    ranges = collapsed(lost["step"].to_numpy(np.int64))
    when = dict(zip(lost["step"], lost["time"], strict=True))
    why = str(lost["message"].iloc[0]) if len(lost) else ""
    return found + [_skipped(first, last, count, when.get(first), why) for first, last, count in ranges]


def _event(step: int, time: float, event: str, message: str) -> Happening:
    kind = _KIND_OF.get(event, event if event in KINDS and event not in FINDINGS else "other")
    first = last = step
    if kind == "gap" and (lost := _STEPS.search(message)):
        first, last = int(lost[1]), int(lost[2])
    if event == "thinning ended" and (since := _SINCE.search(message)):
        first = min(int(since[1]), step)
    if event == "alert":
        outcome = next((one for one in _OUTCOMES if message.startswith(one)), "")
        kind, title = _OUTCOMES.get(outcome, (kind, "Alert"))
        return Happening(kind, first, last, time, title, message[len(outcome) :].strip())
    return Happening(kind, first, last, time, _TITLES.get(event, words(event)), message)


def _skipped(first: int, last: int, count: int, time: Any, why: str) -> Happening:
    title = "Skipped step" if count == 1 else f"{integer(count)} skipped steps"
    return Happening("skipped", first, last, None if time is None else float(time), title, why)


def collapsed(steps: Sequence[int] | np.ndarray, most: int = MOST_RANGES) -> list[tuple[int, int, int]]:
    """Steps as ranges: first, last, how many. Pauses are bridged only where there would be too many."""
    steps = np.unique(np.asarray(steps, dtype=np.int64))
    if not len(steps):
        return []
    reach = 1
    while True:
        cuts = np.flatnonzero(np.diff(steps) > reach) + 1
        if len(cuts) < most:
            break
        reach *= 2
    parts = np.split(steps, cuts)
    return [(int(part[0]), int(part[-1]), len(part)) for part in parts]


def time_of(run: Run, step: int) -> float | None:
    """When a step was logged, from the scalar nearest to it."""
    names = run.scalar_names()
    for name in ("train_loss", *names[:1]):
        frame = run.scalars(name) if name in names else None
        if isinstance(frame, pd.DataFrame) and len(frame):
            place = int(np.searchsorted(frame["step"].to_numpy(), step))
            return float(frame["time"].iloc[min(place, len(frame) - 1)])
    return None


def narrowed(found: list[Happening], show: str, kind: str, wanted: str) -> list[Happening]:
    """The lines that the reader wants to see; `wanted` is part of a text, a title or a layer's name."""
    if show == "alarms":
        found = [h for h in found if h.kind in ALARMS]
    elif show == "findings":
        found = [h for h in found if h.kind in FINDINGS]
    elif show == "events":
        found = [h for h in found if h.kind not in FINDINGS]
    if kind in KINDS:
        found = [h for h in found if h.kind == kind]
    wanted = wanted.strip().lower()
    return [h for h in found if wanted in " ".join((h.title, h.text, *h.layers)).lower()] if wanted else found
