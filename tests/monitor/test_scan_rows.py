"""One run as one row: what is in it is what `Run` says, and nothing that is wrong with a run stops a scan."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from layerwatch.monitor import LogWriter, Run, RunError
from layerwatch.monitor.fleet import COLUMNS, ScanTable, read_table, scan_run, write_table
from layerwatch.monitor.weights.names import block_of
from tests.dashboard.made_runs import write_run
from tests.monitor.made_fleets import make_sick
from tests.monitor.made_logs import info, make_run
from tests.object_server import ObjectServer


def row_of(path: Path | str, **more: Any) -> dict[str, Any]:
    table = scan_run(path, **more)
    assert table.schema.equals(COLUMNS)
    assert len(table) == 1
    return table.to_pylist()[0]


def test_a_row_says_what_the_run_says(tmp_path: Path) -> None:
    write_run(tmp_path, "twin", parts=True, config={"optimizer": {"lr": 0.1}, "depth": 3})
    run, row = Run(tmp_path / "twin"), row_of(tmp_path / "twin")
    drift = run.drift()
    last = drift[drift["step"] == drift["step"].max()]
    assert row["run"] == "twin"
    assert row["steps"] == run.last_step + 1 == 191
    assert row["health"] == "healthy"
    assert not run.findings()
    assert row["notes"] == run.notes()
    assert row["train_loss"] == run.scalars("train_loss")["value"].iloc[-1]
    assert row["val_loss"] is None
    assert row["drift"] == last["relative_l2"].max()
    assert row["drift_layer"] == last.loc[last["relative_l2"].idxmax(), "tensor"]
    assert json.loads(row["config"]) == {"optimizer.lr": 0.1, "depth": 3}
    assert (row["tensors"], row["parameters"]) == (3, 192)
    assert row["created"] == run.info["created"]
    assert row["closed"]
    assert not row["live"]
    assert row["bytes"] == sum(f.stat().st_size for f in (tmp_path / "twin").rglob("*") if f.is_file())
    ends = {scalar["name"]: scalar for scalar in row["scalars"]}
    assert ends["accuracy"] == {"name": "accuracy", "last": 0.95, "best": 0.95, "best_step": 190}
    losses = run.scalars("train_loss")
    assert ends["train_loss"]["best_step"] == losses["step"][losses["value"].argmin()]


def test_the_drift_of_a_block_is_that_of_its_tensors_together(tmp_path: Path) -> None:
    write_run(tmp_path, "base")
    drift = Run(tmp_path / "base").drift()
    last = drift[drift["step"] == drift["step"].max()]
    blocks = {block["block"]: block for block in row_of(tmp_path / "base")["blocks"]}
    for name in blocks:
        own = last[[block_of(tensor) == name for tensor in last["tensor"]]]
        moved = math.sqrt(sum(x**2 for x in own["distance"]) / sum(x**2 for x in own["reference_norm"]))
        assert np.isclose(blocks[name]["relative_l2"], moved)
        assert blocks[name]["tensors"] == len(own)
    assert sum(block["tensors"] for block in blocks.values()) == 3


def test_findings_are_those_of_check(tmp_path: Path) -> None:
    run = Run(make_sick(tmp_path / "sick"))
    row = row_of(run.path)
    (expected,) = [f for f in run.findings() if f.alarm]
    assert (row["health"], row["problem"], row["alarms"]) == ("critical", "nonfinite", 1)
    found = next(f for f in row["findings"] if f["problem"] == expected.problem)
    assert found["summary"] == expected.summary
    assert found["advice"] == expected.advice
    assert (found["first_step"], found["last_step"]) == (expected.first_step, expected.last_step)


def test_labels_and_costs_are_in_the_row(tmp_path: Path) -> None:
    path = make_run(
        tmp_path / "a", owner="ana", tags=["base", 3], note="first", model=["Net"], cadence={"overhead": 0.02}
    )
    row = row_of(path)
    assert (row["owner"], row["tags"], row["note"], row["model"], row["cost"]) == (
        "ana", ["base"], "first", "Net", 0.02,
    )  # fmt: skip
    (path / "labels.json").write_text('{"tags": ["final"], "owner": "bo", "note": 7}')
    edited = row_of(path)
    assert (edited["owner"], edited["tags"], edited["note"]) == ("bo", ["final"], "first")
    assert edited["key"] != row["key"]


def nothing(path: Path) -> None:
    path.mkdir()


def torn(path: Path) -> None:
    path.mkdir()
    (path / "run.json").write_text('{"schema_ver')


def newer(path: Path) -> None:
    make_run(path)
    (path / "run.json").write_text('{"schema_version": 99}')


def not_a_folder(path: Path) -> None:
    path.write_text("x")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (nothing, "with a run.json"),
        (torn, "is damaged"),
        (newer, "upgrade layerwatch"),
        (not_a_folder, "with a run.json"),
        (lambda path: None, "does not exist"),
    ],
)
def test_what_cannot_be_read_is_a_row_with_the_reason(tmp_path: Path, make: Any, words: str) -> None:
    make(tmp_path / "x")
    row = row_of(tmp_path / "x")
    assert row["health"] == "unreadable"
    assert words in row["error"]
    assert row["key"] is None


def test_an_empty_run_is_not_called_healthy(tmp_path: Path) -> None:
    LogWriter(tmp_path / "x", info()).close()
    row = row_of(tmp_path / "x")
    assert (row["health"], row["steps"], row["notes"]) == ("unknown", 0, ["nothing is captured yet"])


def test_a_detector_that_fails_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Run) -> None:
        raise ZeroDivisionError("no")

    monkeypatch.setattr(Run, "findings", fail)
    row = row_of(make_run(tmp_path / "x"))
    assert row["health"] == "unknown"
    assert row["steps"] == 5
    assert "ZeroDivisionError" in row["notes"][0]


@pytest.mark.parametrize("junk", [{"tags": 3, "config": [1], "versions": 4, "cadence": 5, "model": 6}])
def test_anything_may_stand_in_run_json(tmp_path: Path, junk: dict[str, Any]) -> None:
    row = row_of(make_run(tmp_path / "x", **junk))
    assert row["error"] is None
    assert row["steps"] == 5


def test_a_run_is_read_through_any_filesystem(tmp_path: Path, object_server: ObjectServer) -> None:
    make_run(tmp_path / "x")
    url = object_server.make_bucket()
    files = object_server.files()
    fs.copy_files(str(tmp_path / "x"), "bucket/runs/x", destination_filesystem=files)
    plain = row_of(tmp_path / "x", filesystem=fs.LocalFileSystem())
    own = ("url", "key", "wrote", "scanned", "seconds")
    for other in (row_of(f"{url}/runs/x"), row_of("bucket/runs/x", filesystem=files)):
        assert {k: v for k, v in other.items() if k not in own} == {
            k: v for k, v in plain.items() if k not in own
        }


def test_a_table_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    rows = [row_of(make_sick(tmp_path / "sick")), row_of(tmp_path / "none")]
    table = ScanTable(str(tmp_path), rows, 5.0, 4.0, ["a note"])
    write_table(table, tmp_path / "t.parquet")
    back = read_table(tmp_path / "t.parquet")
    assert repr(back) == repr(table)  # NaN is not equal to itself
    assert pq.read_table(tmp_path / "t.parquet").column_names == COLUMNS.names
    assert list(back.to_pandas()["run"]) == ["sick", "none"]


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="layerwatch scan"):
        read_table(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(RunError, match="is none"):
        read_table(tmp_path / "t.parquet")
    shutil.copy(next(make_run(tmp_path / "x").glob("stats/*.parquet")), tmp_path / "t.parquet")
    with pytest.raises(RunError, match="is none"):
        read_table(tmp_path / "t.parquet")
    table = ScanTable("r", [], 1.0).to_arrow()
    about = (table.schema.metadata or {})[b"layerwatch_scan"].replace(b'"version": 1', b'"version": 9')
    pq.write_table(table.replace_schema_metadata({"layerwatch_scan": about}), tmp_path / "t.parquet")
    with pytest.raises(RunError, match="upgrade"):
        read_table(tmp_path / "t.parquet")
