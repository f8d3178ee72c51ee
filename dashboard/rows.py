"""The table of runs: one row a run, and which rows have changed since a page last asked."""

from __future__ import annotations

import secrets
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from ..monitor.fleet.search import parse
from .text import integer, number, words

if TYPE_CHECKING:
    from .judging import Judgement
    from .queries import Library
    from .summaries import Summary

RANK = {"critical": 3, "warning": 2, "checking": 1, "unknown": 1, "healthy": 0}
LABELS = ("owner", "note", "model")
NUMBERS = ("train", "val", "gap", "drift")
#: Names in a configuration under which the number of steps of the whole training is looked for.
TOTALS = (
    "total_steps",
    "max_steps",
    "num_steps",
    "num_training_steps",
    "training_steps",
    "steps",
    "iterations",
)
PREFIX = "config."
BEGIN = len(PREFIX)
MAX_CONFIG = 200  # columns to choose among; those that most runs have

Row = dict[str, Any]


def row(name: str, summary: Summary, judged: Judgement | None) -> Row:
    """The table's line for one run; `texts` holds what is shown where the value itself is for sorting."""
    config: dict[str, Any] = summary.get("config") or {}
    if "error" in summary:
        return _blank(name) | {"finding": summary["error"], "health": "unknown", "rank": RANK["unknown"]}
    health = judged.health if judged else "checking"
    step, total = summary.get("step"), total_steps(config)
    figures = {key: summary.get(key) for key in NUMBERS}
    shown = f"{integer(step)}{f' of {integer(total)}' if total else ''}" if (step or 0) >= 0 else number(None)
    return _blank(name) | {
        "health": health,
        "rank": RANK.get(health, 0),
        "live": bool(summary.get("live")),
        "finding": worst(judged) if judged else "",
        "step": step if (step or 0) >= 0 else None,
        "done": min(max((step + 1) / total, 0.0), 1.0) if total and step is not None else None,
        "updated": summary.get("ended") or summary.get("created"),
        "layer": summary.get("drift_layer") or "",
        "tags": list(summary.get("tags") or []),
        **{key: summary.get(key) or "" for key in LABELS},
        **{key: _finite(value) for key, value in figures.items()},
        **{PREFIX + key: _plain(value) for key, value in config.items()},
        "texts": {
            "step": shown if summary.get("read") else "…",
            **{k: number(v) for k, v in figures.items()},
        },
    }


def _blank(name: str) -> Row:
    empty = dict.fromkeys(("step", "done", "updated", *NUMBERS))
    texts = dict.fromkeys(("step", *NUMBERS), number(None))
    labels = dict.fromkeys(LABELS, "")
    return {"run": name, "live": False, "layer": "", "tags": [], **labels, **empty, "texts": texts}


def searchable(name: str, summary: Summary, judged: Judgement | None) -> Row:
    """What is known of a run under the names of a scan table, for a filter."""
    same = (*LABELS, "gap", "drift", "live", "closed", "created", "ended", "tags", "config", "error")
    return {
        **{key: summary.get(key) for key in same},
        "run": name,
        "steps": (summary.get("step") or 0) + 1,
        "train_loss": summary.get("train"),
        "val_loss": summary.get("val"),
        "health": judged.health if judged else "unknown",
        "findings": [
            {"problem": f.problem, "severity": f.severity, "layers": f.layers}
            for f in (judged.findings if judged else ())
        ],
    }


def worst(judged: Judgement) -> str:
    """The first alarm in words, and how many more there are."""
    if not judged.alarms:
        return judged.error
    order = sorted(judged.alarms, key=lambda finding: finding.severity != "critical")
    more = f" +{len(order) - 1}" if len(order) > 1 else ""
    return words(order[0].problem) + more


def total_steps(config: dict[str, Any]) -> int | None:
    """The steps that a training means to take, when its configuration says so."""
    for key, value in config.items():
        name = key.rpartition(".")[2]
        if name in TOTALS and isinstance(value, int | float) and np.isfinite(value) and value >= 1:
            return int(value)
    return None


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None


def _plain(value: Any) -> Any:
    """NaN and infinity are no JSON numbers: they become words."""
    return number(value) if isinstance(value, float) and not np.isfinite(value) else value


def config_names(rows: list[Row]) -> dict[str, bool]:
    """The names of configuration values, those that most runs have first; whether all values are numbers."""
    counts: dict[str, int] = {}
    words: set[str] = set()
    for row in rows:
        for key, value in row.items():
            if key[:BEGIN] == PREFIX:
                counts[key] = counts.get(key, 0) + 1
                if type(value) is not int and type(value) is not float and value is not None:
                    words.add(key)
    order = sorted(counts, key=lambda key: (-counts[key], key))[:MAX_CONFIG]
    return {key[BEGIN:]: key not in words for key in order}


class Rows:
    """The rows of a library's runs and when each has changed last. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._boot = secrets.token_hex(4)  # a page that outlived the server gets everything anew
        self._moment = 0
        self._rows: dict[str, tuple[int, Row]] = {}
        self._made: dict[str, tuple[Summary, Judgement | None]] = {}  # what each row was made from
        self._gone: dict[str, int] = {}
        self._settings: tuple[int, dict[str, bool]] = (-1, {})

    def all(self, library: Library, patience: float = 0.2) -> tuple[list[Row], str]:
        """Every row, newest run first, and a cursor for `since`."""
        with self._lock:
            names = self._update(library, patience)
            return [self._rows[name][1] for name in names], self._cursor()

    def settings(self) -> dict[str, bool]:
        """`config_names` of all rows."""
        with self._lock:
            if self._settings[0] != self._moment:
                self._settings = self._moment, config_names([row for _, row in self._rows.values()])
            return self._settings[1]

    def since(self, library: Library, cursor: str, patience: float = 0.2) -> tuple[list[Row], list[str], str]:
        """The rows that are new or have changed since, the names that are gone, and the next cursor."""
        boot, _, moment = cursor.partition(":")
        seen = int(moment) if boot == self._boot and moment.isdigit() else -1
        with self._lock:
            names = self._update(library, patience)
            changed = [self._rows[name][1] for name in names if self._rows[name][0] > seen]
            gone = [name for name, at in self._gone.items() if at > seen and name not in self._rows]
            return changed, gone, self._cursor()

    def fitting(self, library: Library, text: str, patience: float = 0.2) -> list[str]:
        """The names of the runs that fit a filter (see `monitor.fleet.search`).

        Raises:
            SearchError: it cannot be understood.
        """
        query, scanned = parse(text), library.table.rows
        with self._lock:
            names = self._update(library, patience)
            known = {name: scanned.get(name, {}) for name in names}
            for name in names:
                if not library.asleep(name):
                    known[name] = known[name] | searchable(name, *self._made[name])
        return [name for name in names if query.fits(known[name])]

    def _cursor(self) -> str:
        return f"{self._boot}:{self._moment}"

    def _update(self, library: Library, patience: float) -> list[str]:
        found = library.summaries(patience)
        for name, summary in found.items():
            known = library.verdict(name) if summary.get("read") else None
            if name in self._rows and self._made[name] == (summary, known):
                continue
            self._made[name], new = (summary, known), row(name, summary, known)
            if name not in self._rows or self._rows[name][1] != new:
                self._moment += 1
                self._rows[name] = self._moment, new
        for name in [name for name in self._rows if name not in found]:
            self._moment += 1
            del self._rows[name], self._made[name]
            self._gone[name] = self._moment
        return list(found)
