"""Where weights come from: the checkpoints that runs have recorded, found by digest, and their parents.

A run keeps one JSON file for each in `lineage/`; its name holds the beginnings of both digests, so that a
search reads names, of an object store too, and few files. Nothing is kept beside the weights themselves.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .description import checksum_agrees, write_json
from .errors import RunError, StoreError
from .runs import run_folders
from .store import RECORDS, Store, store_of
from .weights.digests import TensorDigest, sha256_of_set
from .weights.names import canonical, matched
from .weights.source import Entry

VERSION = 1
#: Characters of a digest in a file's name.
_BEGINNING = 16
#: So large a share of a record's floating-point numbers must be the same for weights to count as altered ones
#: of it: tables of positions and tensors of zeros or ones are the same in unrelated models.
MOST = 0.5
NO_PARENT = "no parent is recorded: trained from scratch, or from weights loaded without reference=, parent="


@dataclass(frozen=True)
class Checkpoint:
    """A recorded checkpoint: `run`, the path or URL of the run that holds the record; `record`, its content
    (docs/log-format.md, "lineage")."""

    run: str
    record: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.record["step"])

    @property
    def tensors(self) -> dict[str, TensorDigest]:
        """By stored name."""
        return {
            name: TensorDigest(Entry(name, tuple(map(int, filter(None, shape.split(",")))), dtype), sha256)
            for name, (dtype, shape, sha256) in ((n, told.split(" ")) for n, told in self._told())
        }

    def _told(self) -> Iterable[tuple[str, str]]:
        return self.record["tensors"].items()

    def facts(self) -> dict[str, Any]:
        """Without the tensors; `run` is where the run lies now, `run_name` its name when it was recorded."""
        told = {name: value for name, value in self.record.items() if name not in ("tensors", "tied")}
        return {**told, "run": self.run, "run_name": self.record.get("run")}


def write_record(folder: Path, record: Mapping[str, Any], name: str) -> None:
    """Keep a record in a run's folder, whole or not at all.

    Args:
        name: unique in the run and in the order of time; the digests are added. NaN and infinities (in a
            configuration) become null.
    """
    (folder / RECORDS).mkdir(parents=True, exist_ok=True)
    finite = json.loads(json.dumps(record, default=str), parse_constant=lambda _: None)
    write_json(folder / RECORDS / f"{name}-{_beginnings(record)}.json", finite)


def _beginnings(record: Mapping[str, Any]) -> str:
    return f"{record['sha256'][:_BEGINNING]}-{(record['weights_sha256'] or 'none')[:_BEGINNING]}"


class Records:
    """The checkpoints that the runs below some folders have recorded.

    Args:
        roots: folders of runs, or runs, or their URLs.

    Attributes:
        problems: file -> why it is left out. runs: how many were searched.

    Raises:
        RunError: a root does not exist. StoreError: an object store cannot be read.
    """

    def __init__(self, roots: Sequence[str | Path]) -> None:
        self.problems: dict[str, str] = {}
        self.runs = 0
        self._files: list[tuple[Store, str, str]] = []  # root, folder of the run, name of the file
        self._read: dict[tuple[str, str, str], Checkpoint | None] = {}
        for root in roots:
            self._search(store_of(root))

    def _search(self, root: Store) -> None:
        if root.path is not None and not root.path.is_dir():
            raise RunError(
                f"expected a folder of runs, but {root.url} is none: name it with --runs (in Python: runs=)"
            )
        for folder in run_folders(root):
            self.runs += 1
            names = sorted(root.list(_inside(folder)))
            self._files += [(root, folder, name) for name in names if name[-5:] == ".json"]

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Checkpoint]:
        """All, the earliest first."""
        found = [c for file in self._files if (c := self._open(*file)) is not None]
        return iter(sorted(found, key=lambda c: c.record["time"]))

    def of(self, sha256: str | None, weights_sha256: str | None = None) -> list[Checkpoint]:
        """Those of the file with this digest, or else those of these weights; the earliest first."""
        for key, digest, place in (("sha256", sha256, -2), ("weights_sha256", weights_sha256, -1)):
            if not digest:
                continue
            names = [f for f in self._files if f[2][:-5].split("-")[place] == digest[:_BEGINNING]]
            opened = [c for file in names if (c := self._open(*file)) is not None]
            if found := [c for c in opened if c.record[key] == digest]:
                return sorted(found, key=lambda c: c.record["time"])
        return []

    def _open(self, root: Store, folder: str, name: str) -> Checkpoint | None:
        key = (root.url, folder, name)
        if key not in self._read:
            run = root.at(folder).url
            try:
                content = root.read(f"{_inside(folder)}/{name}")
                if not checksum_agrees(content):
                    raise ValueError("its checksum is wrong")
                self._read[key] = Checkpoint(run, _sound(json.loads(content)))
            except StoreError:
                raise
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                self._read[key] = None
                self.problems[f"{run}/{RECORDS}/{name}"] = f"is damaged and left out: {error!r:.120}"
        return self._read[key]


def _inside(folder: str) -> str:
    return f"{folder}/{RECORDS}" if folder else RECORDS


def _sound(record: dict[str, Any]) -> dict[str, Any]:
    """The record, if it is whole; see the caller for what is raised."""
    if record["version"] > VERSION:
        raise ValueError("a newer layerwatch wrote it: upgrade layerwatch")
    tensors = Checkpoint("", record).tensors
    if record["weights_sha256"] not in (None, sha256_of_set(tensors)) or len(record["sha256"]) != 64:
        raise ValueError("its digests do not agree")
    for key, kind in (("step", int), ("time", (int, float)), ("files", list), ("parent", (dict, type(None)))):
        if not isinstance(record[key], kind):
            raise ValueError(f"{key} is not as expected")
    return {"data": None, "git_commit": None, "seed": None, "config": {}, "tied": [], **record}


@dataclass
class Difference:
    """What weights are against a record, tensor by tensor, by the names in the file; `missing` by those of
    the record.

    Attributes:
        equal: how many are the same. share: of the record's numbers that are in these.
        altered: of the same type and shape. retyped, reshaped: name -> (in the record, in the file).
        aliases: missing under their own name; the same tensor, tied, is there under another.
        unread: cannot be read in the file, and why.
    """

    equal: int = 0
    share: float = 0.0
    altered: list[str] = field(default_factory=list)
    retyped: dict[str, tuple[str, str]] = field(default_factory=dict)
    reshaped: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)

    @property
    def none(self) -> bool:
        """The weights are the same."""
        return not (
            self.altered or self.retyped or self.reshaped or self.missing or self.added or self.unread
        )


def difference(
    recorded: Checkpoint, found: Mapping[str, TensorDigest], unread: Mapping[str, str]
) -> Difference:
    """Compare weights with a record; names match through prefixes, as everywhere (`weights.matched`)."""
    ours = recorded.tensors
    names = matched({n: d.entry for n, d in ours.items()}, {n: d.entry for n, d in found.items()})
    told = Difference(added=names.only_in_b, unread=dict(unread))
    equal = 0
    for was, now in names.pairs.values():
        before, after = ours[was], found[now]
        if before.sha256 == after.sha256:
            told.equal += 1
            equal += _weight(before)
        elif before.entry.shape != after.entry.shape:
            told.reshaped[now] = (list(before.entry.shape), list(after.entry.shape))
        elif before.entry.dtype != after.entry.dtype:
            told.retyped[now] = (before.entry.dtype, after.entry.dtype)
        else:
            told.altered.append(now)
    present = {ours[was].sha256 for was, now in names.pairs.values() if ours[was].sha256 == found[now].sha256}
    tied = {name for group in recorded.record["tied"] for name in group}
    for name in names.only_in_a:
        if name in unread:
            continue
        alias = canonical(name) in tied and ours[name].sha256 in present
        (told.aliases if alias else told.missing).append(name)
    told.share = equal / max(sum(map(_weight, ours.values())), 1)
    return told


def _weight(digest: TensorDigest) -> int:
    return digest.entry.numbers if digest.entry.is_float else 0


def nearest(
    records: Records, found: Mapping[str, TensorDigest], path: Path | None = None
) -> Checkpoint | None:
    """The checkpoint with which weights have most numbers in common, in tensors that are the same; of equal
    ones the latest. If none has any: the latest that was recorded at this path, or None."""
    here = Counter[str]()
    for digest in found.values():
        here[digest.sha256] += _weight(digest)
    best: tuple[int, Checkpoint | None] = (0, None)
    for checkpoint in records:
        common = sum(here[sha256] for sha256 in {d.sha256 for d in checkpoint.tensors.values()})
        same_path = path is not None and checkpoint.record.get("path") == str(path)
        if common > best[0] or (common == best[0] and (common or same_path)):
            best = common, checkpoint
    return best[1]


def parents(records: Records, checkpoint: Checkpoint) -> tuple[list[Checkpoint], str]:
    """The chain of parents, the nearest first, this checkpoint left out; and why it ends there."""
    chain, seen = [checkpoint], {_key(checkpoint)}
    while True:
        child = chain[-1]
        parent = child.record["parent"]
        if parent is None:
            return chain[1:], NO_PARENT
        candidates = records.of(parent.get("sha256"), parent.get("weights_sha256"))
        if not candidates:
            return chain[1:], _lost(parent)
        new = [c for c in candidates if _key(c) not in seen]
        if not new:
            first = candidates[0]
            return chain[1:], f"a cycle: its parent is step {first.step} of {first.run} again"
        # The same weights may be recorded several times: what came last before the child.
        before = [c for c in new if c.record["time"] <= child.record["time"]]
        chain.append((before or new)[-1 if before else 0])
        seen.add(_key(chain[-1]))


def _key(checkpoint: Checkpoint) -> tuple[Any, ...]:
    record = checkpoint.record
    return record["sha256"], record["time"], record["step"], record.get("run_created")


def _lost(parent: Mapping[str, Any]) -> str:
    """Why a parent is not found."""
    where = str(parent.get("path") or "a file whose path is not known")
    if not parent.get("sha256"):
        return f"{where}: {parent.get('problem') or 'its digest is not known'}"
    if parent.get("run"):
        return (
            f"{where}, SHA-256 {parent['sha256']}: run {parent['run']} recorded it, which is not among the "
            "runs that were searched"
        )
    return f"{where}, SHA-256 {parent['sha256']}: no run that was searched has recorded it"
