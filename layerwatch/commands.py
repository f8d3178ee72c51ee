"""What the commands do: the only place that knows all rooms. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .monitor import Run
    from .monitor.fleet.search import Query

from .terminal import new_table, plain, say, tell

STYLES = {"info": "cyan", "warning": "yellow", "critical": "bold red"}


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

    from .monitor import scan_runs
    from .monitor.fleet.search import parse
    from .monitor.store import store_of

    query, root = parse(options.where), store_of(options.dir).url
    runs, broken = scan_runs(options.dir)
    runs = [run for run in runs if _is_labelled(run, options) and _fits(run, query, root)]
    labels = [name for name in ("owner", "tags") if any(run.info.get(name) for run in runs)]
    table = new_table("run", "health", "state", "step", "age", "train_loss", "val_loss", *labels)
    for run in runs:
        alarms = [f for f in run.findings() if f.severity != "info"]
        health = f"[{STYLES[alarms[0].severity]}]{alarms[0].problem}[/]" if alarms else "[green]healthy[/]"
        state = "live" if run.live else "closed" if run.info.get("closed") else "interrupted"
        age = _age(time.time() - float(run.info.get("created") or 0))
        losses = [_latest(run, name) for name in ("train_loss", "val_loss")]
        name = _below(run, root)
        told = {"owner": run.info.get("owner") or "", "tags": " ".join(run.info.get("tags") or ())}
        told = [escape(told[name]) for name in labels]
        table.add_row(escape(name), health, state, str(run.last_step), age, *losses, *told)
    which = " that fit" if options.tag or options.owner or options.where else ""
    say(table if runs else plain(f"No runs{which} below {options.dir}."))
    for folder, problem in broken.items():
        tell(f"{folder}: {problem}", error=True)
    return 0


def _below(run: Run, root: str) -> str:
    return run.url.removeprefix(root).strip("/") or run.name


def _fits(run: Run, query: Query, root: str) -> bool:
    """Does it fit --where? The filter speaks of the row that a scan makes of the run."""
    from .monitor.fleet import scan_run

    return not query.terms or query.fits(scan_run(run.url).to_pylist()[0] | {"run": _below(run, root)})


def _is_labelled(run: Run, options: argparse.Namespace) -> bool:
    """Has it all of --tag, and the --owner?"""
    owned = options.owner is None or (run.info.get("owner") or "") == options.owner
    return owned and set(options.tag) <= set(run.info.get("tags") or ())


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


def _latest(run: Run, name: str) -> str:
    values = run.scalars(name)["value"]
    return f"{values.iloc[-1]:.4g}" if len(values) else ""
