"""Where runs lie: a local folder or a prefix of an object store, behind the few questions that readers ask.

Names inside a store are relative and use "/": `run.json`, `stats/r0-000001.parquet`, `group/exp1`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from pathlib import Path

import pyarrow as pa

from .schema import SCHEMAS

#: The folder of a run that holds the records of its checkpoints.
RECORDS = "lineage"
#: Folders of a run itself: nothing below them is a run.
INSIDE = {"wal", "damaged", RECORDS, *SCHEMAS}
#: What a disk keeps to itself at its top.
_OF_THE_DISK = "lost+found"


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
            FileNotFoundError: there is none; a named pipe is none, and would be waited for.
        """
        path = self._folder / name
        if stat.S_ISFIFO(path.stat().st_mode):
            raise FileNotFoundError(errno.ENOENT, "a named pipe is no file", str(path))
        return path.read_bytes()

    def put(self, name: str, content: bytes | Path) -> None:
        """Store bytes or a local file under a name: visible whole or not at all."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            temporary.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def tree(self, private: list[str] | None = None) -> dict[str, tuple[int, float]]:
        """Every file at or below this folder -> bytes, unix seconds of its last change; hidden ones left out.

        Of an object store one request brings 1,000 of them.

        Args:
            private: gets the names of folders below this one that others keep to themselves.

        Raises:
            OSError: it cannot be listed, so that nobody knows what is there.
        """

        def unlisted(error: OSError) -> None:
            """A folder that has just gone is no fault, nor is one below that is not for us."""
            place = Path(os.fsdecode(error.filename or self._folder))
            if isinstance(error, PermissionError) and place != self._folder:
                if private is not None and place.name != _OF_THE_DISK:
                    private.append(place.relative_to(self._folder).as_posix())
            elif not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise error

        found = {}
        for folder, names, files in os.walk(self._folder, onerror=unlisted, followlinks=False):
            names[:] = [n for n in names if not n.startswith(".")]
            inside = Path(folder).relative_to(self._folder).as_posix()
            for name in files:
                if not name.startswith("."):
                    with contextlib.suppress(OSError):  # it has just been merged into another one
                        known = os.stat(os.path.join(folder, name))
                        if stat.S_ISREG(known.st_mode):
                            place = name if inside == "." else f"{inside}/{name}"
                            found[place] = known.st_size, known.st_mtime
        return found

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


def store_of(path: str | Path | Store) -> Store:
    """The store at a local path or a URL (`s3://bucket/prefix`); a store is one already.

    Raises:
        StoreError: the URL is not as expected, or no package for its scheme is installed.
    """
    if isinstance(path, Store):
        return path
    if isinstance(path, str) and "://" in path:
        from .remote import Address, RemoteStore  # imports pyarrow.fs with its S3 client

        return RemoteStore(Address.of(path))
    return Store(Path(path))


def parted(path: str | Path) -> tuple[str | Path, str]:
    """The folder of a file, a path or a URL with its options, and the file's name."""
    if isinstance(path, str) and "://" in path:
        place, mark, options = path.partition("?")
        folder, _, name = place.rpartition("/")
        return f"{folder}{mark}{options}", name
    return Path(path).parent, Path(path).name


def joined(folder: str | Path, name: str) -> str | Path:
    """A file of a folder, which is a path or a URL with its options."""
    if isinstance(folder, str) and "://" in folder:
        place, mark, options = folder.partition("?")
        return f"{place.rstrip('/')}/{name}{mark}{options}"
    return Path(folder) / name
