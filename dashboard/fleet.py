"""A scan table narrowed by a filter, and counted: what the Fleet page says. Plain values, ready for JSON."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..monitor.fleet import ScanTable, worsened
from ..monitor.fleet.search import NONE, Query, SearchError, Term, alarms, moment, parse
from ..monitor.fleet.search import STATES as IS
from ..monitor.fleet.table import HEALTHS
from .text import integer, number, words

if TYPE_CHECKING:
    from .queries import Library

Row = dict[str, Any]
#: Since when runs have become worse: seconds before now; the last scan has no fixed length.
SINCE = {"scan": 0.0, "day": 86400.0, "week": 7 * 86400.0}
PAGE = 50  # rows that are shown at first, and that are added by each wish for more
MOST_VALUES = 100  # of a facet
MOST_NEWS = 100  # runs in the list of what got worse
#: What the runs are counted by: the field of a filter -> its sign and the values of a row.
FACETS: dict[str, tuple[str, Callable[[Row], Iterable[str]]]] = {
    "health": (":", lambda row: (row["health"],)),
    "problem": (":", lambda row: dict.fromkeys(finding["problem"] for finding in alarms(row))),
    "model": ("=", lambda row: (row["model"] or NONE,)),
    "owner": (":", lambda row: (row["owner"] or NONE,)),
    "tag": (":", lambda row: row["tags"] or (NONE,)),
}
#: States that have a count of their own.
STATES = ("live", "new", "copy")
#: What the table can be sorted by: how, and whether the largest comes first.
SORTS: dict[str, tuple[Callable[[Row], Any], bool]] = {
    "health": (lambda row: HEALTHS.index(row["health"]), False),
    "run": (lambda row: row["run"].lower(), False),
    "owner": (lambda row: (row["owner"] or "").lower() or None, False),
    "model": (lambda row: (row["model"] or "").lower() or None, False),
    "steps": (lambda row: row["steps"], True),
    "val": (lambda row: _finite(row["val_loss"]), False),
    "gap": (lambda row: _finite(row["gap"]), True),
    "drift": (lambda row: _finite(row["drift"]), True),
    "age": (moment, True),
}


@dataclass(frozen=True)
class Narrowed:
    """Rows of a table and which of them fit each term of a filter."""

    rows: Sequence[Row]
    query: Query
    fits: np.ndarray  # terms x rows

    @staticmethod
    def of(rows: Sequence[Row], query: Query) -> Narrowed:
        """Ask every term once."""
        fits = [np.fromiter((term.fits(row) for row in rows), bool, len(rows)) for term in query.terms]
        return Narrowed(rows, query, np.array(fits).reshape(len(query.terms), len(rows)))

    def all(self, but: str = "") -> list[Row]:
        """The rows that fit all terms; those of the field `but` do not count."""
        counts = [not (term.key == but and choosing(term)) for term in self.query.terms]
        fit = self.fits[counts].all(axis=0)
        return [row for row, fits in zip(self.rows, fit, strict=True) if fits]


def choosing(term: Term) -> bool:
    """Whether a term is one that a facet writes: this value, or that one."""
    return term.wanted and term.key in FACETS and term.sign in (":", "=")


def shown(library: Library, text: str, since: str, sort: str, rows: int) -> dict[str, Any]:
    """What the page shows; of a filter that cannot be understood the reason, and all runs.

    Args:
        text: the filter. since: one of SINCE. sort: a key of SORTS, with a minus the other way round.
        rows: how many lines of the table.
    """
    table = library.table.table
    if table is None:
        return {"none": True, "fault": library.public(library.table.fault)}
    try:
        query, wrong = parse(text), ""
    except SearchError as error:
        query, wrong = Query(), str(error)
    narrowed = Narrowed.of(list(library.table.rows.values()), query)
    fitting = narrowed.all()
    return {
        "wrong": wrong,
        "total": len(narrowed.rows),
        "fits": len(fitting),
        "scanned": table.scanned,
        "before": table.before,
        "newer": library.newer(),
        "notes": [library.public(note) for note in table.notes],
        "facets": {key: facet(narrowed, key) for key in FACETS},
        "states": {key: state(narrowed, key) for key in STATES},
        "news": news(library, table, fitting, since),
        "rows": [line(library, row) for row in ordered(fitting, sort)[:rows]],
        "sort": sort,
    }


def facet(narrowed: Narrowed, key: str) -> list[dict[str, Any]]:
    """Values of a field, how many runs have each, and the filter that a click on it leads to."""
    sign, read = FACETS[key]
    rows = narrowed.all(but=key)
    counts = Counter(value for row in rows for value in read(row))
    chosen = [v for term in narrowed.query.terms if term.key == key and choosing(term) for v in term.values]
    held = {value.lower() for value in chosen}
    for value in chosen:
        if value.lower() not in {known.lower() for known in counts}:
            counts[value] = 0
    order = sorted(counts, key=lambda value: (value == NONE, -counts[value], value.lower()))
    if key == "health":
        order = [
            health for health in HEALTHS if counts[health] or health in ("critical", "warning", "healthy")
        ]
    return [
        {
            "value": value,
            "word": words(value) if key == "problem" and value != NONE else value,
            "count": counts[value],
            "chosen": value.lower() in held,
            "next": toggled(narrowed.query, key, sign, value),
        }
        for value in order[:MOST_VALUES]
        if key != "problem" or value != NONE
    ]


def state(narrowed: Narrowed, value: str) -> dict[str, Any]:
    """How many of the fitting runs are live, new or copies."""
    chosen = any(term.key == "is" and value in term.values and term.wanted for term in narrowed.query.terms)
    return {
        "count": sum(1 for row in narrowed.all() if IS[value](row)),
        "chosen": chosen,
        "next": toggled(narrowed.query, "is", ":", value),
    }


def toggled(query: Query, key: str, sign: str, value: str) -> str:
    """The filter with a value of a field added, next to others of that field, or taken away."""
    values: list[str] = []
    parts: list[str] = []
    place = None
    for term in query.terms:
        if term.key == key and term.wanted and term.sign in (":", "="):
            place = len(parts) if place is None else place
            values += [v for v in term.values if v.lower() not in {known.lower() for known in values}]
        else:
            parts.append(term.text)
    rest = [v for v in values if v.lower() != value.lower()]
    rest = rest if len(rest) < len(values) else [*values, value]
    if rest:
        term = f"{key}{sign}{','.join(map(quoted, rest))}"
        parts.insert(len(parts) if place is None else place, term)
    return " ".join(parts)


def quoted(value: str) -> str:
    """A value as a filter takes it."""
    plain = value.replace('"', "")
    return f'"{plain}"' if any(letter.isspace() or letter == "," for letter in plain) else plain


def news(library: Library, table: ScanTable, fitting: list[Row], since: str) -> dict[str, Any]:
    """Which of the fitting runs got worse, or have a new alarm: the most severe and the newest first."""
    if table.before is None:
        return {"first": True, "total": 0, "runs": []}
    ago = SINCE.get(since, 0.0)
    start = time.time() - ago if ago else None
    known = ScanTable(table.root, fitting, table.scanned, table.before)
    found = worsened(known, start)
    runs = [
        {
            **named(library, row),
            "before": row["health_before"],
            "alarms": [words(f["problem"]) for f in fresh] or reason(row),
            "when": max([row["worse"] or 0.0, *(f["noticed"] or 0.0 for f in fresh)]),
        }
        for row, fresh in found
    ]
    runs.sort(key=lambda run: (HEALTHS.index(run["health"]), -run["when"]))
    return {"first": False, "total": len(runs), "runs": runs[:MOST_NEWS]}


def reason(row: Row) -> list[str]:
    """What is wrong with a run: its alarms in words, the most severe first, or why it cannot be read."""
    if row["health"] == "unreadable":
        return [row["error"] or "cannot be read"]
    order = sorted(alarms(row), key=lambda finding: finding["severity"] != "critical")
    return list(dict.fromkeys(words(finding["problem"]) for finding in order))


def named(library: Library, row: Row) -> dict[str, Any]:
    """What every mention of a run shows."""
    return {"run": row["run"], "health": row["health"], "owner": row["owner"] or "", "live": row["live"]}


def ordered(rows: list[Row], sort: str) -> list[Row]:
    """Sorted; runs without the value at the end, the newest first among equals."""
    key, down = SORTS.get(sort.lstrip("-"), SORTS["health"])
    down ^= sort.startswith("-")
    newest = sorted(rows, key=lambda row: -(moment(row) or 0.0))
    known = [row for row in newest if key(row) is not None]
    return [*sorted(known, key=key, reverse=down), *(row for row in newest if key(row) is None)]


def line(library: Library, row: Row) -> dict[str, Any]:
    """A row of the table, as it is shown."""
    return {
        **named(library, row),
        "reason": [library.public(text) for text in reason(row)],
        "summary": alarms(row)[0]["summary"] if alarms(row) else "",
        "model": row["model"] or "",
        "tags": row["tags"],
        "note": row["note"] or "",
        "copy": row["copy_of"] or "",
        "steps": integer(row["steps"]) if row["steps"] is not None else number(None),
        "val": number(row["val_loss"]),
        "gap": number(row["gap"]),
        "drift": number(row["drift"]),
        "layer": row["drift_layer"] or "",
        "age": moment(row),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
