"""What was computed of a run, on disk between two starts of the server, never inside the run's folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

#: So many runs are remembered; of a new one too many, the tenth that was written longest ago is forgotten.
MOST = 4000


def cache_folder() -> Path:
    """The user's folder for what can be computed again; LAYERWATCH_CACHE names another."""
    if own := os.environ.get("LAYERWATCH_CACHE"):
        return Path(own)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "layerwatch"


@functools.cache
def engine() -> str:
    """What answers depend on besides the log: our version, the files of `monitor`, detectors of others."""
    from .. import __version__, monitor

    files = sorted(Path(str(monitor.__file__)).parent.rglob("*.py"))
    found = [f"{path.name}{path.stat().st_size}.{path.stat().st_mtime_ns}" for path in files]
    others = [
        f"{e.value}{e.dist.version if e.dist else ''}" for e in entry_points(group="layerwatch.detectors")
    ]
    return hashlib.blake2b(
        "|".join([__version__, *found, *sorted(others)]).encode(), digest_size=12
    ).hexdigest()


class Shelf:
    """One kind of answers, a file for each run. What cannot be read or written is as if it were not there.

    Args:
        kind: the name of the folder.
    """

    def __init__(self, kind: str) -> None:
        self._folder = cache_folder() / kind
        self._written = 0

    def get(self, url: str, stamp: str) -> dict[str, Any] | None:
        """The answer for this state of a run."""
        try:
            kept = json.loads(self._file(url).read_text())
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(kept, dict) or kept.get("for") != [url, stamp, engine()]:
            return None
        answer = kept.get("answer")
        return answer if isinstance(answer, dict) else None

    def put(self, url: str, stamp: str, answer: dict[str, Any]) -> None:
        """Remember an answer; it replaces that of an earlier state of the run."""
        content = json.dumps({"for": [url, stamp, engine()], "answer": answer})
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Whole, then renamed: another server may read it at this moment.
            with tempfile.NamedTemporaryFile("w", dir=self._folder, suffix=".tmp", delete=False) as file:
                file.write(content)
            os.replace(file.name, self._file(url))
            self._written += 1
            if self._written % 100 == 1:
                self._forget()

    def _file(self, url: str) -> Path:
        return self._folder / f"{hashlib.blake2b(url.encode(), digest_size=16).hexdigest()}.json"

    def _forget(self) -> None:
        files = list(self._folder.iterdir())
        if len(files) > MOST:
            for file in sorted(files, key=lambda f: f.stat().st_mtime)[: len(files) - MOST * 9 // 10]:
                file.unlink(missing_ok=True)
