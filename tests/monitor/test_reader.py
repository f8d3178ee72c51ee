"""Reading tables from parts and write-ahead files: filters, damage, a writer and its compaction beside it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from made_logs import TENSORS, info, make_run, write_step

from layerwatch.monitor import LogWriter, Run, compact
from layerwatch.monitor import log as log_module
from layerwatch.monitor.reader import LogReader
from layerwatch.monitor.schema import TABLES


@pytest.mark.parametrize("closed", [True, False])
def test_columns_and_filters_are_the_same_live_and_compacted(tmp_path: Path, closed: bool) -> None:
    reader = LogReader(make_run(tmp_path / "a", 4, close=closed))
    table = reader.table("stats", ["step", "tensor"], {"tensor": [TENSORS[1]], "kind": ["weight"]})
    assert table.column_names == ["step", "tensor"]
    assert table["step"].to_pylist() == [0, 1, 2, 3]
    assert set(table["tensor"].to_pylist()) == {TENSORS[1]}
    assert reader.table("stats", ["step"], {"kind": ["no such kind"]}).num_rows == 0
    assert reader.table("stats").schema.equals(TABLES["stats"])


def test_live_and_compacted_rows_are_equal(tmp_path: Path) -> None:
    live, closed = (LogReader(make_run(tmp_path / name, close=name == "b")) for name in "ab")
    for name in ("stats", "values", "scalars"):
        order = [("step", "ascending"), ("name" if name == "scalars" else "tensor", "ascending")]
        assert live.table(name).sort_by(order).equals(closed.table(name).sort_by(order)), name


def test_refresh_and_fingerprint_tell_what_is_new(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "a", info())
    write_step(log, 0)
    reader = LogReader(tmp_path / "a")
    first = reader.fingerprint()
    assert not reader.refresh()
    assert reader.fingerprint() == first
    write_step(log, 1)
    assert reader.table("scalars").num_rows == 2  # answers from what it saw
    assert reader.refresh()
    assert reader.fingerprint() != first
    assert reader.table("scalars").num_rows == 4


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_part_is_reported_and_the_rest_served(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a"
    log = LogWriter(path, info())
    write_step(log, 0)
    log.close()
    log = LogWriter(path, info(), resume=True)
    write_step(log, 1)
    compact(path, limit=1)
    part = path / "stats" / "r0-000001.parquet"
    data = bytearray(part.read_bytes())
    if damage == "flipped":
        for position in range(len(data) // 4, len(data) // 2, 16):
            data[position] ^= 0xFF
    part.write_bytes({"flipped": data, "cut": data[:-20], "empty": b""}[damage])
    run = Run(path)
    assert set(run.stats("weight")["step"]) == {1}
    assert list(run.problems) == ["stats/r0-000001.parquet"]
    assert "\n" not in run.problems["stats/r0-000001.parquet"]
    assert run.scalars("train_loss")["step"].tolist() == [0, 1]


def test_a_reader_beside_a_writer_and_its_compaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "SEGMENT_BYTES", 8_000)
    path = tmp_path / "a"
    log = LogWriter(path, info())
    write_step(log, 0)
    failures: list[BaseException] = []

    def train() -> None:
        try:
            for step in range(1, 150):
                write_step(log, step)
            log.close()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    run, last = Run(path), 0
    while thread.is_alive():
        run.refresh()
        frame = run.stats("weight")
        steps = sorted(frame["step"].unique())
        assert steps == list(range(len(steps)))  # no step is missing
        assert len(frame) == len(steps) * len(TENSORS)  # none is half there, none is double
        assert len(steps) >= last  # nothing that was seen disappears
        last = len(steps)
    thread.join()
    assert failures == []
    run.refresh()
    assert run.last_step == 149
    assert run.problems == {}


def test_foreign_files_in_the_folders_are_ignored(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    (path / "stats" / "notes.parquet").write_text("mine")
    (path / "wal" / "old.txt").write_text("mine")
    assert Run(path).last_step == 4
    assert Run(path).problems == {}
