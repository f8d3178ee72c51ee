"""Ranks that should hold the same weights and do not."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..findings import Finding
from .history import History
from .outcome import outcome
from .registry import detector


@detector("replica_desync")
def replica_desync(history: History) -> Finding | None:
    """Copies of a tensor on several ranks whose bits differ, at the last comparison.

    Every rank logs a checksum of what others hold as well (see `Run.checksums`). Data parallelism keeps
    copies equal bit by bit: one difference is proof, no threshold is needed. Told apart: copies that part and
    are averaged again (local SGD) differ at some comparisons and not at the last one, which is a remark.
    """
    differing = disagreement(history.source.checksums())
    if not differing.any(axis=None):
        return None
    wrong = differing.to_numpy()
    names = [str(n) for n in differing.columns[wrong.any(axis=0)]]
    steps = differing.index.to_numpy()
    first = {n: int(steps[np.argmax(differing[n].to_numpy())]) for n in names}
    order = {n: place for place, n in enumerate(history.tensors.index)}
    names.sort(key=lambda n: (first[n], order.get(n, len(order)), n))
    lasting = bool(wrong[-1].any())
    begin = first[names[0]]
    rank = odd_rank(history.source.checksums(), names[0], begin)
    who = f"rank {rank} holds other values than the rest" if rank is not None else "the ranks differ"
    ended = "" if lasting else ", and agree again later"
    facts = outcome(history)
    severity = "info" if not lasting else "critical" if facts.bad else "warning"
    evidence: dict[str, float | str] = {
        "differing_tensors": len(names), "compared_tensors": differing.shape[1],
        "comparisons": len(steps), "threshold": 0,
    }  # fmt: skip
    if rank is not None:
        evidence["rank"] = rank
    return history.finding(
        "replica_desync",
        severity,
        f"Copies of {len(names)} of {differing.shape[1]} tensors are not the same on all ranks{ended}: "
        f"{who}, first in {names[0]} at step {begin}.",
        first=begin,
        last=int(steps[np.flatnonzero(wrong.any(axis=1))[-1]]),
        layers=names,
        evidence=evidence,
        advice="Step every parameter inside the data-parallel wrapper and on every rank (no `if rank == 0:` "
        "around a step), and start all ranks from the same weights: broadcast them, or use one seed.",
        confidence=0.99 if lasting else 0.6,
    )


def disagreement(checksums: pd.DataFrame) -> pd.DataFrame:
    """bool (comparisons, tensors), by step: copies of the tensor differ. Only what several ranks hold."""
    if checksums.empty:
        return pd.DataFrame(dtype=bool)
    parts = checksums.groupby(["step", "tensor", "part"])["checksum"].agg(["size", "nunique"])
    parts = parts[parts["size"] > 1]
    wrong = (parts["nunique"] > 1).groupby(level=["step", "tensor"]).any()
    return wrong.unstack("tensor", fill_value=False).astype(bool) if len(wrong) else pd.DataFrame(dtype=bool)


def odd_rank(checksums: pd.DataFrame, tensor: str, step: int) -> int | None:
    """The one rank that differs from all others, which agree; None when it cannot be told."""
    rows = checksums[(checksums["tensor"] == tensor) & (checksums["step"] == step)]
    for _, part in rows.groupby("part"):
        counts = part["checksum"].value_counts()
        if len(counts) == 2 and counts.iloc[0] > 1 and counts.iloc[1] == 1:
            return int(part.loc[part["checksum"] == counts.index[1], "rank"].iloc[0])
    return None
