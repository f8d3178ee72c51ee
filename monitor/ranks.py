"""The processes (ranks) that write one run: their names, and what each tells of itself.

Every rank appends to files of its own, `r0`, `r1`, ...: none waits for another. What belongs together is put
together when it is read: see `joint`.
"""

from __future__ import annotations

import json
from typing import Any

from .errors import StoreError
from .store import Store

#: Where the processes other than the first describe themselves: `ranks/r3.json`, as run.json does of r0.
FOLDER = "ranks"
FIRST = "r0"
#: No training has more processes: a run.json that says so is wrong.
MOST = 100_000


def writer_of(rank: int) -> str:
    """The name under which a rank writes."""
    return f"r{rank}"


def rank_of(writer: str) -> int:
    """The rank of a writer; -1 of another name."""
    return int(writer[1:]) if writer[:1] == "r" and writer[1:].isdigit() else -1


def world_of(info: dict[str, Any]) -> int:
    """How many processes write a run together, by its run.json; 1 where that says nothing sensible."""
    size = info.get("world")
    return int(size) if isinstance(size, int) and 0 < size <= MOST else 1


def description_of(writer: str) -> str:
    """The file in which a writer describes itself."""
    return "run.json" if writer == FIRST else f"{FOLDER}/{writer}.json"


def descriptions(store: Store) -> dict[str, dict[str, Any]]:
    """By writer, what each rank tells of itself; one that is damaged, or being replaced, is left out."""
    names = {FIRST: "run.json"} | {n.removesuffix(".json"): f"{FOLDER}/{n}" for n in store.list(FOLDER)}
    found = {}
    for writer in sorted(names, key=rank_of):
        try:
            content = json.loads(store.read(names[writer]))
        except StoreError:
            raise
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and rank_of(writer) >= 0:
            found[writer] = content
    return found


def with_others(info: dict[str, Any], store: Store) -> dict[str, Any]:
    """run.json with the tensors and modules that only other ranks have, in order of rank."""
    if world_of(info) < 2:
        return info
    whole = dict(info)
    for writer, other in descriptions(store).items():
        for table, key in (("tensors", "tensor"), ("modules", "module")):
            known = {entry[key] for entry in whole.get(table, [])}
            more = [e for e in other.get(table, []) if isinstance(e, dict) and e.get(key) not in known]
            if writer != FIRST and more:
                whole[table] = [*whole.get(table, []), *more]
    return whole
