"""One run folder and its copy on an object store: what is missing there, and what is no longer needed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import StoreError
from .remote import RemoteStore
from .schema import SCHEMAS
from .spans import Span, counting
from .store import RECORDS, Store, store_of

#: An empty object that is written anew so often says that the training goes on (seconds).
ALIVE, ALIVE_SECONDS = "alive", 30.0
#: What the store holds is listed again so often, in case it lost something.
LIST_SECONDS = 300.0
#: In which order tables are sent: a session's rows count from its start event on.
ORDER = ("events", "scalars", *(name for name in SCHEMAS if name not in ("events", "scalars")))


class Mirror:
    """Keeps a copy of `local` at `url`. Every method may be repeated after an error.

    Raises:
        StoreError: the store cannot be used, or holds another run at this place.
    """

    def __init__(self, local: Path, url: str) -> None:
        store = store_of(url)
        if not isinstance(store, RemoteStore):
            raise StoreError(f"expected the URL of an object store, such as s3://bucket/exp1, got {url!r}")
        self.store, self.local = store, Store(local)
        self._there: dict[str, int] = {}  # name -> bytes
        self._info: bytes | None = None  # run.json as it is there
        self._describes = True  # run.json is ours to write
        self._listed, self._alive = float("-inf"), float("-inf")
        self._seen: set[str] = set()  # parts that were here once

    def send(self) -> None:
        """Bring the copy up to date: parts, then run.json, then what is covered or was dropped goes."""
        info = self.local.read("run.json")  # before the parts: when it says closed, they are all there
        if time.monotonic() - self._listed > LIST_SECONDS:
            self.look(info)
        here = self._here()
        for name in self._missing(here):
            self.store.put(name, self._path(name))
            self._there[name] = here[name]
        about = described(info)
        if info != self._info and self._describes:
            self.store.put("run.json", info)
            self._info = info
        for name in self._needless(here, about.get("keep") == "rollup"):
            self.store.remove(name)
            del self._there[name]
        if not about.get("closed") and time.monotonic() - self._alive > ALIVE_SECONDS:
            self.store.put(ALIVE, b"")
            self._alive = time.monotonic()

    def look(self, info: bytes) -> None:
        """List what is there, and see that it is the same run."""
        self.store.refresh()
        there = {f"{table}/{name}": size for table in ORDER for name, size in self.store.list(table).items()}
        there |= _others(self.store)
        self._info = self.store.read("run.json") if "run.json" in self.store.list() else None
        self._describes = self._owns(described(info), described(self._info))
        self._there, self._listed = there, time.monotonic()

    def _owns(self, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
        """Whether run.json is ours to write; a training that was resumed elsewhere has a newer one."""
        if not theirs:
            return True
        later = int(theirs.get("session", 0)) - int(ours.get("session", 0))
        process = [[i.get(key) for key in ("host", "pid", "process_started")] for i in (ours, theirs)]
        if theirs.get("created") != ours.get("created") or (later == 0 and process[0] != process[1]):
            raise StoreError(
                f"{self.store.url} holds another run already: this one is kept in {self.local.url}; "
                f"`layerwatch upload {self.store.url} --to URL` sends it elsewhere",
                lasting=True,
            )
        return later <= 0

    def unsent(self) -> list[str]:
        """What is not known to be there, write-ahead files included, which are never sent."""
        left = [f"wal/{name}" for name in self.local.list("wal")]
        if self._describes and self.local.read("run.json") != self._info:
            left.append("run.json")
        return [*self._missing(self._here()), *left]

    def finish(self) -> bool:
        """Look whether everything is there; if so, the training is no longer marked as going on."""
        self.look(self.local.read("run.json"))
        if self.unsent():
            return False
        self.store.remove(ALIVE)
        return True

    def remove_local(self) -> None:
        """After `finish`: nothing is needed here any more, but for files that were damaged."""
        if not self.local.list("damaged"):
            shutil.rmtree(self.local.url)

    def _path(self, name: str) -> Path:
        return Path(self.local.url) / name

    def _here(self) -> dict[str, int]:
        """Name -> bytes of the files that count, in the order of sending."""
        here = {}
        for folder in ORDER:
            files = self.local.list(folder)
            here.update({f"{folder}/{name}": files[name] for name in counting(files).values()})
        here |= _others(self.local)
        self._seen |= here.keys()
        return here

    def _missing(self, here: dict[str, int]) -> list[str]:
        """What is to be sent; not what a wider part holds there, written elsewhere."""
        count = _counting(here.keys() | self._there.keys())
        return [name for name, size in here.items() if self._there.get(name) != size and name in count]

    def _needless(self, here: dict[str, int], dropping: bool) -> list[str]:
        """Parts there that a wider one covers, or that are no longer kept here."""
        covered = self._there.keys() - _counting(self._there)
        if not dropping:
            return [*covered]
        oldest: dict[str, int] = {}
        for name in here:
            if span := Span.of(name):
                oldest[_folder(name)] = min(span.first, oldest.get(_folder(name), span.first))
        gone = (self._there.keys() & self._seen) - here.keys() - covered
        old = [n for n in gone if (s := Span.of(n)) and s.last < oldest.get(_folder(n), 0)]
        return [*covered, *old]


def _others(store: Store) -> dict[str, int]:
    """Name -> bytes of what is sent beside the tables: records of checkpoints, the traceback of an error."""
    found = {f"{RECORDS}/{name}": size for name, size in store.list(RECORDS).items() if name[-5:] == ".json"}
    return found | {name: size for name, size in store.list().items() if name == "errors.log"}


def described(info: bytes | None) -> dict[str, Any]:
    """run.json's content; {} when there is none or it cannot be read."""
    try:
        content = json.loads(info or b"{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _counting(names: Iterable[str]) -> set[str]:
    """Those that no other file of the same folder covers."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(_folder(name), []).append(name)
    foreign = {name for name in names if Span.of(name) is None}
    return foreign.union(*(counting(files).values() for files in folders.values()))
