"""Sessions and roll-ups as `Run` shows them, against rows merged one by one with `summary.merge`."""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from made_logs import TENSORS, info, make_session, restarted_run, row, values_at

from layerwatch.monitor import LogWriter, Run, Summary, compact, merge, summarise
from layerwatch.monitor.derive import POOLED, columns_of
from layerwatch.monitor.intervals import ENDLESS, intersection, subtract, union, widened
from layerwatch.monitor.reader import LogReader
from layerwatch.monitor.schema import STATS

FIELDS = [name for name in STATS.names if hasattr(Summary(), name)]


def twin(log: LogReader, kind: str, factor: int) -> dict[tuple[str, int, int], dict[str, Any]]:
    """(tensor, session, bin) -> the merged row, from every current row of level 1, by definition."""
    table = log.table("stats", None, {"kind": [kind]}).sort_by(
        [("session", "ascending"), ("step", "ascending")]
    )
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for line in table.to_pylist():
        groups.setdefault((line["tensor"], line["session"], line["capture"] // factor), []).append(line)
    return {key: pooled(lines) for key, lines in groups.items()}


def pooled(lines: list[dict[str, Any]]) -> dict[str, Any]:
    parts = []
    for line in lines:
        fields = {name: line[name] for name in FIELDS}
        arrays = {
            "buckets": np.array(line["buckets"], np.int16),
            "counts": np.array(line["counts"], np.int64),
        }
        extremes = {
            "min": math.inf if line["min"] is None else line["min"],
            "max": -math.inf if line["max"] is None else line["max"],
        }
        parts.append(replace(Summary(), **{**fields, **arrays, **extremes}))
    whole = merge(parts, captures=True)
    ratios = [p.sum_sq / p.ref_sum_sq for p in parts if p.ref_sum_sq]
    return {
        "summary": whole,
        "step": lines[0]["step"],
        "last_step": lines[-1]["step"],
        "captures": len(lines),
        "norm_min": math.sqrt(min(p.sum_sq for p in parts)),
        "norm_max": math.sqrt(max(p.sum_sq for p in parts)),
        "ratio_max": math.sqrt(max(ratios)) if ratios else math.nan,
    }


def assert_as_merged(run: Run, kind: str, max_points: int, factor: int) -> pd.DataFrame:
    """`stats(max_points=)` against the twin, number by number."""
    wanted = twin(run._log, kind, factor)
    frame = run.stats(kind, columns=[*columns_of(kind), *POOLED], max_points=max_points)
    assert len(frame) == len(wanted)
    expected = sorted(wanted, key=lambda key: (TENSORS.index(key[0]), wanted[key]["step"]))
    for key, (_, line) in zip(expected, frame.iterrows(), strict=True):
        plain, whole = wanted[key], wanted[key]["summary"]
        assert line["tensor"] == key[0]
        for name in ("step", "last_step", "captures"):
            assert line[name] == plain[name], (key, name)
        for name in ("count", "zeros", "subnormals", "nans", "min", "max"):
            assert line[name] == getattr(whole, name), (key, name)
        for name in ("mean", "std", "norm"):
            assert line[name] == pytest.approx(getattr(whole, name), rel=1e-12), (key, name)
        for name in ("norm_min", "norm_max", "ratio_max"):
            assert line[name] == pytest.approx(plain[name], rel=1e-12, nan_ok=True), (key, name)
        quantiles = [line[q] for q in ("p01", "p25", "p50", "p75", "p99")]
        assert quantiles == sorted(quantiles)
    return frame


# Sessions ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return restarted_run(tmp_path_factory.mktemp("restarted") / "a", first=300, again_from=200, upto=420)


def test_steps_that_were_done_again_are_shown_once(restarted: Path) -> None:
    run = Run(restarted)
    frame = run.stats("weight", TENSORS[0])
    assert frame["step"].tolist() == list(range(420))
    for step in (199, 200, 299, 419):
        scale = 1.0 if step < 200 else 2.0
        norm = np.linalg.norm(scale * values_at(step + 1, TENSORS[0]))
        assert frame["norm"][step] == pytest.approx(norm), step
    assert run.scalars("train_loss")["step"].tolist() == list(range(420))
    assert run.scalars("train_loss")["value"][250] == 2.0 / 251
    assert run.values("0.bias")[0].tolist() == list(range(420))
    assert run.last_step == 419


def test_a_log_as_it_was_in_an_earlier_session(restarted: Path) -> None:
    run = Run(restarted, session=0)
    assert run.stats("weight", TENSORS[0])["step"].tolist() == list(range(300))
    assert run.stats("weight", TENSORS[0])["norm"][250] == pytest.approx(
        np.linalg.norm(values_at(251, TENSORS[0]))
    )
    assert run.scalars("train_loss")["value"].tolist() == [1.0 / (1 + s) for s in range(300)]
    assert run.last_step == 299
    assert run.events()["event"].tolist() == ["start"]


def test_sessions_are_listed(restarted: Path) -> None:
    frame = Run(restarted).sessions()
    assert frame["session"].tolist() == [0, 1]
    assert frame["first_step"].tolist() == [0, 200]
    assert frame["superseded_from"].tolist() == [200, pd.NA]
    assert frame["time"].is_monotonic_increasing
    assert Run(restarted).events()["event"].tolist() == ["start", "restart"]


def test_a_session_that_goes_back_further_than_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for begin, end in ((0, 10), (8, 14), (4, 6), (6, 7)):
        log = LogWriter(path, info(), resume=begin > 0)
        make_session(log, range(begin, end), scale=1.0 + begin).close()
    run = Run(path)
    norms = run.stats("weight", TENSORS[0])["norm"]
    scales = [1, 1, 1, 1, 5, 5, 7]
    wanted = [np.linalg.norm(k * values_at(s + 1, TENSORS[0])) for s, k in enumerate(scales)]
    assert norms.tolist() == pytest.approx(wanted)
    assert run.sessions()["superseded_from"].tolist() == [4, 4, 6, pd.NA]
    assert run.last_step == 6
    assert Run(path, session=1).last_step == 13
    assert Run(path, session=2).stats("weight", TENSORS[0])["step"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_lost_start_is_told_by_the_rows(tmp_path: Path) -> None:
    path = restarted_run(tmp_path / "a")
    compact(path)
    shutil.rmtree(path / "events")
    run = Run(path)
    assert run.sessions()["first_step"].tolist() == [30]
    assert math.isnan(run.sessions()["time"][0])
    assert run.stats("weight", TENSORS[0])["step"].tolist() == list(range(60))


# Roll-ups ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_points", "factor"), [(420, 1), (50, 16), (29, 16), (10, 256)])
def test_few_points_are_what_merging_gives(restarted: Path, max_points: int, factor: int) -> None:
    """With a bin that reaches into steps that were done again, and captures that no roll-up holds."""
    frame = assert_as_merged(Run(restarted), "update", max_points, factor)
    assert frame.groupby("tensor").size().max() <= max_points


@pytest.mark.parametrize("at_once", [1, 500])
def test_rows_are_merged_some_tensors_at_a_time(
    restarted: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("layerwatch.monitor.levels.POOLED_ROWS", at_once)
    assert_as_merged(Run(restarted), "weight", 100, 16)


def test_few_points_of_the_earlier_session(restarted: Path) -> None:
    assert_as_merged(Run(restarted, session=0), "weight", 20, 16)


def test_compacting_changes_nothing(restarted: Path, tmp_path: Path) -> None:
    path = shutil.copytree(restarted, tmp_path / "a")
    compact(path)
    for points, factor in ((50, 16), (10, 256)):
        frame = assert_as_merged(Run(path), "weight", points, factor)
        before = Run(restarted).stats("weight", columns=list(frame.columns), max_points=points)
        pd.testing.assert_frame_equal(frame, before, rtol=1e-12)


def test_old_logs_have_few_points_too() -> None:
    """Rows of format version 1 know no captures: steps are counted instead."""
    run = Run(Path(__file__).parents[1] / "data" / "v1" / "closed")
    full = run.stats("weight", columns=["step", "tensor", "norm"])
    few = run.stats("weight", columns=["step", "tensor", "captures", "norm_max", "last_step"], max_points=3)
    assert few.groupby("tensor").size().tolist() == [1] * full["tensor"].nunique()
    assert few["captures"].tolist() == full.groupby("tensor", sort=False).size().tolist()
    assert few["norm_max"].tolist() == full.groupby("tensor", sort=False)["norm"].max().tolist()


def test_a_range_of_steps(restarted: Path) -> None:
    run = Run(restarted)
    one = run.stats("weight", steps=(250, 250), columns=["step", "tensor", "norm"])
    assert one["step"].tolist() == [250] * 3
    assert one["tensor"].tolist() == list(TENSORS)
    assert run.stats("weight", TENSORS[0], steps=(195, 204))["step"].tolist() == list(range(195, 205))
    assert run.stats("weight", TENSORS[0], steps=(None, 3))["step"].tolist() == [0, 1, 2, 3]
    assert run.stats("weight", TENSORS[0], steps=(418, None))["step"].tolist() == [418, 419]
    assert run.stats("weight", steps=(1000, None)).empty
    columns = ["step", "last_step", "captures"]
    few = run.stats("weight", TENSORS[0], columns, steps=(100, 190), max_points=10)
    assert few["captures"].sum() == 7 * 16 - 16  # bins 6 to 11
    assert few["step"].min() <= 100 <= few["last_step"].min()
    zoomed = run.stats("weight", TENSORS[0], columns, steps=(100, 109), max_points=10)
    assert zoomed["captures"].tolist() == [1] * 10


def test_an_overview_shows_a_spike_of_one_capture(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "a", info())
    log.begin(0)
    for step in range(600):
        x = np.ones(4) * (1e6 if step == 333 else 1.0)
        bad = np.array([1.0, math.nan if step == 77 else 1.0, math.inf if step in (77, 78) else 1.0])
        rows = [row(step, t, "gradient", summarise(bad if t == TENSORS[1] else x)) for t in TENSORS]
        log.stats(pa.RecordBatch.from_pylist(rows, STATS))
    log.close()
    run = Run(tmp_path / "a")
    for points in (40, 5, 3, 600):
        steps, last_steps, tensors, values, highest = run.overview("gradient", "norm", points)
        assert len(steps) <= points
        assert tensors == list(TENSORS)
        assert values.shape == highest.shape == (3, len(steps))
        place = int(np.argmax(highest[0]))
        assert steps[place] <= 333 <= last_steps[place]
        assert highest[0, place] == 2e6
        assert (steps[0], last_steps[-1]) == (0, 599)
        assert (steps[1:] == last_steps[:-1] + 1).all()
        assert run.overview("gradient", "nans", points).highest.sum() == 1
        assert run.overview("gradient", "infs", points).values.sum() == 2
    with pytest.raises(ValueError, match="expected one of norm, ratio"):
        run.overview("gradient", "nothing")
    empty = run.overview("update")
    assert (empty.steps.size, empty.tensors, empty.values.shape) == (0, [], (0, 0))


def test_an_overview_of_a_running_training(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "a", info())
    make_session(log, range(50))
    run = Run(tmp_path / "a")
    found = run.overview("update", "ratio", 10)
    frame = run.stats("update", columns=["step", "tensor", "ratio"])
    assert found.steps.tolist() == [0, 16, 32, 48]
    for line, tensor in enumerate(found.tensors):
        ratio = frame[frame["tensor"] == tensor]["ratio"].to_numpy()
        assert found.highest[line].tolist() == pytest.approx([ratio[a : a + 16].max() for a in found.steps])
    log.close()


# Logs whose old rows are gone -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of 300 captures in three parts, rolled up."""
    path = tmp_path_factory.mktemp("thinned") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerwatch.monitor.log.SEGMENT_BYTES", 1 << 40)
        patch.setattr("layerwatch.monitor.tiers.FULL_CAPTURES", 100)
        log = LogWriter(path, info())
        for begin in (0, 100, 200):
            make_session(log, range(begin, begin + 100))
            patch.setattr("layerwatch.monitor.log.SEGMENT_BYTES", 0 if begin < 200 else 1 << 40)
            log._rotate_if_due()
            patch.setattr("layerwatch.monitor.log.SEGMENT_BYTES", 1 << 40)
        log.close()
    return path


def parts_of(path: Path) -> list[Path]:
    return sorted((path / "stats").glob("*.parquet"))


def damaged(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [Path.unlink, damaged])
@pytest.mark.parametrize("number", [0, 1])
def test_where_full_rows_are_gone_rolled_up_ones_are_shown(
    whole: Path, tmp_path: Path, harm: Any, number: int
) -> None:
    path = shutil.copytree(whole, tmp_path / "a")
    assert len(parts_of(path)) == 3
    harm(parts_of(path)[number])
    run, full = Run(path), Run(whole)
    columns = ["step", "last_step", "captures", "norm", "norm_max"]
    for tensor in TENSORS:
        frame = run.stats("weight", tensor, columns)
        assert frame["captures"].sum() == 300
        assert (frame["step"][1:].to_numpy() == frame["last_step"][:-1] + 1).all()
        fine = frame[frame["captures"] == 1]
        expected = full.stats("weight", tensor, columns).set_index("step")
        assert len(fine) >= 300 - 112 - 32
        for _, line in frame.iterrows():
            norms = expected.loc[line["step"] : line["last_step"], "norm"]
            assert line["norm_max"] == pytest.approx(norms.max())
            assert line["norm"] == pytest.approx(np.sqrt(np.mean(norms**2)))
    assert len(run.problems) == (harm is damaged)
    wanted = full.stats("weight", columns=columns, max_points=20)
    pd.testing.assert_frame_equal(run.stats("weight", columns=columns, max_points=20), wanted, rtol=1e-12)
    whole_view, view = full.overview("weight", max_points=20), run.overview("weight", max_points=20)
    assert np.allclose(view.highest, whole_view.highest)


def test_a_roll_up_with_missing_bins_is_completed_from_finer_rows(whole: Path, tmp_path: Path) -> None:
    path = shutil.copytree(whole, tmp_path / "a")
    wanted = Run(whole).stats("weight", max_points=20)
    for part in (path / "rollup16").glob("*.parquet"):
        part.unlink()
    pd.testing.assert_frame_equal(Run(path).stats("weight", max_points=20), wanted, rtol=1e-12)


# Intervals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_intervals_are_sets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (union([], [tuple(sorted(pair)) for pair in rng.integers(0, 40, (4, 2)).tolist()]) for _ in "ab")

    def members(intervals: list[tuple[int, int]]) -> set[int]:
        assert all(low < high for low, high in intervals)
        assert all(one[1] < two[0] for one, two in itertools.pairwise(intervals))
        return {x for low, high in intervals for x in range(low, min(high, 100))}

    assert members(union(a, b)) == members(a) | members(b)
    assert members(intersection(a, b)) == members(a) & members(b)
    assert members(union(subtract(a, b), [])) == members(a) - members(b)
    assert members(widened(a, 8)) == {y for x in members(a) for y in range(x // 8 * 8, x // 8 * 8 + 8)}
    assert subtract([(0, ENDLESS)], [(0, 5)]) == [(5, ENDLESS)]
