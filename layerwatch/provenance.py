"""`verify` and `lineage`: which run and step weights came from, whether they were altered, their parents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .monitor.errors import WeightsError
from .monitor.lineage import MOST, Checkpoint, Difference, Records, difference, nearest, parents
from .monitor.weights.digests import (
    FileDigest,
    TensorDigest,
    digests_of,
    name_in,
    sha256_of_file,
    sha256_of_files,
    sha256_of_set,
    weight_files,
)
from .monitor.weights.opening import Shards
from .weights import open_weights

#: Where runs are looked for.
RUNS = ("runs",)


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes:
        source: what was asked about. sha256: of its file or files, None of weights in memory.
        weights_sha256: of all tensors, whatever holds them; None where it was not needed or some are unread.
        status: "identical": the very file. "same_weights": the same tensors in another container, with other
            metadata, or in other files. "altered": more than half of the recorded numbers are in tensors that
            are the same. "unknown": no record of it; `checkpoint` is then the nearest one, if any.
        checkpoint: the record that it was compared with. also: further records of the same weights.
        difference: tensor by tensor; None if identical or without a record.
        unread: tensors or files that could not be read, and why.
        runs, checkpoints: how many were searched. problems: records that were left out, and why.
    """

    source: str
    status: str
    sha256: str | None
    weights_sha256: str | None = None
    checkpoint: Checkpoint | None = None
    also: list[Checkpoint] = field(default_factory=list)
    difference: Difference | None = None
    unread: dict[str, str] = field(default_factory=dict)
    runs: int = 0
    checkpoints: int = 0
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def known(self) -> bool:
        """It holds recorded weights, unaltered."""
        return self.status in ("identical", "same_weights")

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "version": 1,
            "source": self.source,
            "status": self.status,
            "sha256": self.sha256,
            "weights_sha256": self.weights_sha256,
            "checkpoint": self.checkpoint.facts() if self.checkpoint else None,
            "also": [{"run": c.run, "step": c.step} for c in self.also],
            "difference": asdict(self.difference) if self.difference else None,
            "unread": self.unread,
            "searched": {"runs": self.runs, "checkpoints": self.checkpoints},
            "problems": self.problems,
        }


@dataclass(frozen=True)
class Lineage:
    """What `lineage` found: the `verdict` on the weights, the `chain` of recorded checkpoints, the one that
    holds them first, and why the chain ends (`end`). The chain is empty where the weights are unknown."""

    verdict: Verdict
    chain: list[Checkpoint]
    end: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        chain = [checkpoint.facts() for checkpoint in self.chain]
        return {**self.verdict.to_dict(), "chain": chain, "end": self.end}


def verify(source: Any, runs: Sequence[str | Path] = RUNS) -> Verdict:
    """Which recorded checkpoint weights are: by the digest of the file, else of all tensors, else by the
    tensors that they have in common with one.

    Args:
        source: a weight file or a folder with one, or whatever `open_weights` takes.
        runs: folders of runs, or runs, or their URLs.

    Raises:
        WeightsError: there is no weight file. RunError: a folder of runs does not exist.
        OSError: a file cannot be read.
    """
    return _judge(source, Records(runs))


def lineage(source: Any, runs: Sequence[str | Path] = RUNS) -> Lineage:
    """The chain of parents of weights, as far as the runs have recorded it.

    Args, Raises: as `verify`.
    """
    records = Records(runs)
    verdict = _judge(source, records)
    if verdict.checkpoint is None or verdict.status == "unknown":
        return Lineage(verdict, [], "no run that was searched has recorded these weights")
    chain, end = parents(records, verdict.checkpoint)
    return Lineage(verdict, [verdict.checkpoint, *chain], end)


def _judge(source: Any, records: Records) -> Verdict:
    path = Path(source).absolute() if isinstance(source, str | Path) else None
    sha256 = _sha256_at(path) if path else None
    here = {
        "source": str(source) if path else type(source).__name__,
        "runs": records.runs, "checkpoints": len(records), "problems": records.problems,
    }  # fmt: skip
    if found := records.of(sha256):
        return Verdict(
            status="identical", sha256=sha256, weights_sha256=found[0].record["weights_sha256"],
            checkpoint=found[0], also=found[1:], **here,
        )  # fmt: skip
    tensors, unread = _of_files(path) if path else _of_memory(source)
    weights_sha256 = sha256_of_set(tensors) if tensors and not unread else None
    same = records.of(None, weights_sha256)
    checkpoint = same[0] if same else nearest(records, tensors, path)
    told = difference(checkpoint, tensors, unread) if checkpoint else None
    status = "unknown"
    if told is not None:
        status = "same_weights" if told.none else "altered" if told.share > MOST else "unknown"
    return Verdict(
        status=status, sha256=sha256, weights_sha256=weights_sha256, checkpoint=checkpoint, also=same[1:],
        difference=told, unread=unread, **here,
    )  # fmt: skip


def _sha256_at(path: Path) -> str:
    digests = []
    for name, file in _files(path).items():
        with file.open("rb", buffering=0) as opened:
            sha256, size = sha256_of_file(opened)
        digests.append(FileDigest(name, size, sha256))
    if not digests:
        raise WeightsError(f"expected a weight file or a folder with one, but there is none at {path}")
    return sha256_of_files(digests)


def _files(path: Path) -> dict[str, Path]:
    return {name_in(path, file): file for file in (weight_files(path) if path.exists() else [])}


def _of_files(path: Path) -> tuple[dict[str, TensorDigest], dict[str, str]]:
    """The digests of all tensors that can be read, and what cannot."""
    parts, unread = [], {}
    for name, file in _files(path).items():
        try:
            if not name.endswith(".index.json"):
                parts.append(open_weights(file))
        except WeightsError as error:
            unread[name] = str(error)
    with Shards(str(path), parts) as weights:
        digests, problems = digests_of(weights)
    return digests, unread | problems


def _of_memory(source: Any) -> tuple[dict[str, TensorDigest], dict[str, str]]:
    with open_weights(source) as weights:
        return digests_of(weights)
