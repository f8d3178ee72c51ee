"""`layerwatch label`: tags, owner and note of runs, shown and edited."""

from __future__ import annotations

import argparse
from typing import Any

from .terminal import complain, new_table, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `label`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or their URLs; live ones, too")
    parser.add_argument(
        "--tag", action="append", default=[], metavar="WORD", help="add a tag; may be given several times"
    )
    parser.add_argument(
        "--untag", action="append", default=[], metavar="WORD", help="take a tag away; several times, too"
    )
    parser.add_argument("--owner", metavar="NAME", help='whose runs they are; "" for nobody')
    parser.add_argument("--note", metavar="TEXT", help='what is worth knowing about them; "" for nothing')
    parser.add_argument("--format", choices=("text", "json"), default="text", help="(default: %(default)s)")


def label(options: argparse.Namespace) -> int:
    """Edit the labels of each run, then show them; one that cannot be labelled stops no other."""
    import json

    from .monitor.errors import RunError
    from .monitor.labels import given_labels

    given_labels(options.tag, options.owner, options.note)  # before any run is changed
    done, failed = [], []
    for path in options.runs:
        try:
            done.append({"run": path, **_labelled(path, options)})
        except RunError as error:
            failed.append({"run": path, "reason": " ".join(str(error).split())})
    if options.format == "json":
        document = {"version": 1, "runs": done, "failed": failed}
        print(json.dumps(document, indent=1, allow_nan=False))
    elif done:
        _print(done)
    for one in failed:
        complain("label", one["reason"])
    return 2 if failed else 0


def _labelled(path: str, options: argparse.Namespace) -> dict[str, Any]:
    from .monitor.description import describe
    from .monitor.labels import edit_labels
    from .monitor.store import store_of

    store = store_of(path)
    edits = {"add": options.tag, "remove": options.untag, "owner": options.owner, "note": options.note}
    return edit_labels(store, describe(store)[0], **edits)


def _print(done: list[dict[str, Any]]) -> None:
    from rich.markup import escape

    table = new_table("run", "owner", "tags", "note")
    for one in done:
        table.add_row(*map(escape, (one["run"], one["owner"], " ".join(one["tags"]), one["note"])))
    say(table)
