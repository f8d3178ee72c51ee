"""`layerwatch compare`: two runs, or two weight files, as text, JSON or Markdown for a pull request."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .terminal import new_table, plain, say

if TYPE_CHECKING:
    from .monitor.comparing import Comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `compare`."""
    parser.add_argument("a", metavar="A", help="a run, as it was; or a weight file or folder, as for `drift`")
    parser.add_argument("b", metavar="B", help="the other one")
    parser.add_argument(
        "--repeats",
        nargs="+",
        action="extend",
        default=[],
        metavar="RUN",
        help="runs of A's configuration with other seeds, at least two, to tell differences from seed noise",
    )
    parser.add_argument(
        "--format", choices=("text", "markdown", "json"), default="text", help="(default: %(default)s)"
    )


def compare(options: argparse.Namespace) -> int:
    """Print it."""
    import json
    import sys

    from .comparisons import compare as compare_versions
    from .monitor.comparing import Comparison
    from .monitor.comparison_text import drift_markdown, markdown

    found = compare_versions(options.a, options.b, options.repeats)
    if isinstance(found, Comparison):
        if options.format == "text":
            _print(found)
            return 0
        as_json = json.dumps(found.to_dict(), indent=1, allow_nan=False)
        sys.stdout.write(as_json + "\n" if options.format == "json" else markdown(found))
        return 0
    if options.format == "text":
        from .drift_command import as_text

        sys.stdout.write(as_text(found) + "\n")
    else:
        sys.stdout.write(found.to_json() + "\n" if options.format == "json" else drift_markdown(found))
    return 0


def _print(found: Comparison) -> None:
    """As tables."""
    from rich.markup import escape

    from .monitor.comparison_text import cells_of, noise_note, slice_sentences, verdict
    from .monitor.wording import MISSING, number

    a, b = plain(found.a), plain(found.b)
    say(f"\n[bold]{b}[/] against [bold]{a}[/]")
    say(plain(_bare(f"{verdict(found)} {noise_note(found)}")))
    if found.metrics:
        table = new_table("result", a, b, "difference", "95 % of runs like A", "verdict")
        for one in found.metrics:
            for cells in cells_of(one):
                table.add_row(*(escape(_bare(cell)) for cell in cells))
        say(table)
    for sentence in slice_sentences(found.metrics):
        say(f"[yellow]{plain(_bare(sentence))}[/]")
    say(plain(f"{found.sentence} {found.matching}"))
    if found.settings:
        table = new_table("setting", a, b)
        for row in found.settings:
            table.add_row(*(escape(text) for text in row))
        say(table)
    say(f"[dim]{found.same_settings} settings are the same[/]")
    if found.layers:
        table = new_table("layer", a, b, "apart")
        for layer, *numbers in found.layers:
            table.add_row(escape(layer), *map(number, numbers))
        say(table)
        say(f"[dim]the layers: {plain(found.measure)}[/]")
    if found.findings:
        table = new_table("finding", a, b)
        for one, two in found.findings:
            known = two or one
            problem = known.problem if known is not None else MISSING
            table.add_row(problem, *(escape(f.line()) if f is not None else MISSING for f in (one, two)))
        say(table)
    for note in found.notes:
        say(f"[dim]note: {plain(note)}[/]")


def _bare(text: str) -> str:
    """Without the marks of Markdown."""
    return text.replace("`", "").replace("**", "")
