"""Which of many runs are the good ones that a project's normal ranges are learnt from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .courses import Courses, courses
from .detectors.history import History
from .detectors.thinned import sparing
from .errors import RunError
from .normal import Normal, learn
from .run import Run
from .runs import scan_runs

#: One run tells no spread.
LEAST_RUNS = 2


class Calibration(NamedTuple):
    """What was learnt, and the runs that were left out: path -> why."""

    normal: Normal
    left_out: dict[str, str]


def calibrate(paths: Sequence[str]) -> Calibration:
    """Learn what is normal from the healthy runs among these; a path is a run, or a folder of runs.

    Of different models the one with the most healthy runs is taken, of equally many the newest run's.

    Raises:
        RunError: fewer than two healthy runs of one model.
    """
    left_out: dict[str, str] = {}
    read: list[tuple[Run, Courses]] = []
    for run in _runs(paths, left_out):
        reason = _reason(run)
        if reason:
            left_out[run.url] = reason
        else:
            read.append((run, courses(History(sparing(run)))))
    if not read:
        why = "; ".join(f"{path}: {reason}" for path, reason in list(left_out.items())[:3])
        raise RunError(f"expected healthy runs, found none in {' '.join(paths)}{f' ({why})' if why else ''}")
    groups: dict[tuple, list[tuple[Run, Courses]]] = {}
    for run, found in sorted(read, key=lambda both: -float(both[0].info.get("created") or 0)):
        groups.setdefault(tuple(sorted(found.shapes.items())), []).append((run, found))
    chosen = max(groups.values(), key=len)
    names = {run.url for run, _ in chosen}
    left_out |= {
        run.url: f"another model than {chosen[0][0].name}" for run, _ in read if run.url not in names
    }
    if len(chosen) < LEAST_RUNS:
        raise RunError(
            f"expected at least two healthy runs of one model, found {chosen[0][0].url} only"
            f"{f' ({len(left_out)} left out)' if left_out else ''}: one run tells no spread, train "
            "with another seed, or give it to `check --baseline` as it is"
        )
    return Calibration(learn([found for _, found in chosen]), left_out)


def _runs(paths: Iterable[str], broken: dict[str, str]) -> list[Run]:
    """Every run once."""
    found: dict[str, Run] = {}
    for path in paths:
        runs, wrong = scan_runs(path)
        found |= {run.url: run for run in runs}
        broken |= wrong
    return list(found.values())


def _reason(run: Run) -> str:
    """Why a run is not one to learn from; "" when it is."""
    if run.last_step < 0:
        return "it is empty"
    if run.live:
        return "it is still being written"
    alarms = [finding for finding in run.findings() if finding.alarm]
    return f"it has alarms: {', '.join(f.problem for f in alarms)}" if alarms else ""
