"""Many runs below one folder or one prefix of an object store."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from .errors import RunError
from .run import Run
from .store import Store, store_of

#: So many runs are opened at a time where each takes several round trips.
TOGETHER = 8
Result = TypeVar("Result")


def run_folders(store: Store) -> list[str]:
    """Every folder at or below the store that holds a run.json, in order; "" is the store itself.

    Raises:
        StoreError: the object store cannot be read.
    """
    store.refresh()
    return store.folders_with("run.json")


def scan_runs(root: str | Path) -> tuple[list[Run], dict[str, str]]:
    """Every run below `root`, newest first; and, by path or URL, what is wrong with the others.

    Raises:
        RunError: `root` is no folder. StoreError: its object store cannot be read.
    """
    store = store_of(root)
    if store.path is not None and not store.path.is_dir():
        raise RunError(f"expected a folder that holds runs, but {root} is none: check the path")
    urls = [store.at(folder).url for folder in run_folders(store)]
    runs, broken = [], {}
    for url, opened in zip(urls, each(store, urls, _try), strict=True):
        if isinstance(opened, Run):
            runs.append(opened)
        else:
            broken[url] = opened
    return sorted(runs, key=lambda r: -float(r.info.get("created") or 0)), broken


def _try(url: str) -> Run | str:
    try:
        return Run(url)
    except RunError as error:
        return str(error)


def each(store: Store, items: Iterable[str], work: Callable[[str], Result]) -> list[Result]:
    """`work` of each item, several at a time where the store is remote."""
    if store.path is not None:
        return [work(item) for item in items]
    with ThreadPoolExecutor(TOGETHER, thread_name_prefix="layerwatch-open") as pool:
        return list(pool.map(work, items))


def open_runs(root: str | Path) -> list[Run]:
    """Every readable run below `root`, newest first."""
    return scan_runs(root)[0]
