"""Reading a run's tables from Parquet parts and write-ahead files, while it may still be written."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .errors import RunError
from .schema import SCHEMA_VERSION, TABLES, upgrade
from .spans import Span, spans
from .wal import WalReader


class LogReader:
    """The tables of one run folder. `refresh` looks at the disk; `table` answers from what it saw.
    Thread-safe."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._wals: dict[Span, WalReader] = {}
        self._parts: dict[str, dict[Span, Path]] = {table: {} for table in TABLES}
        self.problems: dict[str, str] = {}  # file name -> what is wrong with it
        self.refresh()

    def refresh(self) -> bool:
        """True when something new is on disk."""
        with self._lock:
            # Write-ahead files first: one that is compacted meanwhile is then covered by a part, never lost
            # between.
            news = self._follow()
            parts = {table: spans(self.run / table, ".parquet") for table in TABLES}
            if parts != self._parts:
                self._parts, news = parts, True
            covered = [s for s in self._wals if all(any(p.covers(s) for p in parts[t]) for t in TABLES)]
            for span in covered:
                del self._wals[span]
        return news

    def _follow(self) -> bool:
        news = False
        for span, path in spans(self.run / "wal", ".wal").items():
            if span not in self._wals:
                self._wals[span] = WalReader(path)
            reader = self._wals[span]
            news |= reader.read()
            if reader.damaged:
                self.problems[path.name] = f"{reader.damaged} damaged bytes were skipped"
        return news

    def fingerprint(self) -> str:
        """Changes whenever the log has grown."""
        with self._lock:
            wals = [f"{s.stem}:{r.offset}" for s, r in sorted(self._wals.items())]
            parts = [f"{s.stem}" for table in TABLES for s in self._parts[table]]
        return "|".join(wals + parts)

    def table(
        self,
        name: str,
        columns: Sequence[str] | None = None,
        where: Mapping[str, Sequence[Any]] | None = None,
    ) -> pa.Table:
        """Rows of one table.

        Args:
            name: stats, values, scalars or events. columns: all when None.
            where: column -> allowed values; Parquet row groups without any of them are not read.
        """
        for _ in range(3):
            try:
                return self._read(name, list(columns or TABLES[name].names), where or {})
            except FileNotFoundError:  # parts were merged meanwhile: look again
                self.refresh()
        raise RunError(f"the files of {self.run} keep changing: is something deleting them?")

    def _read(self, name: str, columns: list[str], where: Mapping[str, Sequence[Any]]) -> pa.Table:
        schema = TABLES[name]
        clauses = [(column, "in", list(allowed)) for column, allowed in where.items()]
        with self._lock:
            parts = dict(self._parts[name])
            batches = [
                b
                for s, r in sorted(self._wals.items())
                if not any(p.covers(s) for p in parts)
                for b in r.tables[name]
            ]
        target = pa.schema([schema.field(c) for c in columns])
        pieces = [
            t for path in parts.values() if (t := self._read_part(path, schema, target, clauses)) is not None
        ]
        live = pa.Table.from_batches(batches, schema)
        for column, allowed in where.items():
            values = pa.array(list(allowed), schema.field(column).type)
            live = live.filter(pc.field(column).isin(values))
        return pa.concat_tables([*pieces, live.select(columns)])

    def _read_part(self, path: Path, schema: pa.Schema, target: pa.Schema, clauses: list) -> pa.Table | None:
        try:
            there = [c for c in target.names if c in pq.read_schema(path).names]
            found = pq.read_table(
                path, columns=there, filters=clauses or None, page_checksum_verification=True
            )
            return upgrade(found, path.parent.name).select(target.names).cast(target)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            self.problems[path.name] = f"unreadable and skipped: {error}".splitlines()[0]
            return None


def read_info(path: Path) -> dict[str, Any]:
    """run.json; a `RunError` says what is wrong with it, or with the folder."""
    if not path.exists():
        raise RunError(
            f"expected a run folder, but {path} does not exist: "
            "check the path, or list runs with `layerwatch runs`"
        )
    if not (path / "run.json").is_file():
        raise RunError(
            f"expected a run folder with a run.json, but {path} has none: "
            "give the folder passed to watch(run=...)"
        )
    try:
        info = json.loads((path / "run.json").read_text())
        version = int(info["schema_version"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise RunError(
            f"{path / 'run.json'} is damaged ({error}): restore it from a copy to read this run"
        ) from None
    if version > SCHEMA_VERSION:
        raise RunError(
            f"{path} has log format {version}, this layerwatch reads up to {SCHEMA_VERSION}: "
            "upgrade layerwatch"
        )
    return info


def alive(pid: Any) -> bool:
    """Does a process of this number run on this machine?"""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    return True
