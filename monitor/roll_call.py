"""What a run of several ranks tells of them: who is missing, whether copies agree, how noisy they are."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pandas as pd

from .ranks import descriptions, rank_of, world_of, writer_of

#: The kind of values that tell whether copies of a tensor are the same on several ranks.
CHECKSUM = "checksum"
#: A rank that is so many steps behind the others, and was not closed, counts as missing.
BEHIND = 250


def told_of_ranks(log: Any, info: dict[str, Any], alive: Callable[[Any, Any], bool]) -> pd.DataFrame:
    """See `Run.ranks`.

    Args:
        log: a `LogReader`. info: the content of run.json. alive: tells whether a process of this machine, by
            its number and when it was started, still runs.
    """
    told, size = descriptions(log.store), world_of(info)
    last = dict.fromkeys(range(size), -1) | {rank_of(w): step for w, step in log.last_steps().items()}
    rows = []
    for rank, step in sorted(last.items())[:size]:  # a training may go on with fewer ranks
        own = told.get(writer_of(rank), {})
        dead = not own or (
            not own.get("closed")
            and own.get("host") == socket.gethostname()
            and not alive(own.get("pid"), own.get("process_started"))
        )
        behind = not own.get("closed") and step + BEHIND < max(last.values())
        missing = step + 1 if dead or behind else None
        rows.append((rank, own.get("host"), own.get("pid"), bool(own.get("closed")), step, missing))
    frame = pd.DataFrame(rows, columns=["rank", "host", "pid", "closed", "last_step", "missing_since"])
    return frame.astype({"missing_since": "Int64", "pid": "Int64"})


def told_of_replicas(log: Any, *, several: bool) -> pd.DataFrame:
    """See `Run.checksums`."""
    columns = ["step", "tensor", "part", "rank", "checksum"]
    rows: list[tuple[int, str, str, int, int]] = []
    where = {"kind": [CHECKSUM]}
    for writer, found in log.by_rank("values", ["step", "tensor", "values"], where) if several else ():
        for row in found.to_pylist():
            value, *place = map(int, row["values"])
            part = str(tuple(place)) if place else ""
            rows.append((row["step"], row["tensor"], part, rank_of(writer), value))
    return pd.DataFrame(sorted(rows), columns=columns)


def noise(log: Any, smoothing: float) -> pd.DataFrame:
    """See `Run.noise_scale`."""
    columns, where = ["step", "name", "value"], {"name": ["grad_norm", "local_grad_norm"]}
    tables = [rows.to_pandas().assign(rank=rank_of(w)) for w, rows in log.by_rank("scalars", columns, where)]
    rows = pd.concat([t for t in tables if len(t)] or tables[:1])
    rows["square"] = rows["value"].to_numpy(float) ** 2
    of = {str(name): frame for name, frame in rows.groupby(rows["name"].astype(str))}
    own, shared = of.get("local_grad_norm", rows[:0]), of.get("grad_norm", rows[:0])
    local = own.drop_duplicates(["step", "rank"]).groupby("step")["square"].agg(["mean", "size"])
    big = shared.sort_values("rank").drop_duplicates("step").set_index("step")["square"]
    local = local[(local["size"] > 1) & local.index.isin(big.index)]
    small, ranks, big = local["mean"], local["size"], big.reindex(local.index)
    signal, spread = (ranks * big - small) / (ranks - 1), (small - big) / (1 - 1 / ranks)
    found = pd.DataFrame({"signal": signal, "noise": spread}).reset_index()
    mean = found[["signal", "noise"]].ewm(alpha=1 - smoothing).mean()
    ratio = mean["noise"] / mean["signal"].where(mean["signal"] > 0)
    return found.assign(noise_scale=ratio)
