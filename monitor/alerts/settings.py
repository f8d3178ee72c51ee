"""Reading a settings file: what is unknown, missing or of the wrong type is named."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..durations import seconds_of

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


class ConfigError(ValueError):
    """A settings file does not say what was expected: where, and what to write instead. Holds no values that
    may be secret."""


def closest(word: str, known: Iterable[str]) -> str:
    """`: did you mean "severity"?`, or what there is when nothing is close."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f': did you mean "{near[0]}"?' if near else f"; known: {', '.join(known)}"


class Table:
    """One table of the file. Whatever is asked for is known; `done` refuses the rest.

    Args:
        content: its keys and values. where: how it is called in errors, `[alerts.channels.team]`.
    """

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, Mapping):
            raise ConfigError(f"expected {where} as a table, got {_kind(content)}")
        self.where = where
        self._content, self._known = content, list[str]()

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def keys(self) -> list[str]:
        """What is written in it."""
        return [str(key) for key in self._content]

    def done(self) -> None:
        """Everything that is known was asked for.

        Raises:
            ConfigError: there is more.
        """
        for key in self.keys():
            if key not in self._known:
                raise ConfigError(f'{self.where} has an unknown key "{key}"{closest(key, self._known)}')

    def wrong(self, key: str, expected: str, got: Any = None) -> ConfigError:
        """The error about the value of a key. `got` is shown: give none where it may be secret."""
        shown = "" if got is None else f", got {str(got)[:60]!r}"
        return ConfigError(f"expected {key} in {self.where} as {expected}{shown}")

    def lacks(self, key: str) -> ConfigError:
        """The error about a key that must be there, and may be misspelt."""
        strange = [one for one in self.keys() if one not in self._known]
        if near := difflib.get_close_matches(key, strange, n=1, cutoff=0.6):
            return ConfigError(f'{self.where} has an unknown key "{near[0]}": did you mean "{key}"?')
        return ConfigError(f"{self.where} lacks {key}: add it")

    def _take(self, key: str, types: type | tuple[type, ...], expected: str) -> Any:
        """The value, None when the key is not there."""
        self._known.append(key)
        value = self._content.get(key)
        good = isinstance(value, types) and not (isinstance(value, bool) and types is int)
        if value is not None and not good:
            raise self.wrong(key, f"{expected}; it is {_kind(value)}")
        return value

    def _given(self, key: str, value: Any, default: Any) -> Any:
        if value is None and default is None:
            raise self.lacks(key)
        return default if value is None else value

    def text(self, key: str, default: str | None = None) -> str:
        """A text; without a default it must be there."""
        return self._given(key, self._take(key, str, "a text"), default)

    def texts(self, key: str, *, needed: bool = False) -> tuple[str, ...]:
        """Texts, or a single one."""
        value = self._take(key, (str, list, tuple), "a text or a list of texts")
        found = (value,) if isinstance(value, str) else tuple(value or ())
        if not all(isinstance(text, str) for text in found):
            raise self.wrong(key, "a text or a list of texts; not all of them are texts")
        if needed and not found:
            raise self.lacks(key)
        return found

    def whole(self, key: str, default: int, low: int, high: int) -> int:
        """A whole number in a range, both ends included."""
        value = self._given(key, self._take(key, int, f"a whole number from {low} to {high}"), default)
        if not low <= value <= high:
            raise self.wrong(key, f"a whole number from {low} to {high}", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        return self._given(key, self._take(key, bool, "true or false"), default)

    def choice(self, key: str, known: Sequence[str], default: str | None = None) -> str:
        """One of these words."""
        value = self._given(key, self._take(key, str, "a text"), default)
        if value not in known:
            raise ConfigError(f'{key} in {self.where} is "{value[:60]}"{closest(value, known)}')
        return value

    def choices(self, key: str, known: Iterable[str]) -> tuple[str, ...]:
        """Some of these words."""
        found, known = self.texts(key), list(known)
        for word in found:
            if word not in known:
                raise ConfigError(f'{key} in {self.where} names "{word[:60]}"{closest(word, known)}')
        return found

    def seconds(self, key: str, default: float | None, *, never: bool = False) -> float | None:
        """A duration such as "90s", "10m", "2h", "1d"; with `never` also "never", which is None."""
        expected = 'a time such as "90s", "10m", "2h" or "1d"' + (', or "never"' if never else "")
        value = self._take(key, str, expected)
        if value is None:
            return default
        if never and value == "never":
            return None
        try:
            return seconds_of(value)
        except ValueError:
            raise self.wrong(key, expected, value) from None

    def variable(self, key: str, default: str | None = None) -> str:
        """The name of an environment variable that holds a secret; `<name>` itself, without `_env`, would be
        the secret."""
        literal = key.removesuffix("_env")
        if literal in self._content:
            raise ConfigError(
                f"{self.where} holds a secret, {literal}: put it into an environment variable and name that "
                f'here instead, {key} = "LAYERWATCH_{literal.upper()}"; change the secret if others could '
                "read the file"
            )
        value = self._given(key, self._take(key, str, "the name of an environment variable"), default)
        if value and not _VARIABLE.fullmatch(value):
            raise self.wrong(key, f'the name of an environment variable, as in {key} = "LAYERWATCH_SECRET"')
        return value

    def table(self, key: str) -> Table:
        """A table in this one; an empty one when it is not there."""
        self._known.append(key)
        return Table(self._content.get(key, {}), f"{self.where[:-1]}.{key}]")

    def tables(self, key: str) -> list[Table]:
        """A list of tables."""
        found = self._take(key, (list, tuple), "a list of tables") or []
        return [Table(one, f"[[{self.where[1:-1]}.{key}]] number {i + 1}") for i, one in enumerate(found)]


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return "a table" if isinstance(value, Mapping) else names.get(type(value), type(value).__name__)
