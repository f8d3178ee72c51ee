"""What the commands do: the only place that knows all rooms. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from .monitor import Finding, Run
    from .monitor.normal import Normal

SEVERITIES = ("info", "warning", "critical")
STYLES = {"info": "cyan", "warning": "yellow", "critical": "bold red"}


def demo(options: argparse.Namespace) -> int:
    if not options.no_serve:  # better now than after the trainings
        _check_port(options.port)
    from .demo import run_demo

    folders = run_demo(options.dir)
    from .monitor import Run

    for folder in folders:
        _print_findings(Run(folder))
    if options.no_serve:
        _say(f"See them in the browser: layerwatch dashboard {options.dir}")
        return 0
    from .dashboard import serve

    serve(options.dir, port=options.port)
    return 0


def dashboard(options: argparse.Namespace) -> int:
    from .monitor.store import store_of

    root = store_of(options.dir)
    if root.path is None:
        root.list()  # better now than in the browser: the bucket, the credentials
    elif root.path.exists() and not root.path.is_dir():
        raise ValueError(
            f"expected a folder of runs, but {options.dir} is a file: give the folder above the runs"
        )
    elif not root.path.exists():
        raise ValueError(
            f"expected a folder of runs, but {options.dir} does not exist: "
            "check the path, or train with watch(...)"
        )
    _check_port(options.port, options.host)
    from .dashboard import serve

    serve(
        options.dir,
        host=options.host,
        port=options.port,
        token=options.token,
        prefix=options.prefix,
        names=options.allow_host,
        open_browser=options.open,
    )
    return 0


def _check_port(port: int, host: str = "127.0.0.1") -> None:
    if not 0 <= port <= 65535:
        raise ValueError(f"expected a port from 0 to 65535, got {port}")
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"expected a free port, but {host}:{port} cannot be used ({reason}): choose another --port"
        ) from None


def check(options: argparse.Namespace) -> int:
    if options.follow:
        from .follow import follow
        from .monitor.normal import known

        return _verdict(options, follow(options, known(_baselines(options.baseline))))
    runs, baselines = [_open(path) for path in options.runs], _baselines(options.baseline)
    found = [(run, run.findings(baselines), run.notes(baselines)) for run in runs]
    if options.format == "json":
        document = {
            "version": 1,
            "runs": [run.name for run in runs],
            "findings": [f.to_dict() for _, findings, _ in found for f in findings],
            "notes": [
                note if len(runs) == 1 else f"{run.name}: {note}" for run, _, notes in found for note in notes
            ],
        }
        print(json.dumps(document, indent=1, allow_nan=False))
    else:
        for run, findings, notes in found:
            _print_findings(run, findings, notes)
    return _verdict(options, [f for _, findings, _ in found for f in findings])


def _verdict(options: argparse.Namespace, findings: Sequence[Finding]) -> int:
    """The exit code."""
    worst = max((SEVERITIES.index(f.severity) for f in findings), default=-1)
    return int(options.fail_on is not None and worst >= SEVERITIES.index(options.fail_on))


def _baselines(paths: Sequence[str]) -> Normal | tuple[()]:
    """What is normal by these runs, or by this file."""
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
    return learn_runs(_open(path) for path in paths) if paths else ()


def calibrate(options: argparse.Namespace) -> int:
    from rich.markup import escape

    from .monitor.calibration import calibrate as learn
    from .monitor.normal_file import write_normal

    if options.out.is_dir():
        raise ValueError(f"expected a file to write, but {options.out} is a folder: choose another --out")
    normal, left_out = learn(options.paths)
    write_normal(normal, options.out)
    table = _table("what", "compared", "limit in mean absolute deviations")
    for signal, envelope in normal.layers.items():
        table.add_row(signal, f"{len(envelope.names)} layers", f"{envelope.limit:.3g}")
    for name, envelope in normal.scalars.items():
        table.add_row(escape(name), "scalar", f"{envelope.limit:.3g}")
    _say(table)
    print(f"{options.out}: normal by {len(normal.runs)} runs: {', '.join(normal.runs)}")
    for path, reason in left_out.items():
        print(f"left out: {path}: {reason}")
    if len(normal.runs) < 3:
        print("two runs say little about the spread: the limits are wide, add a third")
    return 0


def _open(path: str) -> Run:
    from .monitor import Run, RunError

    run = Run(path)
    if run.last_step < 0:
        raise RunError(
            f"the run {path} is empty: nothing is captured yet, "
            "wait for its first steps or check the training"
        )
    return run


def explain(options: argparse.Namespace) -> int:
    from rich.markdown import Markdown

    from .monitor.problems import closest, problems

    pages = problems()
    if options.code is None:
        table = _table("problem", "rule")
        for code, page in pages.items():
            table.add_row(code, page.rule)
        _say(table)
        return 0
    if options.code not in pages:
        near = closest(options.code)
        meant = f"did you mean {near}? " if near else ""
        raise ValueError(
            f"expected a problem code, got {options.code!r}: {meant}`layerwatch explain` lists all"
        )
    page = pages[options.code]
    _say(Markdown(f"# {page.title}\n\n`{page.code}`\n\n{page.markdown(link=None)}"))
    return 0


def runs(options: argparse.Namespace) -> int:
    from rich.markup import escape

    from .monitor import scan_runs
    from .monitor.store import store_of

    runs, broken = scan_runs(options.dir)
    root = store_of(options.dir).url
    table = _table("run", "health", "state", "step", "age", "train_loss", "val_loss")
    for run in runs:
        alarms = [f for f in run.findings() if f.severity != "info"]
        health = f"[{STYLES[alarms[0].severity]}]{alarms[0].problem}[/]" if alarms else "[green]healthy[/]"
        state = "live" if run.live else "closed" if run.info.get("closed") else "interrupted"
        age = _age(time.time() - float(run.info.get("created") or 0))
        losses = [_latest(run, name) for name in ("train_loss", "val_loss")]
        name = run.url.removeprefix(root).strip("/") or run.name
        table.add_row(escape(name), health, state, str(run.last_step), age, *losses)
    _say(table if runs else escape(f"No runs below {options.dir}."))
    for folder, problem in broken.items():
        print(f"{folder}: {problem}", file=sys.stderr)
    return 0


def export(options: argparse.Namespace) -> int:
    from .monitor import export as write

    rows = write(
        _open(options.run), options.out,
        steps=options.steps, tensor=options.tensor, kinds=options.kind, table=options.table,
    )  # fmt: skip
    print(f"{options.out}: {rows} rows")
    return 0


def compact(options: argparse.Namespace) -> int:
    from .monitor import RunError
    from .monitor import compact as tidy_up

    run = _open(options.run)
    if run.url != str(run.path):
        raise RunError(
            f"expected a local run folder, got {options.run}: runs on object stores are compacted before "
            "they are sent"
        )
    if run.live:
        raise RunError(f"{options.run} is still being written: wait until its training has ended")
    print(f"{options.run}: {tidy_up(run.path)} files replaced")
    return 0


def upload(options: argparse.Namespace) -> int:
    from .monitor import RunError
    from .monitor.spool import send_spool, spool_root, spooled

    if options.to and not options.url:
        raise RunError("expected the URL of one run with --to: give it first")
    urls = [options.url] if options.url else spooled()
    if not urls:
        print(f"nothing is left to send in {spool_root()}")
    failed = 0
    for url in urls:
        try:
            print(f"{options.to or url}: {send_spool(url, options.to)} files sent", flush=True)
        except RunError as error:
            if options.url:
                raise
            failed = 2
            print(f"{url}: {' '.join(str(error).split())}", file=sys.stderr)
    return failed


def import_tensorboard(options: argparse.Namespace) -> int:
    from .monitor.tensorboard import import_tensorboard as make_runs

    for made in make_runs(options.logdir, options.run, histograms=options.histogram, scalars=options.scalar):
        print(f"{made.path}: {made.scalars:,} scalars, {made.histograms:,} histograms")
        for note in made.notes:
            print(f"  {note}")
    return 0


def _print_findings(run: Run, findings: list[Finding] | None = None, notes: Sequence[str] = ()) -> None:
    from rich.markup import escape

    findings = run.findings() if findings is None else findings
    alarms = sum(f.severity != "info" for f in findings)
    verdict = f"[bold red]{alarms} alarm{'s' * (alarms > 1)}[/]" if alarms else "[bold green]no alarm[/]"
    _say(f"\n[bold]{escape(run.name)}[/] · {run.last_step + 1} steps · {verdict}")
    if findings:
        table = _table("severity", "problem", "where", "steps", "what, and what to try first")
        for f in findings:
            where = "\n".join(escape(name) for name in f.layers[:3]) + (
                f"\n+{len(f.layers) - 3} more" if len(f.layers) > 3 else ""
            )
            what = f"{escape(f.summary)}\n[dim]{escape(f.advice)}[/]"
            table.add_row(
                f"[{STYLES[f.severity]}]{f.severity}[/]",
                f.problem,
                where,
                f"{f.first_step}-{f.last_step}",
                what,
            )
        _say(table)
    for note in notes:
        _say(f"[dim]note: {escape(note)}[/]")


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        last = place == len(columns) - 1
        table.add_column(column, overflow="fold", ratio=1 if last and len(columns) == 5 else None)
    return table


def _say(what: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    console.print(what)


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _latest(run: Run, name: str) -> str:
    values = run.scalars(name)["value"]
    return f"{values.iloc[-1]:.4g}" if len(values) else ""
