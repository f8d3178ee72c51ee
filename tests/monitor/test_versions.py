"""Logs of every released format version stay readable; newer ones are refused, and never touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from made_logs import TENSORS, make_run

from layerwatch.monitor import SCHEMA_VERSION, Run, RunError, compact
from layerwatch.monitor.description import write_json
from layerwatch.monitor.wal import WalReader, encode

DATA = Path(__file__).parents[1] / "data"
VERSIONS = range(1, SCHEMA_VERSION + 1)
#: Of each version: norms of the first weight, its relative drift, and losses, as they were read when it was
#: new.
NORMS = {
    1: [1.278921379994, 1.259824339318, 1.232953215743, 1.205864964306, 1.184493258174, 1.163947800385],
    2: [1.278921379994, 1.270482153567, 1.259824339318, 1.247580535154, 1.232953215743, 1.218065653124],
}
DRIFTS = {1: [0.037920589716, 0.089937888034, 0.132704804714], 2: [0.037920589716, 0.065910712952]}
LOSSES = [0.082786910236, 0.053985532373, 0.054716240615]


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> int:
    return request.param


def test_there_is_a_log_of_every_version() -> None:
    """Who raises SCHEMA_VERSION keeps a small log of the new format here, closed and interrupted."""
    found = sorted(int(p.name[1:]) for p in DATA.glob("v*"))
    assert found == list(VERSIONS)
    for number in VERSIONS:
        folder = DATA / f"v{number}"
        assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 100_000
        for name in ("closed", "interrupted"):
            content = json.loads((folder / name / "run.json").read_text())
            assert (content["schema_version"], content["host"]) == (number, "elsewhere")


@pytest.mark.parametrize("name", ["closed", "interrupted"])
def test_its_numbers_are_those_that_were_written(version: int, name: str) -> None:
    run = Run(DATA / f"v{version}" / name)
    assert run.problems == {}
    few = slice(None) if name == "closed" else slice(3)
    norms = run.stats("weight", "0.weight")["norm"].tolist()
    assert norms[: len(NORMS[version][few])] == pytest.approx(NORMS[version][few], rel=1e-11)
    drifts = run.drift("0.weight")["relative_l2"].tolist()
    assert drifts[: len(DRIFTS[version])] == pytest.approx(DRIFTS[version], rel=1e-11)
    assert run.scalars("train_loss")["value"].tolist()[:3] == pytest.approx(LOSSES, rel=1e-11)
    assert run.tensors()["tensor"].tolist() == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert run.tensors()["role"].tolist() == ["matrix", "bias", "output", "bias"]
    assert {"weight", "gradient", "update", "drift", "activation", "initial_weight"} <= set(run.kinds())
    histogram = run.histogram("gradient", "0.weight", step=0)
    assert histogram["count"].sum() == 24
    steps, active = run.activity("activation", "1")
    assert (steps[0], active.shape[1]) == (0, 6)
    steps, values = run.values("0.bias")
    assert (steps[0], values.shape[1]) == (0, 6)
    assert np.isfinite(values).all()
    assert run.events()["event"].iloc[0] == "start"
    run.findings()


def test_a_resumed_log_of_version_2_shows_what_is_current() -> None:
    run = Run(DATA / "v2" / "closed")
    assert run.sessions()["first_step"].tolist() == [0, 18]
    frame = run.stats("weight", "0.weight")
    assert frame["step"].tolist() == list(range(22))
    assert frame["norm"][21] == pytest.approx(1.27465535522)
    assert Run(run.path, session=0).stats("weight", "0.weight")["norm"][21] == pytest.approx(1.07888626065)
    few = run.stats("weight", "0.weight", ["step", "captures"], max_points=5)
    assert few["captures"].tolist() == [16, 2, 4]


def test_an_old_log_can_be_compacted(version: int, tmp_path: Path) -> None:
    path = shutil.copytree(DATA / f"v{version}" / "interrupted", tmp_path / "a")
    before = Run(path)
    frames = {kind: before.stats(kind) for kind in before.kinds()}
    compact(path)
    assert not list((path / "wal").glob("*"))
    after = Run(path)
    for kind, frame in frames.items():
        pd.testing.assert_frame_equal(after.stats(kind), frame)
    assert after.problems == {}


# Newer ones -------------------------------------------------------------------------------------------------


def test_a_newer_run_is_refused_in_one_line(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", 1)
    content = json.loads((path / "run.json").read_text())
    write_json(path / "run.json", {**content, "schema_version": SCHEMA_VERSION + 1})
    with pytest.raises(
        RunError, match=f"has log format {SCHEMA_VERSION + 1}, .* upgrade layerwatch"
    ) as caught:
        Run(path)
    assert "\n" not in str(caught.value)


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.rglob("*") if p.is_file() and "new" in p.name}


def newer_wal(path: Path) -> None:
    header: Any = "header", json.dumps({"schema_version": SCHEMA_VERSION + 1}).encode()
    rows: Any = "scalars", json.dumps([[0, 0.0, "loss", 1.0, 0, "unheard of"]]).encode()
    (path / "wal" / "new-000001.wal").write_bytes(b"".join([*encode(header), *encode(rows)]))


def newer_part(path: Path) -> None:
    part = next((path / "stats").glob("*.parquet"))
    table = pq.read_table(part)
    metadata = {"layerwatch_schema_version": str(SCHEMA_VERSION + 1)}
    pq.write_table(table.replace_schema_metadata(metadata), path / "stats" / "new-000001.parquet")


@pytest.mark.parametrize("make", [newer_wal, newer_part])
def test_a_newer_file_is_named_and_left_alone(tmp_path: Path, make: Any) -> None:
    path = make_run(tmp_path / "a", 3)
    make(path)
    before = contents(path)
    run = Run(path)
    assert run.stats("weight", TENSORS[0])["step"].tolist() == [0, 1, 2]
    assert run.scalar_names() == ["lr", "train_loss"]
    ((name, what),) = run.problems.items()
    assert "new-000001" in name
    assert f"of log format {SCHEMA_VERSION + 1}, this layerwatch reads up to {SCHEMA_VERSION}" in what
    compact(path)
    assert contents(path) == before
    assert list(Run(path).problems) in ([name], [])  # of a part only once it is read


def test_a_newer_file_is_followed_without_reading_it(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", 1)
    newer_wal(path)
    reader = WalReader(path / "wal" / "new-000001.wal")
    assert not reader.read()
    assert (reader.newer, reader.damaged, reader.tail) == (True, 0, 0)
    assert not any(reader.tables.values())
