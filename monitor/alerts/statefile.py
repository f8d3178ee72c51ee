"""Where a watchman remembers who was told of what: a JSON file, local or on an object store."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import IO, Any

from ..errors import RunError, StoreError
from ..store import Store, parted, store_of

logger = logging.getLogger("layerwatch")


class StateFile:
    """One watchman's at a time, where the file system has locks: two would tell everything twice.

    Args:
        path: a local path, or the URL of an object.

    Raises:
        RunError: another process uses it, or its folder cannot be written. StoreError: the URL is not sound.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        folder, self._name = parted(path)
        self._store = store_of(folder)
        self._lock = _lock(self._store, self._name)

    def read(self) -> Any:
        """What was written last, None at the first time.

        Raises:
            RunError: it cannot be read. StoreError: its object store cannot be used.
        """
        try:
            return json.loads(self._store.read(self._name))
        except FileNotFoundError:
            return None
        except StoreError:
            raise
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError):
            raise self.damaged() from None

    def damaged(self) -> RunError:
        """The error about a content that makes no sense."""
        return RunError(
            f"{self.path} is damaged, so that nobody knows who was told of what: remove it to begin anew"
        )

    def write(self, content: dict[str, Any]) -> None:
        """Whole or not at all. That it cannot be written is logged: messages go out all the same."""
        try:
            self._store.put(self._name, json.dumps(content, indent=1, allow_nan=False).encode())
        except (OSError, StoreError) as error:
            logger.warning("the watchman's state cannot be written to %s: %s", self.path, error)

    def close(self) -> None:
        """Others may use it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _lock(store: Store, name: str) -> IO[bytes] | None:
    """None where there are no locks: on object stores, on Windows."""
    if store.path is None or importlib.util.find_spec("fcntl") is None:
        return None
    import fcntl

    try:
        store.path.mkdir(parents=True, exist_ok=True)
        file = (store.path / f".{name}.lock").open("ab")
    except OSError as error:
        raise RunError(
            f"expected a folder for the watchman's state, but {store.path} cannot be written "
            f"({error.strerror or error}): choose another place"
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunError(
            f"expected to be the only watchman, but another process uses {store.path / name}: end that "
            "one first"
        ) from None
    except OSError:  # a file system without locks
        file.close()
        return None
    return file
