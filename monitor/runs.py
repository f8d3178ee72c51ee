"""Many runs below one folder."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import RunError
from .run import Run

#: Folders of a run itself: nothing below them is a run.
_INSIDE = {"wal", "stats", "values", "scalars", "events"}


def run_folders(root: str | Path) -> list[Path]:
    """Every folder at or below `root` that holds a run.json, in order of path."""
    found = []
    for folder, names, files in os.walk(Path(root), followlinks=False):
        if "run.json" in files:
            found.append(Path(folder))
            names[:] = [n for n in names if n not in _INSIDE]
        names[:] = sorted(n for n in names if not n.startswith("."))
    return found


def scan_runs(root: str | Path) -> tuple[list[Run], dict[Path, str]]:
    """Every run below `root`, newest first, and what is wrong with those that cannot be opened.

    Raises:
        RunError: `root` is no folder.
    """
    if not Path(root).is_dir():
        raise RunError(f"expected a folder that holds runs, but {root} is none: check the path")
    runs, broken = [], {}
    for folder in run_folders(root):
        try:
            runs.append(Run(folder))
        except RunError as error:
            broken[folder] = str(error)
    return sorted(runs, key=lambda r: -float(r.info.get("created") or 0)), broken


def open_runs(root: str | Path) -> list[Run]:
    """Every readable run below `root`, newest first."""
    return scan_runs(root)[0]
