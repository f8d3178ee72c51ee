"""`layerwatch run`: a script runs as `python script.py` runs it, and what it trains is watched."""

from __future__ import annotations

import argparse
import atexit
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .as_python import AfterImport, run_program

if TYPE_CHECKING:
    from .hooks.autowatch import AutoWatch

#: Seconds of processor time of child processes that are worth a word.
CHILD_SECONDS = 1.0
#: Options that are given to `watch` as they are.
PASSED = (
    "run", "every", "budget", "reference", "include", "exclude", "keep", "drift_limit",
    "tags", "owner", "note", "alerts",
)  # fmt: skip
#: What is on unless `--no-...` is given.
SWITCHES = ("activations", "updates", "live", "system")


def add_arguments(run: argparse.ArgumentParser) -> None:
    """Options of `watch`, then the program with its own arguments."""
    run.add_argument(
        "--run",
        "--out",
        help="folder or s3:// URL to write; torchrun takes --out only (default: a new one in runs/)",
    )
    run.add_argument(
        "--every", type=_every, metavar="N|auto", help="capture every N-th step (default: as --budget allows)"
    )
    run.add_argument("--budget", type=float, metavar="SHARE", help="of the training's time (default: 0.02)")
    run.add_argument(
        "--reference", metavar="PATH", help="checkpoint that drift is measured from: a file or a folder"
    )
    for name in ("include", "exclude"):
        run.add_argument(
            f"--{name}",
            action="append",
            type=_regex,
            metavar="REGEX",
            help=f"{name} tensors in whose names this is found; may be given several times",
        )
    run.add_argument("--keep", choices=("full", "rollup"), help="rollup: a bounded log (default: full)")
    run.add_argument(
        "--drift-limit",
        action="append",
        type=_limit,
        metavar="[PART=]L2",
        help="alarm beyond this relative distance; of some tensors only: layers.0-5=0.01, several times",
    )
    run.add_argument(
        "--step-norms", action="store_true", help="log every tensor's gradient norm at each step"
    )
    run.add_argument(
        "--tag",
        action="append",
        dest="tags",
        type=_word,
        metavar="WORD",
        help="to find the run by; may be given several times",
    )
    run.add_argument(
        "--owner", metavar="NAME", help="whose run it is (default: LAYERWATCH_OWNER, else the login name)"
    )
    run.add_argument("--note", metavar="TEXT", help="what is worth knowing about the run")
    run.add_argument(
        "--alerts", metavar="FILE", help="who is told of findings (default: layerwatch.toml, if there is one)"
    )
    run.add_argument("--no-alerts", dest="alerts", action="store_const", const=False, help="nobody is told")
    run.add_argument("--resume", action="store_true", help="continue the run, or begin it")
    for name, left_out in (
        ("activations", "summaries of module outputs"),
        ("updates", "the true change of each weight"),
        ("live", "judging while it trains"),
        ("system", "what the machine does"),
    ):
        run.add_argument(f"--no-{name}", dest=name, action="store_false", help=f"without {left_out}")
    run.add_argument(
        "-m",
        dest="module",
        nargs=argparse.REMAINDER,
        metavar="MODULE",
        help="run a module, as `python -m` does, with the arguments that follow",
    )
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="SCRIPT ...", help="and its arguments")


def _every(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of steps from 1, or auto, got {text!r}")
    return int(text)


def _limit(text: str) -> tuple[str, float]:
    part, _, number = text.rpartition("=")
    try:
        return part, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, or PART=number, got {text!r}") from None


def _limits(given: Sequence[tuple[str, float]]) -> float | dict[str, float]:
    if len(given) == 1 and not given[0][0]:
        return given[0][1]
    if not all(part for part, _ in given):
        raise ValueError("expected one --drift-limit for all tensors, or PART=number in each, got both")
    return dict(given)


def _word(text: str) -> str:
    if text.split() != [text] or "," in text:
        raise argparse.ArgumentTypeError(f"expected a word without spaces and commas, got {text!r}")
    return text


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r}: {error}") from None
    return text


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Check what was typed: the function that runs the script, and raises what it raises.

    Raises:
        ValueError: there is no script, or the run exists already.
    """
    program = options.module or options.arguments
    program = program[program[:1] == ["--"] :]
    if not program:
        raise ValueError("expected a script to run, as in `layerwatch run train.py`")
    if program[0].startswith("-"):
        raise ValueError(f"expected a script to run, got {program[0]}: its own arguments follow it")
    chosen = {name: getattr(options, name) for name in PASSED if getattr(options, name) is not None}
    if "drift_limit" in chosen:
        chosen["drift_limit"] = _limits(chosen["drift_limit"])
    chosen |= {name: False for name in SWITCHES if not getattr(options, name)}
    chosen |= {name: True for name in ("step_norms", "resume") if getattr(options, name)}
    if options.reference and not Path(options.reference).exists():
        raise ValueError(f"expected a checkpoint as --reference, but {options.reference} does not exist")
    if options.alerts:
        from .monitor.alerts.config import read_config

        read_config(options.alerts)  # better now than when the training begins
    there = "run" in chosen and (Path(chosen["run"]) / "run.json").exists()
    if there and not options.resume and _first_rank():
        raise ValueError(f"the run {chosen['run']} exists already: choose another --run, or --resume it")
    return lambda: _run(program, chosen, as_module=bool(options.module))


def _run(program: Sequence[str], chosen: dict[str, Any], *, as_module: bool) -> int:
    session = Session(chosen)
    atexit.register(session.end)
    if "torch" in sys.modules:
        session.begin()
    else:
        sys.meta_path.insert(0, AfterImport("torch", session.begin))
    run_program(program, as_module=as_module)
    return 0


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") in ("", "0")


class Session:
    """One script under watch, from the import of torch to the end of the process."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._watch: AutoWatch | None = None
        self._process = os.getpid()

    def begin(self) -> None:
        """Torch has been imported; not before the script does it, which may set its environment first."""
        try:
            from .hooks.autowatch import AutoWatch

            self._watch = AutoWatch(self._options, self._say)
            self._watch.start()
        except Exception as error:  # whatever it is, the script runs
            self._say(f"nothing is watched: {error!r}")

    def _say(self, words: str) -> None:
        if _first_rank() and sys.stderr is not None:
            sys.stderr.write(f"layerwatch: {words}\n")
            sys.stderr.flush()

    def end(self) -> None:
        """Close the runs, and say what was not seen."""
        if os.getpid() != self._process:
            return
        if self._watch is not None:
            self._watch.finish()
            if self._watch.left:
                self._say("the script calls watch itself: nothing was added")
            elif self._watch.runs:
                return
        if not (self._watch and self._watch.left):
            self._say(f"no training was seen, and no run was written: {self._why()}")

    def _why(self) -> str:
        if self._watch is None:
            why = "torch was not imported"
        elif self._watch.loose:
            why = "what the optimizers train is in no torch.nn.Module"
        else:
            why = "no optimizer stepped, and no weight changed between backward passes"
        seconds = _child_seconds()
        if seconds < CHILD_SECONDS:
            return why
        return (
            f"{why}; it is this process only that is watched, and its child processes worked for "
            f"{seconds:.0f} s: call layerwatch.watch in the function that they run"
        )


def _child_seconds() -> float:
    """Processor time of the child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system
