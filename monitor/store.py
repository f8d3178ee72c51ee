"""Where runs lie: a local folder or a prefix of an object store, behind the few questions that readers ask.

Names inside a store are relative and use "/": `run.json`, `stats/r0-000001.parquet`, `group/exp1`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa

from .schema import SCHEMAS

#: The folder of a run that holds the records of its checkpoints.
RECORDS = "lineage"
#: Folders of a run itself: nothing below them is a run.
INSIDE = {"wal", "damaged", RECORDS, *SCHEMAS}


class Store:
    """A local folder. `store_of` makes one of a path, or its remote twin of a URL."""

    #: The folder, None of a remote store.
    path: Path | None

    def __init__(self, path: Path) -> None:
        self._folder = self.path = path
        self.url = str(path)  # as shown to users
        self.name = path.resolve().name

    def __repr__(self) -> str:
        return f"store_of({self.url!r})"

    def at(self, folder: str) -> Store:
        """A folder of this store as a store; "" is this one."""
        return Store(self._folder / folder) if folder else self

    def refresh(self) -> None:
        """Forget what was remembered of the listing; a local folder is always looked at afresh."""

    def list(self, folder: str = "") -> dict[str, int]:
        """File name -> bytes of the files in a folder, hidden ones left out; {} when it does not exist."""
        while True:
            try:
                with os.scandir(self._folder / folder) as entries:
                    seen = [e for e in entries if not e.name.startswith(".")]
                return {e.name: e.stat().st_size for e in seen if e.is_file()}
            except FileNotFoundError:  # the folder is missing, or a file was just merged into another one
                if not (self._folder / folder).is_dir():
                    return {}
            except NotADirectoryError:
                return {}

    def modified(self, name: str) -> float | None:
        """Unix seconds of the last change of a file, None when there is none."""
        try:
            return (self._folder / name).stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: there is none.
        """
        return (self._folder / name).read_bytes()

    def open(self, name: str) -> pa.NativeFile:
        """A file for random access.

        Raises:
            FileNotFoundError: there is none.
        """
        return pa.OSFile(str(self._folder / name), "rb")

    def folders_with(self, name: str) -> list[str]:
        """The folders at or below this one that hold a file of this name, sorted; "" is this one.

        Hidden folders, links and what lies inside a found folder's tables are not searched.
        """
        found = []
        for folder, names, files in os.walk(self._folder, followlinks=False):
            if name in files:
                relative = Path(folder).relative_to(self._folder).as_posix()
                found.append("" if relative == "." else relative)
                names[:] = [n for n in names if n not in INSIDE]
            names[:] = sorted(n for n in names if not n.startswith("."))
        return found

    def explained(self, name: str, error: Exception) -> Exception:
        """What an error in reading a file means: the error itself (the file is damaged), a FileNotFoundError
        (it has gone, look again) or a `StoreError` (the store could not be reached; never of a folder)."""
        return error


def store_of(path: str | Path) -> Store:
    """The store at a local path or a URL (`s3://bucket/prefix`).

    Raises:
        StoreError: the URL is not as expected, or no package for its scheme is installed.
    """
    if isinstance(path, str) and "://" in path:
        from .remote import Address, RemoteStore  # imports pyarrow.fs with its S3 client

        return RemoteStore(Address.of(path))
    return Store(Path(path))
