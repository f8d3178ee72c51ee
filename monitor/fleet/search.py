"""The language of filters: `lr>0.01 tag:baseline health:critical age<7d resnet`. Every term is required.

word, "two words"      somewhere in the run's name, model, owner, tags, note, alarms or configuration
tag:baseline           the field is that; a comma means or: tag:baseline,final; * stands for anything
model:ResNet           of name, model, host and note: they contain it; with = they are it
lr>0.01                a number: a column of the scan table, a setting (lr finds optimizer.lr), a scalar
optimizer.name=adamw   a setting that is text
age<7d, worse<24h      how long ago; also a date: created>2026-11-20
-tag:sweep             a term that must not fit
"""

from __future__ import annotations

import contextlib
import difflib
import json
import operator
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pyarrow as pa

from ..durations import moment_of, seconds_of
from .table import COLUMNS, HEALTHS

Row = Mapping[str, Any]
Test = Callable[[Row], bool]

NONE = "none"  # tag:none, owner:none, ...: there is no such thing
#: State of a run -> whether it is in it.
STATES: dict[str, Test] = {
    "live": lambda row: bool(row.get("live")),
    "closed": lambda row: bool(row.get("closed")) and not row.get("live"),
    "interrupted": lambda row: not row.get("closed") and not row.get("live") and not row.get("error"),
    "copy": lambda row: bool(row.get("copy_of")),
    "new": lambda row: row.get("health_before") is None,
    "worse": lambda row: _rank(row.get("health")) < _rank(row.get("health_before")),
}
#: Fields with one of a few values, or any.
EXACT: dict[str, Callable[[Row], Iterable[str]]] = {
    "tag": lambda row: row.get("tags") or (),
    "owner": lambda row: _some(row.get("owner")),
    "health": lambda row: _some(row.get("health")),
    "problem": lambda row: [f["problem"] for f in alarms(row)],
    "finding": lambda row: [f["problem"] for f in row.get("findings") or ()],  # remarks as well
    "layer": lambda row: [layer for f in alarms(row) for layer in f.get("layers") or ()],
    "id": lambda row: _some(row.get("id")),
    "commit": lambda row: _some(row.get("git_commit")),
}
#: Fields that are searched for a part of them.
TEXTS = {"name": "run", "run": "run", "model": "model", "host": "host", "note": "note", "error": "error"}
MOMENTS = ("age", "created", "ended", "worse", "scanned")
#: Numbers of a row under the names that people type.
NUMBERS = {"train": "train_loss", "val": "val_loss", "step": "steps", "processes": "world"}
NUMBERS |= {f.name: f.name for f in COLUMNS if f.type in (pa.int32(), pa.int64(), pa.float64())}
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_POWERS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)([kmgbt]?)", re.IGNORECASE)
_TOKEN = re.compile(r'(?:[^\s"]|"[^"]*")+|"')
_TERM = re.compile(r"(?P<key>[^\s\"<>=!:]+)(?P<sign><=|>=|!=|=|<|>|:)(?P<value>.*)", re.DOTALL)


class SearchError(ValueError):
    """A filter that cannot be understood: which term, and what was expected."""


@dataclass(frozen=True)
class Term:
    """One condition.

    Attributes:
        text: as it was written. key: the field, "" of words that may be anywhere. sign: ":" or a comparison.
        values: what is looked for, one of them must fit. wanted: False of a term that must not fit.
    """

    text: str
    key: str
    sign: str
    values: tuple[str, ...]
    wanted: bool
    test: Test

    def fits(self, row: Row) -> bool:
        """Whether a row fulfils it."""
        return self.test(row) is self.wanted


@dataclass(frozen=True)
class Query:
    """What was asked for: every term must fit."""

    terms: tuple[Term, ...] = ()

    def fits(self, row: Row) -> bool:
        """Whether a row of a scan table (see `table.COLUMNS`) fulfils all terms; missing columns are null."""
        return all(term.fits(row) for term in self.terms)


def parse(text: str, now: float | None = None) -> Query:
    """Read a filter. An empty one fits every run.

    Args:
        now: unix seconds that ages count from; None: the present.

    Raises:
        SearchError: a term cannot be understood.

    >>> row = {"run": "sweep/a", "config": '{"optimizer.lr": 0.1}', "tags": ["baseline"]}
    >>> parse("lr>0.01 tag:baseline").fits(row), parse("sweep -tag:baseline").fits(row)
    (True, False)
    """
    present = time.time() if now is None else now
    return Query(tuple(_term(token, present) for token in _TOKEN.findall(text)))


def _term(token: str, now: float) -> Term:
    if token.count('"') % 2:
        raise SearchError(f"expected a closing quote after {token}")
    wanted = not (token.startswith("-") and len(token) > 1)
    body = token if wanted else token[1:]
    found = None if body.startswith('"') else _TERM.fullmatch(body)
    if found is None:
        words = body.replace('"', "").lower()
        return Term(token, "", "", (words,), wanted, lambda row: words in _everything(row))
    key, sign, value = found["key"], found["sign"], found["value"]
    values = tuple(part.replace('"', "").strip() for part in _parts(value))
    if not all(values):
        raise SearchError(f"expected a value after {key}{sign}")
    test = _test(key, sign, values, now)
    return Term(token, key.lower(), sign, values, wanted, test)


def _parts(value: str) -> list[str]:
    """Split at commas that are not in quotes."""
    return re.findall(r'(?:[^,"]|"[^"]*")+', value) or [""]


def _test(key: str, sign: str, values: tuple[str, ...], now: float) -> Test:
    """The test of a term with a key."""
    name = key.lower()
    if name in MOMENTS:
        return _when(name, sign, values[0], now)
    if name == "is":
        _expect(name, values, STATES)
        tests = [STATES[value.lower()] for value in values]
        return lambda row: any(test(row) for test in tests)
    if name in EXACT or name in TEXTS:
        if sign not in (":", "=", "!="):
            raise SearchError(f"expected {name}:{values[0]}, because {name} is no number; got {name}{sign}")
        test = _exact(name, values) if name in EXACT else _text(TEXTS[name], sign, values)
        return (lambda row: not test(row)) if sign == "!=" else test
    if sign == ":":
        raise SearchError(_unknown(key, values[0]))
    return _compared(key, sign, values)


def _expect(name: str, values: tuple[str, ...], known: Collection[str]) -> None:
    for value in values:
        if value.lower() not in known:
            expected = f"expected {name}: and one of {', '.join(known)}"
            raise SearchError(f"{expected}, got {value}{_close(value, known)}")


def _exact(name: str, values: tuple[str, ...]) -> Test:
    if name == "health":
        _expect(name, values, HEALTHS)
    read, wanted = EXACT[name], [value.lower() for value in values]

    def fits(row: Row) -> bool:
        there = [text.lower() for text in read(row)] or [NONE]
        return any(text == value or fnmatchcase(text, value) for text in there for value in wanted)

    return fits


def _text(column: str, sign: str, values: tuple[str, ...]) -> Test:
    wanted = [value.lower() for value in values]

    def fits(row: Row) -> bool:
        there = (row.get(column) or "").lower()
        if not there:
            return NONE in wanted
        return there in wanted if sign != ":" else any(value in there for value in wanted)

    return fits


def _when(name: str, sign: str, value: str, now: float) -> Test:
    """A length of time counts backwards: age<7d is a moment after the one of seven days ago."""
    if sign not in ("<", "<=", ">", ">="):
        raise SearchError(f"expected {name}< or {name}> and a time such as 7d, got {name}{sign}{value}")
    compare = _COMPARE[sign]
    try:
        limit = seconds_of(value)
        return lambda row: (at := moment(row, name)) is not None and compare(now - at, limit)
    except ValueError:
        pass
    try:
        date = moment_of(value)
    except ValueError as error:
        raise SearchError(f"{name}{sign}: {error}") from None
    return lambda row: (at := moment(row, name)) is not None and compare(at, date)


def moment(row: Row, name: str = "age") -> float | None:
    """Unix seconds of a moment of a run; `age` counts from its end, else its last file, else its start."""
    return row.get("ended") or row.get("wrote") or row.get("created") if name == "age" else row.get(name)


def _compared(key: str, sign: str, values: tuple[str, ...]) -> Test:
    """A number of the row, a setting, or a scalar. One that is not there fits nothing."""
    numbers = [number(value) for value in values]
    if sign not in ("=", "!="):
        if len(values) > 1 or numbers[0] is None:
            raise SearchError(f"expected a number after {key}{sign}, got {','.join(values)}")
        compare, limit = _COMPARE[sign], numbers[0]
        return lambda row: any(
            isinstance(value, int | float) and compare(value, limit) for value in _values(row, key)
        )
    texts = {value.lower() for value in values}

    def equal(value: Any) -> bool:
        known = isinstance(value, int | float) and not isinstance(value, bool)
        return value in numbers if known else str(value).lower() in texts

    if sign == "=":
        return lambda row: any(equal(value) for value in _values(row, key))
    return lambda row: bool(there := _values(row, key)) and not any(equal(value) for value in there)


def _values(row: Row, key: str) -> list[Any]:
    if (column := NUMBERS.get(key.lower())) is not None:
        value = row.get(column)
        return [] if value is None else [value]
    there = settings(row)
    if key in there:
        return [there[key]]
    end = f".{key}"
    found = [value for name, value in there.items() if name.endswith(end)]
    return found or [
        s["last"] for s in row.get("scalars") or () if s["name"] == key and s["last"] is not None
    ]


def number(text: str) -> float | None:
    """A number as people write it, 3e-4 and 7B among them; None: it is none."""
    found = _NUMBER.fullmatch(text.strip())
    return float(found[1]) * _POWERS[found[2].lower()] if found else None


def settings(row: Row) -> dict[str, Any]:
    """The configuration as one level: its column is JSON, or a dictionary already."""
    config = row.get("config") or {}
    if isinstance(config, dict):
        return config
    with contextlib.suppress(ValueError):
        return dict(json.loads(config))
    return {}


def alarms(row: Row) -> list[Any]:
    """The findings that are more than a remark."""
    return [finding for finding in row.get("findings") or () if finding["severity"] != "info"]


def _everything(row: Row) -> str:
    """What a word is looked for in."""
    parts = [row.get(name) or "" for name in ("run", "model", "owner", "note", "error")]
    codes = [finding["problem"] for finding in alarms(row)]
    config = row.get("config") or ""
    values = " ".join(map(str, config.values())) if isinstance(config, dict) else config
    return " ".join(
        [*parts, *(row.get("tags") or ()), *codes, " ".join(codes).replace("_", " "), values]
    ).lower()


def _some(value: str | None) -> tuple[str, ...]:
    return (value,) if value else ()


def _rank(health: str | None) -> int:
    return HEALTHS.index(health) if health in HEALTHS else -1


def _unknown(key: str, value: str) -> str:
    fields = (*EXACT, *TEXTS, *MOMENTS, "is")
    return (
        f"there is no field {key}: expected one of {', '.join(sorted(fields))}{_close(key, fields)}; "
        f"for a setting write {key}={value}, for the words put them in quotes"
    )


def _close(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.lower(), list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""
