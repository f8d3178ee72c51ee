"""What must not change a diagnosis: units, names, order, cadence, how the log was written and by how many.

Real short trainings are recorded once; their logs are written again with one thing changed, or they are
trained again where the change is one of the training. Compared are problems, severities, layers, first steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layerwatch.hooks import watch
from layerwatch.monitor import Finding, LogWriter, Run
from layerwatch.monitor.detectors import History
from layerwatch.monitor.detectors.matrices import Matrices
from layerwatch.monitor.findings import judge
from layerwatch.monitor.log import GIVEN
from layerwatch.monitor.reader import LogReader

STEPS = 110
#: Enough for what only concerns how a log is written or read.
SOME = ("dead", "vanishing", "too-high")
Key = tuple[str, str, tuple[str, ...], int]
Tables = dict[str, pa.Table]


def network(act: type[nn.Module], depth: int) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Linear(16, 32), act()]
    for _ in range(depth - 1):
        parts += [nn.Linear(32, 32), act()]
    return nn.Sequential(*parts, nn.Linear(32, 6))


def dead(model: nn.Sequential) -> None:
    hidden = model[2]
    assert isinstance(hidden, nn.Linear)
    nn.init.constant_(hidden.bias, -30.0)


#: name -> activation, depth, learning rate, what is broken, the first alarm
CASES: dict[str, tuple[type[nn.Module], int, float, Callable[[nn.Sequential], None], str | None]] = {
    "healthy": (nn.ReLU, 2, 0.05, lambda model: None, None),
    "dead": (nn.ReLU, 2, 0.05, dead, "dead_units"),
    "vanishing": (nn.Sigmoid, 6, 0.05, lambda model: None, "vanishing_gradients"),
    "too-high": (nn.ReLU, 2, 5.0, lambda model: None, "learning_rate_too_high"),
    "too-low": (nn.ReLU, 2, 1e-6, lambda model: None, "learning_rate_too_low"),
}


def train(
    case: str, path: Path, *, every: int = 1, scale: float = 1.0, adam: bool = False,
    dtype: torch.dtype = torch.float32, names: tuple[str, str] = ("train_loss", "val_loss"),
) -> Run:  # fmt: skip
    """`scale`: the loss is multiplied, and the step size divided by as much."""
    act, depth, rate, breaks, _ = CASES[case]
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3000, 16, generator=g)
    y = (torch.tanh(x @ torch.randn(16, 24, generator=g)) @ torch.randn(24, 6, generator=g)).argmax(1)
    model = network(act, depth)
    breaks(model)
    model, x = model.to(dtype), x.to(dtype)
    if adam:
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), rate / 10, eps=1e-8 * scale)
    else:
        optimizer = torch.optim.SGD(model.parameters(), rate / scale, momentum=0.9)
    with watch(model, optimizer, run=path, every=every) as watcher:
        for step in range(STEPS):
            i = torch.randint(0, 2500, (64,), generator=g)
            optimizer.zero_grad()
            loss = scale * F.cross_entropy(model(x[i]), y[i])
            loss.backward()
            optimizer.step()
            watcher.log(**{names[0]: loss})
            if step % 10 == 9:
                with torch.no_grad():
                    watcher.log(**{names[1]: scale * F.cross_entropy(model(x[2500:]), y[2500:])})
    return Run(path)


def found_in(run: Run) -> list[Finding]:
    assert not [note for note in run.notes() if "failed" in note]
    return run.findings()


def keys(findings: list[Finding], names: Callable[[str], str] = str, shift: int = 0) -> list[Key]:
    return [(f.problem, f.severity, tuple(map(names, f.layers)), f.first_step - shift) for f in findings]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("recorded")
    return {case: train(case, folder / case) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_the_recorded_runs_are_what_they_are_meant_to_be(recorded: dict[str, Run], case: str) -> None:
    alarms = [f.problem for f in found_in(recorded[case]) if f.alarm]
    assert (alarms or [None])[0] == CASES[case][4]


# ---- the log written again


def rewritten(
    run: Run, path: Path, *, seed: int = 0, writers: int = 1, keep: str = "full", quick: bool = False,
    names: Callable[[str], str] = str, shift: int = 0, later: float = 0.0,
) -> Run:  # fmt: skip
    """The same run: rows of each step in random order, spread over writers by tensor."""
    rng = np.random.default_rng(seed)
    reader = LogReader(run.path)
    info = dict(run.info)
    info["tensors"] = [
        {
            **t,
            "tensor": names(t["tensor"]),
            "names": [names(n) for n in t["names"]],
            "module": names(t["module"]),
        }
        for t in info["tensors"]
    ]
    info["modules"] = [{**m, "module": names(m["module"])} for m in info["modules"]]
    logs = [LogWriter(path, info, keep=keep)] + [
        LogWriter(path, info, writer=f"r{n}", keep=keep) for n in range(1, writers)
    ]
    rows = reader.table("stats", GIVEN["stats"].names).to_pylist()
    owner = {tensor: rng.integers(writers) for tensor in sorted({r["tensor"] for r in rows})}
    scalars = reader.table("scalars", ["step", "time", "name", "value"]).to_pylist()
    for log in logs:
        log.begin(shift)
    for step in sorted({r["step"] for r in [*rows, *scalars]}):
        mine = [r for r in rows if r["step"] == step]
        for at, log in enumerate(logs):
            part = [r for r in mine if owner[r["tensor"]] == at]
            moved = [
                {**r, "step": step + shift, "time": r["time"] + later, "tensor": names(r["tensor"])}
                for r in (part[i] for i in rng.permutation(len(part)))
            ]
            log.stats(pa.RecordBatch.from_pylist(moved, GIVEN["stats"]))
        for r in scalars:
            if r["step"] == step:
                logs[0].scalars(step + shift, r["time"] + later, {r["name"]: r["value"]})
    for log in logs[1:] + logs[:1]:
        log.close(quick=quick)
    return Run(path)


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"quick": True},
        {"keep": "rollup"},
        {"later": -1e9},
        {"writers": 3},
        {"writers": 4, "quick": True},
    ],
    ids=str,
)
def test_how_the_log_was_written(recorded: dict[str, Run], case: str, change: dict, tmp_path: Path) -> None:
    run = rewritten(recorded[case], tmp_path / "again", **change)
    assert keys(found_in(run)) == keys(found_in(recorded[case]))


@pytest.mark.parametrize("case", SOME)
def test_names_of_layers(recorded: dict[str, Run], case: str, tmp_path: Path) -> None:
    def named(name: str) -> str:
        head, dot, tail = name.partition(".")
        return f"net.{chr(ord('z') - int(head))}é {head}{dot}{tail}" if head.isdigit() else name

    run = rewritten(recorded[case], tmp_path / "again", names=named)
    assert keys(found_in(run)) == keys(found_in(recorded[case]), named)


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("shift", [100_000])
def test_the_number_of_the_first_step(
    recorded: dict[str, Run], case: str, shift: int, tmp_path: Path
) -> None:
    run = rewritten(recorded[case], tmp_path / "again", shift=shift)
    assert keys(found_in(run), shift=shift) == keys(found_in(recorded[case]))


class Scaled(History):
    """A history whose losses and gradients are multiplied."""

    def __init__(self, run: Run, factor: float, rows: Matrices) -> None:
        super().__init__(run, rows)
        self._factor = factor

    def scalar(self, *names: str) -> object:  # type: ignore[override]
        series = super().scalar(*names)
        return series if names[0] == "lr" else series._replace(value=series.value * self._factor)

    def table(self, kind: str, column: str, names: tuple[str, ...]) -> np.ndarray:
        found = super().table(kind, column, names)
        sized = column in ("norm", "rms", "mean", "std", "min", "max", "p01", "p99")
        return found * self._factor if kind == "gradient" and sized else found


@settings(max_examples=12)
@given(case=st.sampled_from(["healthy", "vanishing", "too-low"]), power=st.integers(-20, 20))
def test_the_unit_of_the_loss(recorded: dict[str, Run], case: str, power: int) -> None:
    """Multiplied, a cross-entropy is none any more: log(classes) is not the level of a guess then."""
    rows = Matrices(recorded[case])
    there, here = (judge(Scaled(recorded[case], factor, rows))[0] for factor in (2.0**power, 1.0))
    assert [f.problem for f in there if f.alarm][:1] == [f.problem for f in here if f.alarm][:1]


# ---- trained again


@pytest.mark.parametrize("case", ["healthy", "vanishing", "too-low"])
@pytest.mark.parametrize("scale", [2.0**-10, 2.0**10])
def test_a_loss_in_other_units_with_sgd(
    recorded: dict[str, Run], case: str, scale: float, tmp_path: Path
) -> None:
    found, expected = found_in(train(case, tmp_path / "run", scale=scale)), found_in(recorded[case])
    assert [f.problem for f in found if f.alarm] == [f.problem for f in expected if f.alarm]
    assert [f.first_step for f in found if f.alarm] == [f.first_step for f in expected if f.alarm]


@pytest.mark.parametrize("case", ["dead"])
def test_a_loss_in_other_units_with_adam(case: str, tmp_path: Path) -> None:
    one, other = (found_in(train(case, tmp_path / str(s), scale=s, adam=True)) for s in (1.0, 2.0**10))
    assert keys(one) == keys(other)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("every", [10])
def test_cadence(recorded: dict[str, Run], case: str, every: int, tmp_path: Path) -> None:
    sparse = [f for f in found_in(train(case, tmp_path / "run", every=every)) if f.alarm]
    dense = [f for f in found_in(recorded[case]) if f.alarm]
    assert [(f.problem, f.severity) for f in sparse] == [(f.problem, f.severity) for f in dense]
    if case != "too-high":  # a rate is of all layers; which suffers most depends on the moment
        assert [f.layers[:1] for f in sparse] == [f.layers[:1] for f in dense]
    for a, b in zip(sparse, dense, strict=True):
        assert abs(a.first_step - b.first_step) <= every


@pytest.mark.parametrize(
    ("case", "names"), [("healthy", ("train/loss", "val/loss")), ("vanishing", ("loss", "eval_loss"))]
)
def test_names_of_the_losses(
    recorded: dict[str, Run], case: str, names: tuple[str, str], tmp_path: Path
) -> None:
    assert keys(found_in(train(case, tmp_path / "run", names=names))) == keys(found_in(recorded[case]))


@pytest.mark.parametrize("case", ["dead"])
def test_double_precision(recorded: dict[str, Run], case: str, tmp_path: Path) -> None:
    found = found_in(train(case, tmp_path / "run", dtype=torch.float64))
    expected = found_in(recorded[case])
    assert [(f.problem, f.severity, f.layers[:1]) for f in found] == [
        (f.problem, f.severity, f.layers[:1]) for f in expected
    ]
