"""What the commands do: the only place that knows all rooms. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .monitor import Run

from .terminal import new_table, plain, say, tell

#: Of severities and of the health of runs.
STYLES = {
    "info": "cyan", "warning": "yellow", "critical": "bold red", "healthy": "green", "unknown": "dim",
}  # fmt: skip


def demo(options: argparse.Namespace) -> int:
    if not options.no_serve:  # better now than after the trainings
        _check_port(options.port)
    from .demo import run_demo

    folders = run_demo(options.dir)
    from .check_command import judge, show

    for folder in folders:
        show(judge(str(folder)))
    if options.no_serve:
        tell(f"See them in the browser: layerwatch dashboard {options.dir}")
        return 0
    from .dashboard import serve

    serve(options.dir, port=options.port)
    return 0


def dashboard(options: argparse.Namespace) -> int:
    from .dashboard.scanned import is_table
    from .monitor.fleet import TABLE
    from .monitor.store import store_of

    root = store_of(options.dir)
    if is_table(options.dir):
        pass  # it is read when the pages are made, before they are served
    elif root.path is None:
        if root.modified(TABLE) is None:
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
        token=_token(options.token_file) if options.token_file else options.token,
        prefix=options.prefix,
        names=options.allow_host,
        open_browser=options.open,
        secret=options.token_file is not None,
    )
    return 0


def _token(path: Path) -> str:
    """The first line of a file."""
    token = path.read_text(encoding="utf-8").partition("\n")[0].strip()
    if not token:
        raise ValueError(f"expected a token in the first line of {path}, but it is empty: write one there")
    return token


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


def calibrate(options: argparse.Namespace) -> int:
    from rich.markup import escape

    from .monitor.calibration import calibrate as learn
    from .monitor.normal_file import write_normal

    if options.out.is_dir():
        raise ValueError(f"expected a file to write, but {options.out} is a folder: choose another --out")
    normal, left_out = learn(options.paths)
    write_normal(normal, options.out)
    table = new_table("what", "compared", "limit in mean absolute deviations")
    for signal, envelope in normal.layers.items():
        table.add_row(signal, f"{len(envelope.names)} layers", f"{envelope.limit:.3g}")
    for name, envelope in normal.scalars.items():
        table.add_row(escape(name), "scalar", f"{envelope.limit:.3g}")
    say(table)
    tell(f"{options.out}: normal by {len(normal.runs)} runs: {', '.join(normal.runs)}")
    for path, reason in left_out.items():
        tell(f"left out: {path}: {reason}")
    if len(normal.runs) < 3:
        tell("two runs say little about the spread: the limits are wide, add a third")
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
        table = new_table("problem", "rule")
        for code, page in pages.items():
            table.add_row(code, page.rule)
        say(table)
        return 0
    if options.code not in pages:
        near = closest(options.code)
        meant = f"did you mean {near}? " if near else ""
        raise ValueError(
            f"expected a problem code, got {options.code!r}: {meant}`layerwatch explain` lists all"
        )
    page = pages[options.code]
    say(Markdown(f"# {page.title}\n\n`{page.code}`\n\n{page.markdown(link=None)}"))
    return 0


def runs(options: argparse.Namespace) -> int:
    from rich.markup import escape

    from .monitor.fleet import look
    from .monitor.fleet.search import moment, parse
    from .scan_command import Progress

    query = parse(options.where)
    with Progress(sys.stderr) as progress:
        table = look(options.dir, progress=progress.at)
    fitting = [row for row in table.rows if _is_labelled(row, options) and query.fits(row)]
    read = [row for row in fitting if not row["error"]]
    labels = [name for name in ("owner", "tags") if any(row[name] for row in read)]
    shown = new_table("run", "health", "state", "step", "age", "train_loss", "val_loss", *labels)
    for row in read:
        step = str(row["steps"] - 1) if row["steps"] else ""
        age = _age(max(0.0, table.scanned - (moment(row) or table.scanned)))
        losses = ["" if (x := row[name]) is None else f"{x:.4g}" for name in ("train_loss", "val_loss")]
        told = {"owner": row["owner"] or "", "tags": " ".join(row["tags"])}
        told = [escape(told[name]) for name in labels]
        shown.add_row(escape(row["run"]), _health(row), _state(row), step, age, *losses, *told)
    which = " that fit" if options.tag or options.owner or options.where else ""
    say(shown if read else plain(f"No runs{which} below {options.dir}."))
    for row in fitting:
        if row["error"]:
            tell(f"{row['run']}: {row['error']}", error=True)
    return 0


def _is_labelled(row: dict[str, Any], options: argparse.Namespace) -> bool:
    """Has it all of --tag, and the --owner?"""
    owned = options.owner is None or (row["owner"] or "") == options.owner
    return owned and set(options.tag) <= set(row["tags"])


def _health(row: dict[str, Any]) -> str:
    return f"[{STYLES[row['health']]}]{row['problem'] or row['health']}[/]"


def _state(row: dict[str, Any]) -> str:
    return "live" if row["live"] else "closed" if row["closed"] else "interrupted"


def export(options: argparse.Namespace) -> int:
    from .monitor import export as write

    rows = write(
        _open(options.run), options.out,
        steps=options.steps, tensor=options.tensor, kinds=options.kind, table=options.table,
    )  # fmt: skip
    tell(f"{options.out}: {rows} rows")
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
    tell(f"{options.run}: {tidy_up(run.path)} files replaced")
    return 0


def upload(options: argparse.Namespace) -> int:
    from .monitor import RunError
    from .monitor.spool import send_spool, spool_root, spooled

    if options.to and not options.url:
        raise RunError("expected the URL of one run with --to: give it first")
    urls = [options.url] if options.url else spooled()
    if not urls:
        tell(f"nothing is left to send in {spool_root()}")
    failed = 0
    for url in urls:
        try:
            tell(f"{options.to or url}: {send_spool(url, options.to)} files sent")
        except RunError as error:
            if options.url:
                raise
            failed = 2
            tell(f"{url}: {error}", error=True)
    return failed


def import_tensorboard(options: argparse.Namespace) -> int:
    from .monitor.tensorboard import import_tensorboard as make_runs

    for made in make_runs(options.logdir, options.run, histograms=options.histogram, scalars=options.scalar):
        tell(f"{made.path}: {made.scalars:,} scalars, {made.histograms:,} histograms")
        for note in made.notes:
            tell(f"  {note}")
    return 0


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
