"""Which runs lie below a root, and the state of each one's files: all of it from one listing."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

from ..alerts.watchman import STATE
from ..mirror import ALIVE
from ..schema import SCHEMAS
from ..spans import Span
from ..store import INSIDE, Store
from .table import TABLE

_TABLES = {"wal", *SCHEMAS}
#: What a scan leaves in its root, which may be a run.
_OURS = {TABLE, STATE}


class Place(NamedTuple):
    """One run as the listing shows it.

    Attributes:
        run: its path below the root, "" is the root itself. name: that is shown.
        key: changes with the state of its files, and with what judges them.
        wrote: unix seconds, the store's clock, of the newest file. bytes: of all files.
    """

    run: str
    name: str
    url: str
    key: str
    wrote: float
    bytes: int


def places(store: Store, private: list[str] | None = None) -> list[Place]:
    """Every folder at or below the store that holds a run.json, or tables without one, sorted by name.

    Args:
        private: gets the names of folders that may not be listed.

    Raises:
        StoreError: the object store cannot be read.
    """
    store.refresh()
    tree = store.tree(private)
    folders: dict[str, dict[str, tuple[int, float]]] = {run: {} for run in _runs(tree)}
    for name, known in tree.items():
        if (run := _owner(name, folders)) is not None:
            folders[run][name[len(run) :].lstrip("/")] = known
    return [_place(store, run, files) for run, files in sorted(folders.items())]


def within(run: str, folders: Iterable[str]) -> bool:
    """A run is one of these folders, or lies below one; a name from a table may lead out of it."""
    return ".." not in run.split("/") and any(f"{run}/".startswith(f"{folder}/") for folder in folders)


def _runs(tree: Mapping[str, object]) -> set[str]:
    found = set()
    for name in tree:
        folder, _, base = name.rpartition("/")
        if base == "run.json":
            found.add(folder)
        elif folder.rpartition("/")[2] in _TABLES and Span.of(base) is not None:
            found.add(folder.rpartition("/")[0])
    # What lies inside a run, a copy of its tables say, is no run.
    return {run for run in found if not _inside(run, found)}


def _inside(folder: str, found: set[str]) -> bool:
    parts = folder.split("/")
    return any(
        parts[place] in INSIDE and "/".join(parts[:place]) in found for place in range(len(parts)) if folder
    )


def _owner(name: str, runs: Mapping[str, object]) -> str | None:
    """The run that a file belongs to: the innermost folder that is one."""
    folder = name
    while folder:
        folder = folder.rpartition("/")[0]
        if folder in runs:
            return folder
    return None


def _place(store: Store, run: str, files: Mapping[str, tuple[int, float]]) -> Place:
    own = [(name, *known) for name, known in sorted(files.items()) if name not in _OURS]
    # That a training on an object store goes on is no news of its log.
    lines = [f"{name}:{size}:{time!r}" for name, size, time in own if name != ALIVE]
    key = hashlib.blake2b(storable("\n".join([judged_by(), *lines])).encode(), digest_size=12).hexdigest()
    return Place(
        run, storable(run or store.name), storable(store.at(run).url), key,
        max((time for *_, time in own), default=0.0), sum(size for name, size, _ in own if name != ALIVE),
    )  # fmt: skip


def storable(text: str) -> str:
    """A text that a table can hold: names of files may have bytes that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


@functools.cache
def judged_by() -> str:
    """What a row depends on besides the log: our code, by its content, and the detectors of others."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    for entry in sorted(entry_points(group="layerwatch.detectors")):
        digest.update(f"{entry.value}{entry.dist.version if entry.dist else ''}".encode())
    return digest.hexdigest()
