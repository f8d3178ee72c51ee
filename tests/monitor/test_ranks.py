"""What several ranks wrote, read as one run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwatch.monitor import LogWriter, Run
from layerwatch.monitor.detectors import History
from layerwatch.monitor.detectors.history import Arrays
from layerwatch.monitor.detectors.quantising import quantisation_risk
from layerwatch.monitor.schema import GIVEN
from layerwatch.monitor.summary import Summary, merge, summarise
from tests.ranks import parted_run

Cuts = list[int]


def entry(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        "tensor": name, "names": [name], "role": "matrix", "shape": list(shape),
        "elements": int(np.prod(shape)), "dtype": "float32", "module": name, "module_type": "Linear",
        "trainable": True, "state": "trainable",
    }  # fmt: skip


def row(step: int, tensor: str, values: np.ndarray, state: str = "trainable") -> dict[str, Any]:
    found = summarise(values.astype(np.float32).reshape(-1))
    columns = {name: getattr(found, name) for name in GIVEN["stats"].names if hasattr(found, name)}
    active = np.packbits((values != 0).any(axis=1)).tobytes()
    return {
        **columns, "step": step, "time": 1.0 * step, "tensor": tensor, "kind": "gradient", "captures": 1,
        "buckets": found.buckets.tolist(), "counts": found.counts.tolist(), "skipped": False, "state": state,
        "min": found.min if np.isfinite(found.min) else None, "stage": "at_step",
        "max": found.max if np.isfinite(found.max) else None, "units": len(values), "active": active,
    }  # fmt: skip


def write(path: Path, whole: np.ndarray, cuts: Cuts, *, missing: set[tuple[int, int]] = frozenset()) -> Run:  # type: ignore[assignment]
    """A run of two steps whose tensor `w` is cut by rows; `missing`: (rank, step) that were never written."""
    edges = [0, *sorted(cuts), len(whole)]
    logs = []
    for rank, (low, high) in enumerate(pairwise(edges)):
        info = {
            "tensors": [entry("w", whole.shape), entry("b", (3, 1))], "rank": rank, "world": len(edges) - 1,
            "shards": {"0": {"w": [[low, 0], [high - low, whole.shape[1]]]}},
        }  # fmt: skip
        log = LogWriter(path, info, writer=f"r{rank}")
        log.begin(0)
        logs.append(log)
    for step in (0, 1):
        for rank, (log, low, high) in enumerate(zip(logs, edges[:-1], edges[1:], strict=True)):
            if (rank, step) in missing:
                continue
            part = whole[low:high] * (step + 1)
            rows = (
                [row(step, "w", part, "zero_gradient" if not part.any() else "trainable")]
                if len(part)
                else []
            )
            if rank == 0:
                rows.append(row(step, "b", np.full((3, 1), 1.0 + step)))
            log.stats(pa.RecordBatch.from_pylist(rows, GIVEN["stats"]))
            log.scalars(
                step,
                float(step),
                {"grad_norm": float(np.sqrt((part.astype(float) ** 2).sum())), "loss": 1.0 + rank},
            )
            if len(part):
                log.values([(step, float(step), "w", "weight", part.reshape(-1))])
    for log in logs[::-1]:
        log.close()
    return Run(path)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000), rows=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 9), min_size=0, max_size=3),
)  # fmt: skip
def test_parts_are_the_whole(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rows: int, cuts: Cuts
) -> None:
    rng = np.random.default_rng(seed)
    whole = (rng.standard_normal((rows, 5)) * rng.integers(0, 2, (rows, 1))).astype(np.float32)
    whole[0, 0] = rng.choice([1.0, np.nan, np.inf, 0.0])
    cuts = [min(cut, rows) for cut in cuts]
    one = write(tmp_path_factory.mktemp("one") / "run", whole, [])
    run = write(tmp_path_factory.mktemp("parts") / "run", whole, cuts)
    a, b = one.stats("gradient"), run.stats("gradient")
    for name in a.columns:
        if name != "time":
            np.testing.assert_array_equal(a[name].isna(), b[name].isna(), name)
            if a[name].dtype.kind in "fi":
                np.testing.assert_allclose(a[name], b[name], rtol=1e-12, atol=1e-12, err_msg=name)
            else:
                assert list(a[name].fillna("")) == list(b[name].fillna("")), name
    assert one.histogram("gradient", "w").equals(run.histogram("gradient", "w"))
    for kept, again in zip(one.values("w"), run.values("w"), strict=True):
        np.testing.assert_array_equal(kept, again)
    for kept, again in zip(one.activity("gradient", "w"), run.activity("gradient", "w"), strict=True):
        np.testing.assert_array_equal(kept, again)
    np.testing.assert_allclose(
        one.scalars("grad_norm")["value"], run.scalars("grad_norm")["value"], rtol=1e-12
    )
    assert list(run.scalars("loss")["value"]) == [1.0, 1.0]  # of the lowest rank
    assert list(run.tensors()["tensor"]) == ["w", "b"]


def test_a_step_counts_when_all_its_parts_are_there(tmp_path: Path) -> None:
    whole = np.ones((6, 2), np.float32)
    run = write(tmp_path / "run", whole, [2, 4], missing={(1, 1)})
    stats = run.stats("gradient")
    assert list(stats.loc[stats["tensor"] == "w", "step"]) == [0]
    assert list(stats.loc[stats["tensor"] == "b", "step"]) == [0, 1]
    assert list(run.scalars("grad_norm")["step"]) == [0]
    assert list(run.values("w")[0]) == [0]
    assert run.stats("gradient", columns=["step", "norm"]).equals(stats[["step", "norm"]])


def test_a_running_rank_is_read_as_far_as_all_are(tmp_path: Path) -> None:
    path = tmp_path / "run"
    infos = [
        {"tensors": [entry("w", (4, 2))], "rank": r, "world": 2, "shards": {"0": {"w": [[2 * r, 0], [2, 2]]}}}
        for r in (0, 1)
    ]
    one, two = (LogWriter(path, info, writer=f"r{r}") for r, info in enumerate(infos))
    one.stats(pa.RecordBatch.from_pylist([row(0, "w", np.ones((2, 2)))], GIVEN["stats"]))
    run = Run(path)
    assert run.stats("gradient").empty
    two.stats(pa.RecordBatch.from_pylist([row(0, "w", np.ones((2, 2)))], GIVEN["stats"]))
    assert run.refresh()
    assert list(run.stats("gradient")["norm"]) == [np.sqrt(8)]
    for log in (one, two):
        log.close()


def test_summaries_of_parts_merge_to_that_of_the_whole() -> None:
    values = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    parts: list[Summary] = [summarise(values[:2].reshape(-1)), summarise(values[2:].reshape(-1))]
    whole, merged = summarise(values.reshape(-1)), merge(parts)
    assert merged.count == whole.count
    assert merged.buckets.tolist() == whole.buckets.tolist()


def test_ranks_that_part_and_agree_again_are_a_remark(tmp_path: Path) -> None:
    (found,) = [f for f in parted_run(tmp_path / "a").findings() if f.problem == "replica_desync"]
    assert (found.severity, found.first_step, found.layers) == ("warning", 100, ("w",))
    assert found.evidence["rank"] == 2
    again = parted_run(tmp_path / "b", healed=True)
    (found,) = [f for f in again.findings() if f.problem == "replica_desync"]
    assert (found.severity, found.first_step, found.last_step) == ("info", 100, 100)


def test_a_rank_that_is_behind_is_missing(tmp_path: Path) -> None:
    run = parted_run(tmp_path / "run", until={1: 0}, last=400, close=False)
    ranks = run.ranks().set_index("rank")
    assert ranks.loc[1, "missing_since"] == 1
    assert ranks["missing_since"].notna().sum() == 1
    assert "rank 1 of 3 is missing since step 1" in run.notes()


@pytest.mark.parametrize(("outlier", "found"), [(1.0, False), (30.0, False), (60.0, True)])
def test_outliers_of_a_matrix(outlier: float, found: bool) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((300, 300)).astype(np.float32)
    w[3, 4] = outlier
    scale = np.abs(w).max() / 127
    noise = np.round(w / scale) * scale - w
    measured = 10 * np.log10((w**2).mean() / (noise**2).mean())
    numbers = {
        "step": [0, 1, 2], "min": [w.min()] * 3, "max": [w.max()] * 3, "rms": [np.sqrt((w**2).mean())] * 3,
    }  # fmt: skip
    rows = {kind: {"w": numbers} for kind in ("weight", "gradient")}
    history = History(Arrays(layers=[{"tensor": "w", "role": "matrix", "shape": [300, 300]}], rows=rows))
    finding = quantisation_risk(history)
    assert (finding is not None) == found == (measured < 20)
    if finding is not None:
        assert finding.severity == "info"
        assert float(finding.evidence["sqnr_db"]) == pytest.approx(measured, abs=0.5)


def test_a_run_that_the_first_rank_never_wrote(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "run", {"tensors": [entry("w", (2, 2))], "rank": 2, "world": 3}, writer="r2")
    log.stats(pa.RecordBatch.from_pylist([row(0, "w", np.ones((2, 2)))], GIVEN["stats"]))
    log.close()
    run = Run(tmp_path / "run")
    assert list(run.tensors()["role"]) == ["matrix"]
    assert list(run.stats("gradient")["norm"]) == [2.0]
    assert list(run.ranks()["missing_since"].fillna(-1)) == [0, 0, -1]
