"""The command line: what can be typed. `commands` does it, and is imported when something is to be done."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from . import (
    alerts_command,
    check_command,
    compare_command,
    drift_command,
    label_command,
    lineage_command,
    precision_command,
    scan_command,
)
from .terminal import complain
from .zero_code import add_arguments, prepare

#: The modules of commands that are not in `commands`.
_HOMES = {
    "alerts": "alerts_command",
    "check": "check_command",
    "compare": "compare_command",
    "drift": "drift_command",
    "label": "label_command",
    "lineage": "lineage_command",
    "precision": "precision_command",
    "scan": "scan_command",
    "verify": "lineage_command",
}


class _Parser(argparse.ArgumentParser):
    """Errors are one line on stderr, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="layerwatch", description="Training monitoring and weight-drift dashboard for PyTorch."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, about: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=about, description=about, epilog=f"example: {example}")

    demo = command(
        "demo", "train five small real networks, print the findings, serve the dashboard on them",
        "layerwatch demo --dir demo-runs --no-serve",
    )  # fmt: skip
    demo.add_argument(
        "--dir", type=Path, default=Path("demo-runs"), help="where the runs go (default: %(default)s)"
    )
    demo.add_argument("--no-serve", action="store_true", help="stop after the findings")
    demo.add_argument("--port", type=int, default=8050, help="port of the dashboard (default: %(default)s)")

    dashboard = command(
        "dashboard",
        "serve the dashboard on every run below a folder",
        "layerwatch dashboard runs --port 8050",
    )
    dashboard.add_argument(
        "dir",
        nargs="?",
        default="runs",
        help="folder of runs, s3://bucket/, or the table of a scan (default: %(default)s)",
    )
    dashboard.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; others than this machine's own need a token (default: %(default)s)",
    )
    dashboard.add_argument(
        "--port", type=int, default=8050, help="port to listen at, 0 takes a free one (default: %(default)s)"
    )
    token = dashboard.add_mutually_exclusive_group()
    token.add_argument(
        "--token",
        default="",
        help="what a browser must show once, at least 16 characters (default: where one is needed, one is "
        "made and printed)",
    )
    token.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="a file that holds it, so that neither a list of processes nor a log shows it",
    )
    dashboard.add_argument(
        "--prefix", default="", metavar="PATH", help="the path that a proxy serves it at, such as /x/"
    )
    dashboard.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="answer for this host name, too, as a proxy passes it on; may be given several times",
    )
    dashboard.add_argument("--open", action="store_true", help="open it in the default browser")
    dashboard.add_argument(
        "--read-only",
        action="store_true",
        help="it always is: the dashboard changes nothing in a run's folder",
    )

    check_command.add_arguments(
        command(
            "check", "say what is wrong with runs, in which layer, since which step and what to do",
            "layerwatch check runs/exp1 --fail-on critical --junit report.xml",
        )
    )  # fmt: skip

    compare_command.add_arguments(
        command(
            "compare", "say in what two runs or weight files differ, and whether by more than seed noise",
            "layerwatch compare runs/main runs/branch --repeats runs/main-* --format markdown",
        )
    )  # fmt: skip

    explain = command(
        "explain", "say what a problem is, how it shows, the rule that finds it, and what to do",
        "layerwatch explain vanishing_gradients",
    )  # fmt: skip
    explain.add_argument("code", nargs="?", metavar="CODE", help="problem code; none: list all")

    run = command(
        "run", "run a script and watch what it trains, without a line in it: python's own arguments follow",
        "layerwatch run --run runs/exp1 train.py --lr 0.1",
    )  # fmt: skip
    add_arguments(run)

    drift_command.add_arguments(
        command(
            "drift", "say how far each layer has moved between two runs, weight files or folders",
            "layerwatch drift base/model.safetensors tuned/ --by block",
        )
    )  # fmt: skip

    calibrate = command(
        "calibrate", "learn from a project's healthy runs what is normal, for `check --baseline`",
        "layerwatch calibrate runs --out normal.json",
    )  # fmt: skip
    calibrate.add_argument("paths", nargs="+", metavar="DIR", help="folders of runs, or runs, or their URLs")
    calibrate.add_argument(
        "--out",
        type=Path,
        default=Path("layerwatch-normal.json"),
        metavar="FILE",
        help="(default: %(default)s)",
    )

    precision_command.add_arguments(
        command(
            "precision",
            "say what fewer bits (fp16, bf16, fp8, int8, int4) would do to each layer's weights",
            "layerwatch precision model.safetensors --by block",
        )
    )

    runs = command("runs", "list the runs below a folder", "layerwatch runs runs")
    runs.add_argument(
        "dir", nargs="?", default="runs", help="folder of runs, or s3://bucket/ (default: %(default)s)"
    )
    runs.add_argument(
        "--tag", action="append", default=[], metavar="WORD", help="only runs with this tag, or all of them"
    )
    runs.add_argument("--owner", metavar="NAME", help="only runs of this owner")
    runs.add_argument(
        "--where", default="", metavar="FILTER",
        help="only runs that fit, such as 'health:critical age<7d lr>0.01'; see docs/dashboard.md",
    )  # fmt: skip

    label_command.add_arguments(
        command(
            "label", "show and edit tags, owner and note of runs, while they train or later",
            "layerwatch label runs/exp1 runs/exp2 --tag baseline --note warm-up",
        )
    )  # fmt: skip

    scan_command.add_arguments(
        command(
            "scan",
            "read every run below a folder or bucket into one table, and say which became worse",
            "layerwatch scan s3://bucket/runs --engine dask --since 7d",
        )
    )

    alerts_command.add_arguments(
        command(
            "alerts", "show who is told of what by layerwatch.toml, or send a sample to every channel",
            "layerwatch alerts test",
        )
    )  # fmt: skip

    export = command(
        "export", "write a run as one tidy table: one row per step, tensor and kind",
        "layerwatch export runs/exp1 exp1.parquet --kind gradient --tensor 'layers\\.0' --steps 100:2000",
    )  # fmt: skip
    export.add_argument("run", metavar="RUN", help="run folder, or its URL")
    export.add_argument("out", metavar="OUT", help="file to write: .parquet or .csv")
    export.add_argument(
        "--steps", type=_steps, metavar="FIRST:LAST", help="only these, both included; either may be left out"
    )
    export.add_argument(
        "--tensor", metavar="REGEX", help="only tensors (of scalars: names) in whose names this is found"
    )
    export.add_argument(
        "--kind", action="append", default=[], help="only rows of this kind; may be given several times"
    )
    what = export.add_mutually_exclusive_group()
    what.add_argument(
        "--scalars", dest="table", action="store_const", const="scalars", default="stats",
        help="losses and other numbers instead: one row per step and name",
    )  # fmt: skip
    what.add_argument(
        "--histograms", dest="table", action="store_const", const="histograms",
        help="histograms instead: one row per step, tensor, kind and bucket",
    )  # fmt: skip

    lineage_command.add_arguments(
        command(
            "verify",
            "say which run and step a weight file came from, and in which tensors it was altered",
            "layerwatch verify out/model.safetensors --runs runs",
        )
    )
    lineage_command.add_arguments(
        command(
            "lineage",
            "show the chain of checkpoints that a weight file was made of",
            "layerwatch lineage out/model.safetensors --runs runs",
        )
    )

    compact = command(
        "compact", "turn a finished run's write-ahead files into Parquet and merge its parts",
        "layerwatch compact runs/exp1",
    )  # fmt: skip
    compact.add_argument("run", metavar="RUN", help="run folder that no process writes")

    upload = command(
        "upload", "send what a killed or offline training has left to send to its object store",
        "layerwatch upload s3://bucket/exp1",
    )  # fmt: skip
    upload.add_argument("url", metavar="URL", nargs="?", help="as given to watch(run=...); none: all of them")
    upload.add_argument("--to", metavar="URL", help="send it to another place, where there is no run yet")

    tensorboard = command(
        "import-tensorboard", "make runs of TensorBoard's event files: scalars and histograms",
        "layerwatch import-tensorboard lightning_logs/version_0 runs/imported",
    )  # fmt: skip
    tensorboard.add_argument("logdir", metavar="LOGDIR", help="what you give to tensorboard --logdir")
    tensorboard.add_argument(
        "run", metavar="RUN", help="folder to write; several trainings become runs below it"
    )
    tensorboard.add_argument(
        "--histogram",
        action="append",
        default=[],
        type=_rule,
        metavar="REGEX=KIND",
        help="tags that match are of this kind (weight, gradient, activation, ..., skip); a group "
        "(?P<tensor>...) names the tensor; the first that matches counts",
    )
    tensorboard.add_argument(
        "--scalar",
        action="append",
        default=[],
        type=_rule,
        metavar="REGEX=NAME",
        help=r"the name of scalars whose tags match; \1 stands for the first group",
    )
    return parser


def _steps(text: str) -> tuple[int | None, int | None]:
    first, colon, last = text.partition(":")
    try:
        low = int(first) if first else None
        return low, (int(last) if last else None) if colon else low
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected FIRST:LAST, for example 100:2000, got {text!r}") from None


def _rule(text: str) -> tuple[str, str]:
    regex, equals, meaning = text.rpartition("=")
    if not (regex and equals and meaning):
        raise argparse.ArgumentTypeError(f"expected REGEX=MEANING, got {text!r}")
    return regex, meaning


def _joined(arguments: Sequence[str]) -> list[str]:
    """`--where -tag:sweep` in one piece: argparse takes what begins with a - for another option."""
    found = list(arguments)
    if found[:1] in (["runs"], ["scan"]) and "--where" in found[:-1]:
        place = found.index("--where")
        if not found[place + 1].startswith("--"):
            found[place : place + 2] = [f"--where={found[place + 1]}"]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 `check --fail-on` failed, 2 wrong input."""
    options = build_parser().parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
    try:
        if options.command == "run":
            work = prepare(options)
        else:
            home = importlib.import_module(f".{_HOMES.get(options.command, 'commands')}", __package__)
            code = getattr(home, options.command.replace("-", "_"))(options)
            sys.stdout.flush()  # here, where a reader that has gone is no error
            return code
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        complain(options.command, error)
        return 2
    except KeyboardInterrupt:
        return 130
    return work()  # whatever the script raises is its own
