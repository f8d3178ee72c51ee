"""`Run`: every table of the contract, against numbers computed from the same values in plain numpy."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from made_logs import PERIOD, START, TENSORS, info, make_run, row, stats_batch, values_at, write_step

from layerwatch.monitor import LogWriter, Run, RunError, Summary, derive, merge, summarise
from layerwatch.monitor.description import write_json
from layerwatch.monitor.process import started
from layerwatch.monitor.schema import STATS, VALUES

QUANTILES = ["p01", "p05", "p25", "p50", "p75", "p95", "p99"]
COMMON = [
    *("step", "time", "tensor", "count", "mean", "std", "norm", "rms", "min", "max", *QUANTILES),
    *("zeros", "subnormals", "nans", "infs", "skipped", "state"),
]
COLUMNS = {
    "weight": COMMON,
    "initial_weight": COMMON,
    "gradient": [*COMMON, "stage", "units", "active_units", "underflow", "overflow"],
    "update": [*COMMON, "lost", "ratio", "along", "parallel", "perpendicular", "lost_share"],
    "second_moment": [*COMMON, "rms_ratio", "below_epsilon"],
    "activation": [*COMMON, "samples", "units", "active_units"],
    "no such kind": COMMON,
}


def run_of(path: Path, rows: list[dict[str, Any]], **more: Any) -> Run:
    """A run with exactly these rows."""
    log = LogWriter(path, info(**more))
    log.stats(pa.RecordBatch.from_pylist(rows, STATS))
    log.close()
    return Run(path)


# Columns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("empty", [True, False])
def test_columns_of_stats(tmp_path: Path, kind: str, empty: bool) -> None:
    known = kind != "no such kind" and not empty
    rows = [row(0, "0.weight", kind, summarise(np.ones(3)))] if known else []
    frame = run_of(tmp_path / "a", rows).stats(kind)
    assert list(frame.columns) == COLUMNS[kind]
    assert len(frame) == len(rows)
    assert frame["step"].dtype == np.int64


def test_columns_of_the_other_tables(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path / "a", 2))
    wanted = ["tensor", "names", "role", "shape", "elements", "dtype", "module", "module_type", "depth"]
    assert list(run.tensors().columns) == [*wanted, "trainable", "state"]
    assert list(run.modules().columns) == ["module", "type", "depth"]
    assert list(run.scalars("lr").columns) == ["step", "time", "value"]
    assert list(run.events().columns) == ["step", "time", "event", "message"]
    drift = ["step", "time", "tensor", "relative_l2", "cosine", "sign_flips", "count", "distance"]
    assert list(run.drift().columns) == [*drift, "reference_norm"]
    assert list(run.histogram("weight", "0.bias").columns) == ["low", "high", "count"]
    assert list(run.histograms("weight", "0.bias").columns) == ["step", "low", "high", "count"]


def test_what_was_never_logged_is_empty_not_an_error(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path / "a", 2))
    assert run.scalars("nothing").empty
    assert run.scalars("nothing")["value"].dtype == np.float64
    assert run.stats("weight", tensor="nothing").empty
    assert run.stats("nothing", tensor=["a", "b"]).empty
    assert run.drift().empty
    assert run.drift(tensor="nothing").empty
    assert run.histogram("gradient", "0.weight").empty
    assert run.histogram("weight", "nothing", step=3).empty
    assert run.histograms("gradient", "0.weight", max_steps=3).empty
    steps, values = run.values("2.weight")
    assert (steps.size, values.shape[0]) == (0, 0)
    steps, active = run.activity("activation", "0")
    assert (steps.shape, active.shape) == ((0,), (0, 0))
    assert run.kinds() == ["weight"]


# Numbers ----------------------------------------------------------------------------------------------------


def test_stats_are_the_numbers_of_the_values(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path / "a", 6))
    frame = run.stats("weight")
    assert list(zip(frame["tensor"], frame["step"], strict=True)) == [
        (t, s) for t in TENSORS for s in range(6)
    ]
    for line in frame.to_dict("records"):
        x = values_at(line["step"], line["tensor"])
        assert line["count"] == 12
        assert line["time"] == START + PERIOD * line["step"]
        assert line["mean"] == pytest.approx(x.mean())
        assert line["std"] == pytest.approx(x.std())
        assert line["norm"] == pytest.approx(np.linalg.norm(x))
        assert line["rms"] == pytest.approx(np.sqrt(np.mean(x**2)))
        assert (line["min"], line["max"]) == (x.min(), x.max())
        quantiles = [line[q] for q in QUANTILES]
        assert quantiles == sorted(quantiles)
        assert x.min() <= quantiles[0]
        assert quantiles[-1] <= x.max()


def test_one_tensor_or_several_by_name(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path / "a", 3))
    assert set(run.stats("weight", "0.bias")["tensor"]) == {"0.bias"}
    assert set(run.stats("weight", tensor="0.bias")["tensor"]) == {"0.bias"}
    two = run.stats("weight", tensor=["2.weight", "0.weight"])
    assert two["tensor"].unique().tolist() == ["0.weight", "2.weight"]
    assert run.stats("weight", tensor=[]).empty


def test_nonfinite_values_are_counted_and_left_out_of_the_rest(tmp_path: Path) -> None:
    x = np.array([1.0, -3.0, math.nan, math.inf, -math.inf, -math.inf, 0.0, 1e-40])
    broken = np.array([math.nan, math.inf])
    rows = [
        row(0, "0.weight", "weight", summarise(x)),
        row(0, "0.bias", "weight", summarise(broken), min=None, max=None),
    ]
    frame = run_of(tmp_path / "a", rows).stats("weight")
    first, second = frame.iloc[0], frame.iloc[1]
    assert (first["nans"], first["infs"], first["zeros"], first["subnormals"]) == (1, 3, 1, 1)
    finite = x[np.isfinite(x)]
    assert first["mean"] == pytest.approx(finite.mean())
    assert first["std"] == pytest.approx(finite.std())
    assert first["norm"] == pytest.approx(np.linalg.norm(finite))
    for column in ("mean", "std", "norm", "rms", "min", "max", *QUANTILES):
        assert math.isnan(second[column]), column


def test_pooled_rows_have_the_root_mean_square_norm(tmp_path: Path) -> None:
    pooled = merge([summarise(np.array([3.0, 4.0])), summarise(np.array([5.0, 12.0]))], captures=True)
    line = run_of(tmp_path / "a", [row(0, "0.weight", "weight", pooled)]).stats("weight").iloc[0]
    assert line["norm"] == pytest.approx(math.sqrt((25 + 169) / 2))
    assert line["rms"] == pytest.approx(math.sqrt((25 + 169) / 4))
    assert line["mean"] == pytest.approx(6.0)


def test_update_ratio_and_direction(tmp_path: Path) -> None:
    before, after = np.array([3.0, 4.0, 0.0]), np.array([3.0, 4.5, 0.2])
    d = after - before
    pair = {"dot": float(before @ d), "ref_sum_sq": float(before @ before), "lost": 1}
    line = (
        run_of(tmp_path / "a", [row(0, "0.weight", "update", summarise(d), **pair)]).stats("update").iloc[0]
    )
    assert line["ratio"] == pytest.approx(np.linalg.norm(d) / 5)
    assert line["along"] == pytest.approx(before @ d / (5 * np.linalg.norm(d)))
    assert (line["lost"], line["lost_share"]) == (1, 1 / 3)
    unit = before / 5
    assert line["parallel"] == pytest.approx(d @ unit)
    assert line["perpendicular"] == pytest.approx(np.linalg.norm(d - (d @ unit) * unit))


def test_an_update_is_split_into_decay_and_the_rest(tmp_path: Path) -> None:
    """Pooled rows give the root mean square over their captures, as the norm does."""
    rng = np.random.default_rng(0)
    before = rng.standard_normal((2, 50))
    pure = -0.01 * before[0]
    turned = rng.standard_normal(50)
    turned -= before[1] * (turned @ before[1]) / (before[1] @ before[1])
    d = [pure, turned - 0.02 * before[1]]
    pairs = [{"dot": float(b @ x), "ref_sum_sq": float(b @ b)} for b, x in zip(before, d, strict=True)]
    rows = [row(i, "0.weight", "update", summarise(x), **pairs[i]) for i, x in enumerate(d)]
    whole = merge([dataclasses.replace(summarise(x), **pairs[i]) for i, x in enumerate(d)], captures=True)
    frame = run_of(tmp_path / "a", [*rows, row(2, "0.weight", "update", whole)]).stats("update")
    lengths = np.linalg.norm(before, axis=1)
    assert frame["parallel"][:2].tolist() == pytest.approx([-0.01 * lengths[0], -0.02 * lengths[1]])
    assert frame["perpendicular"][:2].tolist() == pytest.approx([0, np.linalg.norm(turned)], abs=1e-7)
    sizes = frame["parallel"] ** 2 + frame["perpendicular"] ** 2
    assert np.allclose(sizes, frame["norm"] ** 2, rtol=1e-12)
    assert frame["ratio"][2] == pytest.approx(math.sqrt(sum(x @ x for x in d) / np.sum(lengths**2)))


def test_an_unmoved_tensor_has_an_update_of_nothing(tmp_path: Path) -> None:
    pair = {"dot": 0.0, "ref_sum_sq": 4.0, "lost": 0}
    line = run_of(tmp_path / "a", [row(0, "0.weight", "update", summarise(np.zeros(2)), **pair)])
    line = line.stats("update").iloc[0]
    assert (line["ratio"], line["parallel"], line["perpendicular"]) == (0, 0, 0)
    assert math.isnan(line["along"])


def test_what_float16_would_lose_is_counted_as_torch_converts_it(tmp_path: Path) -> None:
    """Against the conversion itself, element by element; the two steps that buckets cannot cut are named."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(200_000) * 2.0 ** rng.uniform(-40, 25, 200_000)).astype(np.float32)
    edges = np.array([2.0**-25, 2.0**-24, 65504.0, 65519.9, 65536.0, 2.0**-126, 1e-40, 0.0], np.float32)
    x = np.concatenate([x, edges, np.nextafter(edges, np.float32(0)), -edges, [np.inf, -np.inf, np.nan]])
    half = torch.from_numpy(x.astype(np.float32)).half().numpy()
    tie, last_step = np.abs(x) == 2.0**-25, (np.abs(x) >= 65520) & (np.abs(x) < 65536)
    lost = (half == 0) & (x != 0) & ~tie
    beyond = np.isinf(half) & ~last_step
    run = run_of(tmp_path / "a", [row(0, "0.weight", "gradient", summarise(x))])
    line = run.stats("gradient", columns=["underflow", "overflow"]).iloc[0]
    assert line["underflow"] == lost.sum() / x.size
    assert line["overflow"] == beyond.sum() / x.size
    assert 1000 < lost.sum() < beyond.sum() + 100_000
    assert (half[tie] == 0).all()  # so both shares are never too large, and miss nothing but these
    assert np.isinf(half[last_step]).all()


def test_histograms_are_read_only_when_they_must_tell() -> None:
    assert not {"buckets", "counts"} & set(derive.needed(["step", "norm", "lost_share", "parallel"]))
    for column in ("p50", "underflow", "overflow"):
        assert {"buckets", "counts"} <= set(derive.needed(["step", column]))


def test_second_moments_are_read_against_gradient_and_epsilon(tmp_path: Path) -> None:
    v, g, eps = np.array([1e-4, 4e-4, 1e-20]), np.array([0.01, 0.04, 1e-9]), 1e-8
    sums = {"dot": float(np.sum(g**2 / np.maximum(v, eps**2))), "lost": 1}
    run = run_of(tmp_path / "a", [row(0, "0.weight", "second_moment", summarise(v), **sums)])
    line = run.stats("second_moment").iloc[0]
    assert line["rms_ratio"] == pytest.approx(np.sqrt(np.mean([1.0, 4.0, 1e-18 / 1e-16])))
    assert line["below_epsilon"] == 1 / 3
    assert line["mean"] == pytest.approx(v.mean())


def test_an_update_of_a_zero_weight_has_no_ratio(tmp_path: Path) -> None:
    """lora_B starts at zero: no warning, no crash, no number that could be mistaken for one."""
    pair = {"dot": 0.0, "ref_sum_sq": 0.0, "lost": 0}
    rows = [
        row(0, "0.weight", "update", summarise(np.ones(2)), **pair),
        row(1, "0.weight", "update", summarise(np.zeros(2)), **pair),
    ]
    frame = run_of(tmp_path / "a", rows).stats("update")
    assert not np.isfinite(frame["ratio"]).any()
    assert frame["along"].isna().all()


def drift_row(
    step: int, now: np.ndarray, reference: np.ndarray, residual: float | None = None
) -> dict[str, Any]:
    distance = Summary(
        count=now.size,
        sum_sq=float(np.square(now - reference).sum()),
        dot=float(now @ reference),
        ref_sum_sq=float(reference @ reference),
        sign_flips=int((now * reference < 0).sum()),
        residual_sq=residual,
    )
    return row(step, "0.weight", "drift", distance, min=None, max=None)


def test_drift_from_its_sums(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    r = rng.standard_normal(50)
    w = r + 0.1 * rng.standard_normal(50)
    rows = [drift_row(0, r, r), drift_row(1, w, r), drift_row(2, -r, r), drift_row(3, w, 0 * r)]
    frame = run_of(tmp_path / "a", rows).drift(tensor="0.weight")
    assert frame["relative_l2"][:3].tolist() == pytest.approx(
        [0, np.linalg.norm(w - r) / np.linalg.norm(r), 2]
    )
    cosine = w @ r / np.linalg.norm(w) / np.linalg.norm(r)
    assert frame["cosine"][:3].tolist() == pytest.approx([1, cosine, -1])
    assert frame["sign_flips"].tolist() == [0, int((w * r < 0).sum()), 50, 0]
    assert frame["distance"][1] == pytest.approx(np.linalg.norm(w - r))
    assert frame["reference_norm"][1] == pytest.approx(np.linalg.norm(r))
    assert not np.isfinite(frame["relative_l2"][3])


def test_the_rounding_of_the_reference_is_subtracted_and_clamped(tmp_path: Path) -> None:
    r, w = np.ones(4), np.ones(4) * 1.5
    rows = [drift_row(0, w, r, residual=0.36), drift_row(1, r, r, residual=0.36)]
    frame = run_of(tmp_path / "a", rows).drift()
    assert frame["distance"].tolist() == pytest.approx([0.8, 0.0])


# Histograms -------------------------------------------------------------------------------------------------


def test_histograms_hold_every_element(tmp_path: Path) -> None:
    x = np.array([0.0, 0.0, 1e-40, -1e-41, 1.0, 1.1, -8.0, math.nan, math.inf])
    run = run_of(tmp_path / "a", [row(3, "0.weight", "weight", summarise(x))])
    frame = run.histogram("weight", "0.weight")
    tiny = 2.0**-126
    assert frame.to_dict("split")["data"] == [
        [-10.0, -8.0, 1],
        [-tiny, tiny, 2],
        [0.0, 0.0, 2],
        [1.0, 1.25, 2],
    ]
    assert frame["count"].sum() == np.isfinite(x).sum()


def test_a_histogram_is_the_last_one_up_to_the_step(tmp_path: Path) -> None:
    rows = [row(s, "0.weight", "weight", summarise(np.full(2, float(2**s)))) for s in (0, 10, 20)]
    run = run_of(tmp_path / "a", rows)
    lows = {s: run.histogram("weight", "0.weight", step=s)["low"].tolist() for s in (0, 9, 10, 19, 500)}
    assert lows == {0: [1.0], 9: [1.0], 10: [1024.0], 19: [1024.0], 500: [2.0**20]}
    assert run.histogram("weight", "0.weight")["low"].tolist() == [2.0**20]
    assert run.histogram("weight", "0.weight", step=-1).empty


@pytest.mark.parametrize("most", [1, 2, 3, 7, 20, 100])
def test_thinned_histograms_keep_the_first_and_the_last(tmp_path: Path, most: int) -> None:
    run = Run(make_run(tmp_path / "a", 20))
    steps = run.histograms("weight", "0.weight", max_steps=most)["step"].unique()
    assert len(steps) == min(most, 20)
    if most > 1:
        assert (steps[0], steps[-1]) == (0, 19)
        assert np.ptp(np.diff(steps)) <= 1  # even
    one = run.histograms("weight", "0.weight")
    last = one[one["step"] == 19][["low", "high", "count"]].reset_index(drop=True)
    assert last.equals(run.histogram("weight", "0.weight"))


@pytest.mark.parametrize(("steps", "bins"), [(None, (0, 16, 32)), ((5, 30), (0, 16))])
def test_histograms_in_few_points_hold_the_elements_of_all_their_captures(
    tmp_path: Path, steps: tuple[int, int] | None, bins: tuple[int, ...]
) -> None:
    run = Run(make_run(tmp_path / "a", 40))
    pooled = run.histograms("weight", "0.weight", steps=steps, max_points=10)
    assert tuple(pooled["step"].unique()) == bins
    for first in bins:
        each = pd.concat([run.histogram("weight", "0.weight", s) for s in range(first, min(first + 16, 40))])
        whole = each.groupby(["low", "high"])["count"].sum().to_dict()
        rows = pooled[pooled["step"] == first]
        assert rows.set_index(["low", "high"])["count"].to_dict() == whole


def test_a_range_of_histograms_is_those_steps(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path / "a", 40))
    whole = run.histograms("weight", "0.weight")
    part = run.histograms("weight", "0.weight", steps=(7, 9))
    assert part.equals(whole[whole["step"].between(7, 9)].reset_index(drop=True))


def test_drift_in_few_points_is_the_root_mean_square(tmp_path: Path) -> None:
    r = np.ones(4)
    rows = [drift_row(s, r * (1 + s / 10), r) for s in range(20)]
    run = run_of(tmp_path / "a", rows)
    each, pooled = run.drift("0.weight"), run.drift("0.weight", max_points=5)
    expected = [np.sqrt((each["relative_l2"][part] ** 2).mean()) for part in (slice(0, 16), slice(16, 20))]
    assert pooled["relative_l2"].tolist() == pytest.approx(expected)
    assert run.drift(steps=(3, 4))["step"].tolist() == [3, 4]


def test_names_are_those_with_rows_of_a_kind_in_order_of_definition(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path / "a", 3))
    rows = run.stats("weight", columns=["tensor"])["tensor"]
    assert run.names("weight") == rows.unique().tolist()
    assert run.names("activation") == []


# Values and units -------------------------------------------------------------------------------------------


def test_values_of_small_tensors(tmp_path: Path) -> None:
    steps, values = Run(make_run(tmp_path / "a", 4)).values("0.bias")
    assert steps.tolist() == [0, 1, 2, 3]
    assert np.array_equal(values, np.stack([values_at(s, "0.bias") for s in range(4)]))


def test_the_values_after_step_0_win_over_those_before_it(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "a", info())
    rows = [(0, "initial_weight", [1.0]), (0, "weight", [2.0]), (5, "weight", [3.0])]
    records = [{"step": s, "time": 0.0, "tensor": "0.bias", "kind": k, "values": v} for s, k, v in rows]
    for r in reversed(records):
        log.values([(r["step"], r["time"], r["tensor"], r["kind"], r["values"])])
    steps, values = Run(tmp_path / "a").values("0.bias")
    assert (steps.tolist(), values.ravel().tolist()) == ([0, 5], [2.0, 3.0])
    assert VALUES.names == list(records[0])


def test_activity_and_active_units(tmp_path: Path) -> None:
    bits = [np.array([1, 0, 1, 0, 0, 0, 0, 0, 1, 0], bool), np.zeros(10, bool)]
    rows = [
        row(s, "1", "activation", summarise(b * 1.0), units=10, samples=4, active=np.packbits(b).tobytes())
        for s, b in enumerate(bits)
    ]
    run = run_of(tmp_path / "a", rows)
    steps, active = run.activity("activation", "1")
    assert steps.tolist() == [0, 1]
    assert np.array_equal(active, np.stack(bits))
    frame = run.stats("activation")
    assert frame["active_units"].tolist() == [3, 0]
    assert (frame["units"].tolist(), frame["samples"].tolist()) == ([10, 10], [4, 4])


def test_tensors_say_their_latest_state(tmp_path: Path) -> None:
    states = ["frozen", "frozen", "trainable"]
    rows = [
        row(s, "0.weight", "weight", summarise(np.ones(2)), state=state) for s, state in enumerate(states)
    ]
    frame = run_of(tmp_path / "a", rows).tensors().set_index("tensor")
    assert frame.loc["0.weight", "state"] == "trainable"
    assert frame["depth"].tolist() == [0, 1, 2]
    assert frame["module_type"].tolist() == ["Linear"] * 3
    assert frame.loc["0.bias", "names"] == ["0.bias"]


def test_scalars_are_sorted_by_step(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "a", info())
    for step, value in [(2, 3.0), (0, 1.0), (2, math.nan), (1, math.inf)]:
        log.scalars(step, START + value if math.isfinite(value) else START + 9, {"loss": value})
    frame = Run(tmp_path / "a").scalars("loss")
    assert frame["step"].tolist() == [0, 1, 2, 2]
    assert np.array_equal(frame["value"], [1.0, math.inf, 3.0, math.nan], equal_nan=True)


# A run that goes on -----------------------------------------------------------------------------------------


def test_refresh_shows_what_a_live_run_has_added(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "a", info())
    run = Run(tmp_path / "a")
    assert run.last_step == -1
    write_step(log, 0)
    assert run.last_step == -1  # answers stay until refresh
    before = run.fingerprint()
    assert run.refresh()
    assert (run.last_step, len(run.stats("weight"))) == (0, 3)
    assert run.fingerprint() != before
    assert not run.refresh()
    log.update_info(notes=["new"])
    assert run.refresh()
    assert run.info["notes"] == ["new"]
    log.close()
    assert run.refresh()
    assert len(run.stats("weight")) == 3
    assert run.info["closed"]


def test_last_step_counts_scalars_too(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "a", info())
    log.stats(stats_batch([3]))
    log.scalars(7, START, {"loss": 1.0})
    assert Run(tmp_path / "a").last_step == 7


def test_live_is_asked_of_the_process_or_told_by_the_clock(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    host = socket.gethostname()
    log = LogWriter(tmp_path / "here", info(host=host, pid=child.pid))
    log.update_info(process_started=started(child.pid))
    write_step(log, 0)
    run = Run(tmp_path / "here")
    assert run.live
    child.communicate()
    assert not run.live
    log.update_info(pid=os.getpid(), process_started=started())
    run.refresh()
    assert run.live
    log.close()
    run.refresh()
    assert not run.live

    make_run(tmp_path / "there", 1, close=False, host="another")
    assert Run(tmp_path / "there").live  # written a moment ago
    for wal in (tmp_path / "there" / "wal").iterdir():
        os.utime(wal, (START, START))
    assert not Run(tmp_path / "there").live


# What is no run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "a", "schema_ver',
        "",
        "[]",
        "{}",
        '{"schema_version": "x"}',
        '{"schema_version": 2, "tensors": []}',  # without its checksum
        '{"schema_version": 1, "tensors": [{"tensor": 3}]}',
        None,
    ],
)
def test_without_a_whole_run_json_the_tables_are_read(tmp_path: Path, text: str | None) -> None:
    path, good = make_run(tmp_path / "a", 3), Run(make_run(tmp_path / "good", 3))
    (path / "run.json").unlink() if text is None else (path / "run.json").write_text(text)
    run = Run(path)
    assert list(run.problems) == ["run.json"]
    assert "\n" not in run.problems["run.json"]
    assert any("run.json" in note for note in run.notes())
    frame, whole = run.stats("weight"), good.stats("weight")
    assert frame.equals(whole.sort_values(["tensor", "step"], ignore_index=True))
    assert run.tensors()["tensor"].tolist() == sorted(TENSORS)
    assert set(run.tensors()["elements"]) == {12}
    assert run.last_step == 2


def test_a_newer_run_is_refused(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", 1)
    write_json(path / "run.json", {"schema_version": 3})
    with pytest.raises(RunError, match="has log format 3, this layerwatch reads up to 2: upgrade") as caught:
        Run(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("path", ["missing", "folder", "file"])
def test_a_path_that_is_no_run(tmp_path: Path, path: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="expected a run folder") as caught:
        Run(tmp_path / path)
    assert isinstance(caught.value, ValueError)


def test_the_content_of_run_json_is_the_runs_info(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", 1, config={"lr": 0.1})
    run = Run(path)
    content = json.loads((path / "run.json").read_text())
    assert len(content.pop("checksum")) == 8
    assert run.info == content
    assert run.name == "a"
    assert run.path == path
    assert run.info["config"] == {"lr": 0.1}


def test_compiled_quantiles_equal_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=n) * 10.0**e for n in (1, 2, 7, 500) for e in (-45, -3, 0, 30)]
    arrays += [np.zeros(5), np.array([np.nan, np.inf]), np.array([0.0, 1.0]), -np.ones(3)]
    arrays += [np.array([-1.0, 0.0, 1e-40]), np.array([-2.0, -1.0, 0.0, 0.0, 3.0])]
    rows = [row(step, "w", "weight", summarise(values)) for step, values in enumerate(arrays)]
    table = pa.Table.from_pylist(rows, STATS)
    plain = derive.stats_frame(table, "weight")
    monkeypatch.setattr(derive, "COMPILED_ROWS", 0)
    pd.testing.assert_frame_equal(derive.stats_frame(table, "weight"), plain, rtol=1e-12)
    assert plain["p50"].notna().sum() == len(arrays) - 1
