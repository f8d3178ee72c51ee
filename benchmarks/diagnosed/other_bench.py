"""Another benchmark's scenarios, watched by us and scored by its own rules beside its other tools' scores."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from layerwatch.hooks import watch
from layerwatch.monitor import Finding, Run
from layerwatch.monitor.detectors.history import History
from layerwatch.monitor.findings import judge
from layerwatch.monitor.normal import known

from .ablation import ABLATIONS
from .seen import OF_ACTIVATIONS, Seen


def run_bench(bench: Path, kept: Path, options: argparse.Namespace) -> int:
    """Train its scenarios once into `kept`, judge the runs, print the table."""
    sys.path.insert(0, str(bench.resolve()))
    package = next(p.name for p in sorted(bench.glob("scenarios_*")))
    split = package.split("_")[-1]
    labels = json.loads((bench / f"manifest_{split}.json").read_text())
    labels = {i: v for i, v in labels.items() if v["status"] == "kept" and re.search(options.only, i)}
    tools = next(p.parent.name for p in sorted(bench.glob("*/score.py")))
    scenarios = importlib.import_module(f"{tools}.core").load_scenarios(package)
    score = importlib.import_module(f"{tools}.score")
    for seed in range(0 if options.judge else options.seeds):
        for name in labels:
            _train(scenarios[name], seed, kept, options.every)
    for every in options.as_if:
        print(f"judged as if captured every {every} steps:")
        results = _judge(labels, kept, options, every)
        ours = score.score({"adapter": "layerwatch", "runs": results}, labels)
        stored = bench / "results" / f"scores.{split}.json"
        others = json.loads(stored.read_text()) if stored.exists() else []
        print(score.table([ours, *others]))
        print({code: v for code, v in ours["per_code"].items() if v["fn"] or v["fp"]})
    for name in options.ablate:
        with ABLATIONS[name]():
            results = _judge(labels, kept, options, options.as_if[0], details=False)
        ours = score.score({"adapter": f"without {name}", "runs": results}, labels)
        print(score.table([ours]).splitlines()[-1])
    return 0


def _train(scenario: Any, number: int, kept: Path, every: int) -> None:
    """One seed of a scenario, and the earlier good runs that it comes with."""
    if number >= len(scenario.seeds):
        return
    todo = [(scenario.train, scenario.seeds[number], f"{scenario.id}-{scenario.seeds[number]}")]
    todo += [(scenario.twin, seed, f"_base.{scenario.family}-{seed}") for seed in scenario.baseline_seeds]
    for train, seed, name in todo:
        done = kept / f"{name}.done"
        if done.exists():
            continue
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                folder = kept / name
                train(lambda m, o, run=folder, **_: watch(m, o, run=run, every=every, live=False), seed)
            except Exception:  # a scenario that fails is reported, the others are still trained
                traceback.print_exc(limit=-3)
        done.touch()
        print(f"{name} {time.perf_counter() - start:.1f} s", flush=True)


def _judge(
    labels: dict[str, Any], kept: Path, options: argparse.Namespace, every: int, details: bool = True
) -> list[dict[str, Any]]:
    hidden = [k for kind in options.hide for k in (OF_ACTIVATIONS if kind == "activation" else (kind,))]

    def history(path: Path) -> History:
        return History(Seen(Run(path), every, options.log_every, hidden))

    results = []
    for run in sorted(p.with_suffix("") for p in kept.glob("*.done") if not p.name.startswith("_")):
        name, seed = run.name.rsplit("-", 1)
        if name not in labels:
            continue
        label = labels[name]
        family = name.split(".")[0]
        before = [Run(kept / f"_base.{family}-{b}") for b in label.get("baseline_seeds") or ()]
        found, _ = judge(history(run), known(before))
        results.append(
            {"scenario": name, "seed": int(seed), "findings": [f.to_dict() for f in found], "error": None}
        )
        if details:
            _explain(run.name, label, found)
    return results


def _explain(run: str, label: dict[str, Any], found: list[Finding]) -> None:
    """Print a run that is not judged as its label says."""
    alarms = [f.problem for f in found if f.alarm]
    free = {*label["accepted"], *(label.get("also_true") or ())}
    missed = [code for code in label["required"] if code not in alarms]
    false = [code for code in alarms if code not in {*free, *label["required"]}]
    if missed or false or (label["required"] and alarms[0] not in label["required"]):
        print(f"  {run}: expected {label['required'] or 'silence'}, got {alarms or 'silence'}")
        for f in found:
            print(f"      {f.severity} {f.problem} from step {f.first_step}: {f.summary}")
