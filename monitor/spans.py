"""Names of a log's files: which part of the log a file holds, and which files count."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_NAME = re.compile(r"(?P<writer>[^.].*?)-(?P<first>\d{6,})(?:-(?P<last>\d{6,}))?\.(?:wal|parquet)$")


class Span(NamedTuple):
    """Which write-ahead files of one writer a file holds; of a roll-up, which bins of a session."""

    writer: str
    first: int
    last: int

    @classmethod
    def of(cls, file: str | Path) -> Span | None:
        """Read from the file's name; None for a foreign file."""
        found = _NAME.match(Path(file).name)
        if not found:
            return None
        first = int(found["first"])
        return cls(found["writer"], first, int(found["last"] or first))

    def covers(self, other: Span) -> bool:
        return self.writer == other.writer and self.first <= other.first and other.last <= self.last

    @property
    def stem(self) -> str:
        return f"{self.writer}-{self.first:06d}" + (f"-{self.last:06d}" if self.last > self.first else "")


def counting(names: Iterable[str]) -> dict[Span, str]:
    """The files that count: those that no other of them covers, in order."""
    found = {span: name for name in names if (span := Span.of(name))}
    kept: dict[Span, str] = {}
    widest: Span | None = None
    for span in sorted(found, key=lambda s: (s.writer, s.first, -s.last)):
        if widest is None or not widest.covers(span):
            kept[span] = found[span]
            widest = span
    return kept


def spans(folder: Path, suffix: str) -> dict[Span, Path]:
    """The files below `folder` that count, in order."""
    names = (p.name for p in folder.glob(f"*{suffix}"))
    return {span: folder / name for span, name in counting(names).items()}
