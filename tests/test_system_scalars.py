"""What tells of the machine is no result: nothing judges, compares, pairs or ranks by `system/...`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerwatch import Run, compare
from layerwatch.dashboard.clocks import clock_of
from layerwatch.dashboard.pages.compare_facts import scalar_names
from layerwatch.dashboard.pages.overview import other_scalars, system_scalars
from layerwatch.dashboard.pairs import pairs
from layerwatch.dashboard.queries import Library
from layerwatch.monitor import LogWriter
from layerwatch.monitor.calibration import calibrate
from layerwatch.monitor.comparing import Comparison
from layerwatch.monitor.courses import courses, is_result
from layerwatch.monitor.detectors.history import History
from layerwatch.monitor.fleet.reading import scan_run
from layerwatch.monitor.normal import learn_runs
from tests.monitor.made_logs import PERIOD, START, info, write_step

#: Names as they are logged, and some that would be taken for results.
NAMES = (
    "system/cpu", "system/memory_process", "system/disk_free", "system/gpu0/utilisation", "system/gpu0/power",
    "system/host1/cpu", "system/loss", "system/val_loss", "system/accuracy",
)  # fmt: skip


def made(path: Path, seed: int, *, sampled: bool, sick: bool = False) -> Run:
    """Sixty steps whose loss falls; the machine's numbers do as they please, of a sick one they explode."""
    rng = np.random.default_rng(seed)
    log = LogWriter(path, info())
    for step in range(60):
        write_step(log, step)
        when = START + step * PERIOD
        log.scalars(step, when, {"val_loss": 1 / (1 + step) + 0.01 * rng.random(), "accuracy": step / 100})
        if sampled:
            level = 1e6 ** (step / 59) if sick else 50.0
            log.scalars(step, when, {name: level + rng.random() for name in NAMES})
    log.close()
    return Run(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("runs")
    return {
        "plain": made(root / "plain", 0, sampled=False),
        "sampled": made(root / "sampled", 0, sampled=True),
        "sick": made(root / "sick", 0, sampled=True, sick=True),
        "other": made(root / "other", 1, sampled=True),
    }


def test_they_are_logged_and_none_is_a_result(runs: dict[str, Run]) -> None:
    assert set(NAMES) <= set(runs["sampled"].scalar_names())
    assert not any(map(is_result, NAMES))
    assert not set(NAMES) & courses(History(runs["sampled"])).scalars.keys()


@pytest.mark.parametrize("name", ["sampled", "sick"])
def test_findings_are_the_same(runs: dict[str, Run], name: str) -> None:
    def told(run: Run, good: list[Run]) -> list[dict[str, Any]]:
        return [f.to_dict() | {"run": ""} for f in run.findings(learn_runs(good) if good else ())]

    assert told(runs[name], []) == told(runs["plain"], [])
    good = [runs["sampled"], runs["other"]]
    assert told(runs[name], good) == told(runs["plain"], good)
    assert runs[name].notes() == runs["plain"].notes()


def test_what_is_normal_is_learnt_without_them(runs: dict[str, Run]) -> None:
    normal, _ = calibrate([runs["sampled"].url, runs["other"].url])
    assert not set(NAMES) & normal.scalars.keys()
    assert normal.scalars


def test_compared_are_results(runs: dict[str, Run]) -> None:
    found = compare(runs["sampled"].url, runs["sick"].url)
    assert isinstance(found, Comparison)
    assert {metric.name for metric in found.metrics} == {"train_loss", "val_loss", "accuracy"}


def test_neither_rows_of_a_scan_nor_pairs_nor_the_compare_page_have_them(runs: dict[str, Run]) -> None:
    (row,) = scan_run(runs["sampled"].url).to_pylist()
    assert not row["error"]
    assert {one["name"] for one in row["scalars"]} == {"accuracy", "lr", "train_loss", "val_loss"}
    assert pairs(runs["sampled"].scalar_names()) == pairs(runs["plain"].scalar_names())
    library = Library(runs["sampled"].path.parent)
    assert scalar_names(library, ["sampled", "sick"]) == scalar_names(library, ["plain"])
    clocks = [clock_of(library, runs[name]) for name in ("sampled", "plain")]
    assert np.array_equal(clocks[0].steps, clocks[1].steps)


def test_the_overview_has_a_place_of_their_own_for_them(runs: dict[str, Run]) -> None:
    assert other_scalars(runs["sampled"]) == other_scalars(runs["plain"]) == ["accuracy", "lr"]
    shown = system_scalars(runs["sampled"])
    assert sorted(shown) == sorted(NAMES)
    assert shown[:4] == [
        "system/gpu0/utilisation", "system/gpu0/power", "system/cpu", "system/host1/cpu",
    ]  # fmt: skip
    assert system_scalars(runs["plain"]) == []
