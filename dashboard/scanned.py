"""A scan table behind the pages: its rows stand for runs that nobody has opened yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..monitor import Run, RunError, StoreError
from ..monitor.findings import Finding
from ..monitor.fleet import TABLE, ScanTable, read_table
from ..monitor.fleet.places import Place
from ..monitor.fleet.search import settings
from ..monitor.store import Store, joined, parted, store_of
from .judging import Judgement
from .summaries import Summary

Row = dict[str, Any]


def is_table(root: str | Path) -> bool:
    """Whether this names the file of a scan table, not a folder of runs."""
    place = str(root).partition("?")[0] if "://" in str(root) else str(root)
    return place.endswith(".parquet") and not ("://" not in place and Path(place).is_dir())


class Scanned:
    """The table, read when first asked for and again when its file has changed.

    Args:
        path: its file, or the URL of it.
        alone: its runs are opened at the places that it names; else they lie below the table's folder.

    Attributes:
        table: the last scan, None while there is none. rows: by the name of the run, configurations parsed.
        fault: why the table cannot be read. stamp: changes with the table.
    """

    def __init__(self, path: str | Path, alone: bool) -> None:
        self.path, self.alone = path, alone
        self.table: ScanTable | None = None
        self.rows: dict[str, Row] = {}
        self.fault = ""
        self.stamp = ""
        self._made: dict[str, tuple[Summary, Judgement]] = {}

    def look(self) -> bool:
        """Read it if it has changed; returns whether it has.

        Raises:
            StoreError: its object store cannot be used.
        """
        folder, name = parted(self.path)
        changed = store_of(folder).modified(name)
        if str(changed) == self.stamp:
            return False
        self.stamp = str(changed)
        try:
            table = read_table(self.path) if changed is not None else None
            self.fault = ""
        except StoreError:
            self.stamp = ""
            raise
        except (RunError, OSError) as error:
            self.fault = str(error)
            return True
        rows = table.rows if table else []
        self.rows = {row["run"]: row | {"config": settings(row)} for row in rows if self._safe(row["run"])}
        self.table, self._made = table, {}
        return True

    def _safe(self, name: str) -> bool:
        """A name becomes a path below the root, and must not lead out of it."""
        parts = name.split("/")
        return self.alone or not (".." in parts or "" in parts or "\\" in name)

    def url(self, name: str, store: Store) -> str:
        """Where a run of the table lies."""
        row = self.rows[name]
        if self.alone:
            return row["url"]
        itself = self.table is not None and row["url"] == self.table.root
        return store.at("" if itself else name).url

    def newer(self, place: Place) -> bool:
        """Whether the files of a run are others than those that were scanned."""
        row = self.rows.get(place.name)
        return row is None or (row["wrote"], row["bytes"]) != (place.wrote, place.bytes)

    def summary(self, name: str) -> Summary:
        """The numbers of a run for a table."""
        return self._of(name)[0]

    def judgement(self, name: str) -> Judgement:
        """What the detectors had found; of the evidence the table keeps nothing."""
        return self._of(name)[1]

    def _of(self, name: str) -> tuple[Summary, Judgement]:
        if name not in self._made:
            row = self.rows[name]
            self._made[name] = summary_of(row), judgement_of(row)
        return self._made[name]


def below(root: Store) -> Scanned:
    """The table that a scan leaves in the folder that it has scanned."""
    return Scanned(joined(root.path or root.url, TABLE), alone=False)


def summary_of(row: Row) -> Summary:
    """A row as `summaries.summarise` would say it."""
    return {
        "read": True,
        "step": (row["steps"] or 0) - 1,
        "train": row["train_loss"],
        "val": row["val_loss"],
        "drift_layer": row["drift_layer"] or "",
        **{key: row[key] for key in ("gap", "drift", "live", "created", "ended", "closed", "tags", "config")},
        **{key: row[key] or "" for key in ("owner", "note", "model")},
    }


def judgement_of(row: Row) -> Judgement:
    """The findings of a row."""
    findings = [
        Finding(
            row["run"], f["problem"], f["severity"], tuple(f["layers"] or ()),
            f["first_step"], f["last_step"], f["summary"] or "", {}, f["advice"] or "",
        )
        for f in row["findings"]
    ]  # fmt: skip
    failed = row["health"] == "unknown"
    return Judgement(row["key"] or "", findings, row["notes"], (row["notes"] or ["?"])[0] if failed else "")


class Opening(Mapping[str, Run]):
    """Runs by name, each opened when it is asked for.

    Args:
        names: in the order of the page. opened: opens one, or raises RunError.
    """

    def __init__(self, names: Mapping[str, None], opened: Callable[[str], Run]) -> None:
        self._names, self._opened = names, opened

    def __getitem__(self, name: str) -> Run:
        if name not in self._names:
            raise KeyError(name)
        return self._opened(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
