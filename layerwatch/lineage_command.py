"""`layerwatch verify` and `layerwatch lineage`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .terminal import new_table, plain, say

if TYPE_CHECKING:
    from .monitor.lineage import Checkpoint, Difference
    from .provenance import Verdict

#: Tensors of one sort that are listed; JSON has all.
MOST_LISTED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of both commands."""
    parser.add_argument(
        "path", metavar="FILE", help="weight file, index of a sharded one, or folder with one"
    )
    parser.add_argument(
        "--runs",
        action="append",
        metavar="DIR",
        help="folder of runs, or a run, or its URL, to search; may be given several times (default: runs)",
    )
    parser.add_argument("--format", choices=("text", "json"), default="text", help="(default: %(default)s)")


def verify(options: argparse.Namespace) -> int:
    from .provenance import RUNS
    from .provenance import verify as find

    verdict = find(options.path, options.runs or RUNS)
    if options.format == "json":
        _print_json(verdict.to_dict())
    else:
        _say_verdict(verdict)
    return int(not verdict.known)


def lineage(options: argparse.Namespace) -> int:
    from rich.markup import escape

    from .provenance import RUNS
    from .provenance import lineage as find

    found = find(options.path, options.runs or RUNS)
    if options.format == "json":
        _print_json(found.to_dict())
        return int(not found.verdict.known)
    _say_verdict(found.verdict)
    if found.chain:
        table = new_table("", "run", "step", "time", "commit", "seed", "data", "SHA-256", "saved as")
        for place, checkpoint in enumerate(found.chain):
            how = found.chain[place - 1].record["parent"]["how"] if place else "this"
            table.add_row(how, *map(escape, _row(checkpoint)))
        say(table)
    say(f"The chain ends here: {plain(found.end)}.")
    return int(not found.verdict.known)


def _print_json(document: dict[str, Any]) -> None:
    import json

    print(json.dumps(document, indent=1, allow_nan=False))


def _say_verdict(verdict: Verdict) -> None:
    from rich.markup import escape

    say(f"[bold]{plain(verdict.source)}[/]: {plain(_words(verdict))}")
    if verdict.checkpoint is not None:
        table = new_table("recorded", "")
        for name, value in _facts(verdict.checkpoint):
            table.add_row(name, escape(value))
        say(table)
    for other in verdict.also:
        say(plain(f"The same weights: step {other.step} of {other.run}"))
    if verdict.difference is not None and not verdict.difference.none:
        table = new_table("tensor", "against the record")
        for name, what in _changes(verdict.difference):
            table.add_row(escape(name), escape(what))
        say(table)
    if verdict.difference is None:
        for name, why in verdict.unread.items():
            say(plain(f"{name} cannot be read: {why}"))
    for name, why in verdict.problems.items():
        say(f"[dim]note: {plain(name)} {plain(why)}[/]")


def _words(verdict: Verdict) -> str:
    """The verdict in one sentence."""
    checkpoint, told = verdict.checkpoint, verdict.difference
    where = f"step {checkpoint.step} of {checkpoint.run}" if checkpoint else ""
    searched = f"{verdict.checkpoints} checkpoints of {verdict.runs} runs were searched"
    if verdict.status == "identical":
        return f"identical to the checkpoint of {where}"
    if told is None or checkpoint is None:
        return f"unknown: {searched}, and none has a tensor of it"
    tensors = len(checkpoint.record["tensors"])
    if verdict.status == "same_weights":
        aliases = f"; without {', '.join(told.aliases)}, the same by another name" if told.aliases else ""
        return f"the same weights as the checkpoint of {where}, in another file{aliases}"
    same = f"{told.equal} of {tensors} tensors, with {told.share:.1%} of the numbers, are the same"
    if verdict.status == "altered":
        return f"altered: the checkpoint of {where}, of which {same}"
    return f"unknown: {searched}; the nearest is {where}, of which {same}"


def _changes(told: Difference) -> list[tuple[str, str]]:
    """Tensor and what is different, the first few of each sort."""
    sorts: list[list[tuple[str, str]]] = [
        [(name, "altered") for name in told.altered],
        [(name, f"type {was} became {now}") for name, (was, now) in told.retyped.items()],
        [(name, f"shape {tuple(was)} became {tuple(now)}") for name, (was, now) in told.reshaped.items()],
        [(name, "missing") for name in told.missing],
        [(name, "added") for name in told.added],
        [(name, f"cannot be read: {why}") for name, why in told.unread.items()],
    ]
    listed = []
    for rows in sorts:
        listed += rows[:MOST_LISTED]
        if len(rows) > MOST_LISTED:
            listed.append((f"and {len(rows) - MOST_LISTED} more", rows[0][1].split()[0]))
    return listed


def _facts(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """What a reader wants to know of a record."""
    record = checkpoint.record
    parent = record["parent"] or {}
    known = parent.get("path") or parent.get("sha256")
    facts = [
        ("run", checkpoint.run),
        ("step", str(record["step"])),
        ("time", _time(record["time"])),
        ("saved as", str(record.get("path"))),
        ("SHA-256", record["sha256"]),
        ("size", f"{record['size']:,} bytes, {', '.join(record['dtypes']) or 'tensors unread'}"),
        ("git commit", str(record["git_commit"] or "")),
        ("seed", "" if record["seed"] is None else str(record["seed"])),
        ("data", _data(record["data"])),
        ("parent", f"{known or parent.get('problem')} ({parent['how']})" if parent else ""),
    ]
    return [(name, value) for name, value in facts if value]


def _row(checkpoint: Checkpoint) -> list[str]:
    record = checkpoint.record
    return [
        checkpoint.run,
        str(record["step"]),
        _time(record["time"]),
        (record["git_commit"] or "")[:10],
        "" if record["seed"] is None else str(record["seed"]),
        _data(record["data"]),
        record["sha256"][:16],
        str(record.get("path")),
    ]


def _data(data: Any) -> str:
    if isinstance(data, dict):
        return ", ".join(f"{name}: {value}" for name, value in data.items())
    return data or ""


def _time(seconds: float) -> str:
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
