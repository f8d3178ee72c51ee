"""`layerwatch check`: the findings of runs, for people, programs and continuous integration."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .terminal import complain, new_table, plain, say, tell

if TYPE_CHECKING:
    from .gates import Checked
    from .monitor.normal import Normal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `check`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or their URLs")
    parser.add_argument(
        "--baseline",
        nargs="+",
        action="extend",
        default=[],
        metavar="RUN",
        help="earlier good runs to compare with, or one file that `calibrate` has made of them",
    )
    parser.add_argument(
        "--format",
        choices=("text", "json", "markdown", "github"),
        default="text",
        help="github: annotations, and the Markdown in the summary of the job (default: %(default)s)",
    )
    parser.add_argument(
        "--fail-on",
        choices=("warning", "critical"),
        help="exit with 1 when a finding is at least so severe (default: never)",
    )
    parser.add_argument(
        "--junit",
        metavar="FILE",
        help="write a JUnit XML report, too: a suite for each run, a case for each problem",
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="print each new finding as one line (or JSON object) until the runs are closed",
    )
    parser.add_argument(
        "--interval",
        type=_seconds,
        default=5.0,
        metavar="S",
        help="with --follow: seconds between two looks (default: %(default)g)",
    )


def check(options: argparse.Namespace) -> int:
    """Print what was found; 1 when that fails, 2 when a run cannot be read: the others are judged all the
    same."""
    from .gates import fails, junit

    normal = _baselines(options.baseline)
    if options.follow:
        if options.junit or options.format not in ("text", "json"):
            raise ValueError(
                "expected --follow with the formats text or json and without --junit: "
                "check the runs once more when they have ended"
            )
        from .follow import follow

        return int(any(fails(finding, options.fail_on) for finding in follow(options, normal)))
    checked = [judge(path, normal) for path in options.runs]
    _print(checked, options)
    if options.junit:
        _write(options.junit, junit(checked, options.fail_on))
    for one in checked:
        if one.error:
            complain("check", one.error)
    if any(one.error for one in checked):
        return 2
    return int(any(fails(finding, options.fail_on) for one in checked for finding in one.findings))


def judge(path: str, normal: Normal | None = None) -> Checked:
    """Ask the detectors about a run; why it cannot be read is an answer, too."""
    import time

    from .commands import _open
    from .gates import Checked

    begin = time.perf_counter()
    try:
        run = _open(path)
        known = () if normal is None else normal
        findings, notes = run.findings(known), run.notes(known)
    except (ValueError, OSError) as error:
        return Checked(path, error=" ".join(str(error).split()))
    return Checked(path, run.name, run.last_step + 1, findings, notes, time.perf_counter() - begin)


def show(one: Checked) -> None:
    """A run's findings as a table."""
    from rich.markup import escape

    from .commands import STYLES

    alarms = sum(f.alarm for f in one.findings)
    verdict = f"[bold red]{alarms} alarm{'s' * (alarms > 1)}[/]" if alarms else "[bold green]no alarm[/]"
    say(f"\n[bold]{plain(one.name)}[/] · {one.steps} steps · {verdict}")
    if one.findings:
        table = new_table("severity", "problem", "where", "steps", "what, and what to try first")
        for f in one.findings:
            where = "\n".join(escape(layer) for layer in f.layers[:3]) + (
                f"\n+{len(f.layers) - 3} more" if len(f.layers) > 3 else ""
            )
            what = f"{escape(f.summary)}\n[dim]{escape(f.advice)}[/]"
            severity = f"[{STYLES[f.severity]}]{f.severity}[/]"
            table.add_row(severity, f.problem, where, f"{f.first_step}-{f.last_step}", what)
        say(table)
    for note in one.notes:
        say(f"[dim]note: {plain(note)}[/]")


def _print(checked: Sequence[Checked], options: argparse.Namespace) -> None:
    import json
    import os
    import sys

    from .gates import github, markdown

    if options.format == "json":
        print(json.dumps(_document(checked), indent=1, allow_nan=False))
    elif options.format == "markdown":
        sys.stdout.write(markdown(checked, options.fail_on))
    elif options.format == "github":
        for line in github(checked, options.fail_on):
            tell(line)
        if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
            with open(summary, "a", encoding="utf-8") as file:
                file.write(markdown(checked, options.fail_on))
    else:
        for one in checked:
            if not one.error:
                show(one)


def _document(checked: Sequence[Checked]) -> dict[str, object]:
    """As the contract says."""
    notes = [
        note if len(checked) == 1 else f"{one.name}: {note}" for one in checked for note in one.notes
    ] + [f"{one.path} was not judged: {one.error}" for one in checked if one.error]
    return {
        "version": 1,
        "runs": [one.name for one in checked if not one.error],
        "findings": [finding.to_dict() for one in checked for finding in one.findings],
        "notes": notes,
    }


def _write(path: str, data: bytes) -> None:
    """Whole or not at all; folders above it are made."""
    from .monitor.store import parted, store_of

    folder, name = parted(path)
    try:
        store_of(folder).put(name, data)
    except OSError as error:
        raise ValueError(
            f"the report cannot be written to {path} ({error.strerror}): choose another --junit"
        ) from None


def _baselines(paths: Sequence[str]) -> Normal | None:
    """What is normal by these runs, or by this file."""
    from pathlib import Path

    from .commands import _open
    from .monitor import RunError
    from .monitor.normal import learn_runs
    from .monitor.normal_file import read_normal

    files = [path for path in paths if Path(path).is_file()]
    if files and len(paths) > 1:
        raise RunError(
            f"expected one file of `layerwatch calibrate`, or runs, got {' '.join(paths)}: a file stands for "
            "its runs, calibrate again to add others"
        )
    if files:
        return read_normal(files[0])
    return learn_runs(_open(path) for path in paths) if paths else None


def _seconds(text: str) -> float:
    """A number above 0."""
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text}")
    return seconds
