"""How often do the detectors alarm on healthy trainings, and do they name what is wrong with faulty ones?

    python benchmarks/diagnosis.py                              # train the cases (half an hour), judge them
    python benchmarks/diagnosis.py --keep RUNS --seeds 3        # the same, and keep the runs
    python benchmarks/diagnosis.py --judge --keep RUNS --as-if 10 50 --log-every 10 --hide activation update
                                                                # kept runs as poorer logs would show them
    python benchmarks/diagnosis.py --ablate roles gate persistence
    python benchmarks/diagnosis.py --bench FOLDER --keep RUNS   # another benchmark's trainings (see below)

Every case is an ordinary short training on made-up data (benchmarks/diagnosed). A faulty one differs from its
healthy twin by one change, and a probe that shares no code with the detectors must measure the fault: cases
where it does not are left out. Half of the families were held out while the detectors were written; their
score stands apart. An alarm is a finding of severity warning or critical.

`--bench FOLDER` expects a package with modules `core` and `score`, a package of scenarios, scenarios_*, their
labels, manifest_*.json, and the scores of other tools, results/scores.*.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diagnosed import CASES
from diagnosed.ablation import ABLATIONS
from diagnosed.other_bench import run_bench
from diagnosed.recording import Recorder
from diagnosed.score import Verdict, by_code, confusion, summary, verdict, wilson
from diagnosed.seen import OF_ACTIVATIONS, Seen

from layerwatch.monitor import Finding, Run
from layerwatch.monitor.detectors.history import History
from layerwatch.monitor.findings import judge


def record(folder: Path, only: str, seeds: int, every: int) -> None:
    """Train what the folder does not hold yet."""
    recorder = Recorder(folder, every)
    for name in CASES:
        if re.search(only, name):
            for seed in range(seeds):
                recorder.record(name, seed)


def judged(
    folder: Path, only: str, options: argparse.Namespace, every: int
) -> list[tuple[dict, Verdict, list]]:
    """Every kept and proved run with its label, its verdict and its alarms."""
    rows = []
    hidden = [k for kind in options.hide for k in (OF_ACTIVATIONS if kind == "activation" else (kind,))]
    for file in sorted(folder.glob("*.json")):
        label = json.loads(file.read_text())
        if not re.search(only, file.stem):
            continue
        if not label["proved"]:
            print(f"  {file.stem}: {label['codes'][0]} was not measured ({label['proof']}), left out")
            continue
        source = Seen(Run(file.with_suffix("")), every, options.log_every, hidden)
        found: list[Finding] = judge(History(source))[0]
        rows.append((label, verdict(file.stem, label, found), [f for f in found if f.alarm]))
    return rows


def report(rows: Sequence[tuple[dict[str, Any], Verdict, list[Finding]]], details: bool = True) -> None:
    """What went wrong, run by run, then the scores of both halves."""
    for label, v, alarms in rows if details else ():
        if not v.right or v.layer is False or (v.wanted and not v.root):
            where = " in another layer" if v.hit and v.layer is False else ""
            named = ", ".join(v.named) or "silence"
            print(f"  {v.run}: expected {v.wanted or 'silence'} (proof {label['proof']}), got {named}{where}")
            for f in alarms:
                print(f"      {f.severity} {f.problem} from step {f.first_step}: {f.summary}")
    for half, held_out in (("tuned on", False), ("held out", True)):
        part = [v for label, v, _ in rows if bool(label.get("held_out")) == held_out]
        if part:
            _scores(half, part)


def _scores(half: str, part: list[Verdict]) -> None:
    healthy = [v for v in part if not v.wanted]
    low, high = wilson(sum(bool(v.named) for v in healthy), len(healthy))
    numbers = ", ".join(f"{k} {v:.3g}" for k, v in summary(part).items())
    print(f"{half}: {len(part) - len(healthy)} faulty and {len(healthy)} healthy runs: {numbers}")
    print(f"    healthy runs with an alarm, 95 %: {low:.1%} to {high:.1%}")
    weak = {code: counts for code, counts in by_code(part).items() if counts[1] or counts[2]}
    print(
        "    codes (hit, missed, false): " + (", ".join(f"{c} {n}" for c, n in weak.items()) or "all right")
    )
    mixed = ", ".join(f"{a} -> {b} x{n}" for a, b, n in confusion(part)[:12])
    print(f"    confusion: {mixed or 'none'}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--every", type=int, default=5, help="capture every N-th step when training")
    parser.add_argument(
        "--as-if", type=int, nargs="+", default=[1], help="judge as if captured every N steps"
    )
    parser.add_argument("--log-every", type=int, default=1, help="judge as if losses were logged so rarely")
    parser.add_argument("--hide", nargs="*", default=[], choices=["activation", "update"])
    parser.add_argument("--only", default="", help="regular expression on the names of cases")
    parser.add_argument(
        "--keep", type=Path, help="keep the runs here; those that are there are not trained again"
    )
    parser.add_argument("--judge", action="store_true", help="only judge what is there, train nothing")
    parser.add_argument("--ablate", nargs="*", default=[], choices=sorted(ABLATIONS))
    parser.add_argument("--bench", type=Path, help="a folder with another benchmark")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = options.keep or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        if options.bench:
            return run_bench(options.bench, root, options)
        if not options.judge:
            start = time.perf_counter()
            record(root, options.only, options.seeds, options.every)
            print(f"trained in {time.perf_counter() - start:.0f} s")
        for every in options.as_if:
            print(f"judged as if captured every {every} steps, losses every {options.log_every}:")
            report(judged(root, options.only, options, every))
        for name in options.ablate:
            print(f"without {name}:")
            with ABLATIONS[name]():
                report(judged(root, options.only, options, options.as_if[0]), details=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
