"""Writing a run: claiming a folder, resuming, rotation, compaction that may be interrupted at any point."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_logs import TENSORS, info, make_run, stats_batch, write_step

from layerwatch.monitor import LogWriter, Run, RunError, RunExistsError, compact
from layerwatch.monitor import log as log_module
from layerwatch.monitor.schema import SORT_KEYS, TABLES
from layerwatch.monitor.spans import Span, spans


def counted(run: Run) -> Counter[tuple[int, str]]:
    """How often each (step, tensor) is in `stats("weight")`."""
    frame = run.stats("weight")
    return Counter(zip(frame["step"].tolist(), frame["tensor"].tolist(), strict=True))


def assert_complete(path: Path, steps: int) -> None:
    """Every row of every table is readable exactly once."""
    run = Run(path)
    assert counted(run) == {(s, t): 1 for s in range(steps) for t in TENSORS}
    assert run.scalars("train_loss")["step"].tolist() == list(range(steps))
    assert run.values("0.bias")[0].tolist() == list(range(steps))
    assert (run.events()["event"] == "note").sum() == steps


# Claiming a folder ------------------------------------------------------------------------------------------


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(RunExistsError, match=r"exists already: pass resume=True .* or another run="):
        LogWriter(path, info())
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(RunError, match="is a file: choose another run="):
        LogWriter(tmp_path / "a", info())
    assert (tmp_path / "a").read_text() == "mine"


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="found none"):
        LogWriter(tmp_path / "a", info(), resume=True)


@pytest.mark.parametrize("closed", [True, False])
def test_a_resumed_run_goes_on_in_new_files(tmp_path: Path, closed: bool) -> None:
    path = make_run(tmp_path / "a", 3, close=closed)
    created = Run(path).info["created"]
    log = LogWriter(path, info(pid=2), resume=True)
    for step in (3, 4):
        write_step(log, step)
    assert_complete(path, 5)  # before and after the close
    assert not Run(path).info["closed"]
    log.close()
    assert_complete(path, 5)
    assert Run(path).info["created"] == created
    assert Run(path).info["closed"]


def test_closing_twice_changes_nothing(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "a", info())
    write_step(log, 0)
    log.close()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    log.close()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_run_json_is_replaced_whole(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "a", info())
    log.update_info(notes=["x"])
    assert json.loads((tmp_path / "a" / "run.json").read_text())["notes"] == ["x"]
    assert not list((tmp_path / "a").glob(".*"))


# Rotation and compaction ------------------------------------------------------------------------------------


def test_a_long_run_rotates_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "SEGMENT_BYTES", 20_000)
    path = tmp_path / "a"
    log = LogWriter(path, info())
    for step in range(60):
        write_step(log, step)
        if step % 20 == 19:
            assert_complete(path, step + 1)
    assert len(list((path / "stats").glob("*.parquet"))) > 1  # compacted while the training ran
    log.close()
    assert_complete(path, 60)
    assert [p.suffix for p in (path / "stats").iterdir()] == [".parquet"]
    assert not list((path / "wal").iterdir())


def test_a_part_is_sorted_and_typed_for_any_reader(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    for name, schema in TABLES.items():
        (part,) = (path / name).glob("*.parquet")
        table = pq.read_table(part)
        assert table.schema.remove_metadata().equals(schema), name
        assert table.sort_by(SORT_KEYS[name]).equals(table), name
        assert (table.schema.metadata or {})[b"layerwatch_schema_version"] == b"2"
    (part,) = (path / "stats").glob("*.parquet")
    meta = pq.read_metadata(part)
    assert meta.row_group(0).column(2).statistics.has_min_max  # the tensor: groups can be skipped
    assert meta.row_group(0).column(0).compression == "ZSTD"


def test_every_common_reader_opens_a_part(tmp_path: Path) -> None:
    import duckdb
    import pandas as pd
    import polars as pl

    path = make_run(tmp_path / "a")
    (part,) = (path / "stats").glob("*.parquet")
    by_pandas = pd.read_parquet(part)
    assert by_pandas["step"].dtype == "int64"
    assert set(by_pandas["tensor"]) == set(TENSORS)
    by_polars = pl.read_parquet(part)
    assert (by_polars.schema["tensor"], by_polars.schema["step"]) == (pl.String, pl.Int64)
    assert by_polars["count"].sum() == by_pandas["count"].sum()
    query = f"SELECT typeof(tensor), typeof(step), count(*) FROM '{part}' GROUP BY ALL"
    kinds = duckdb.execute(query).fetchall()
    assert kinds == [("VARCHAR", "BIGINT", 15)]
    types = {f.name: f.type for f in pq.read_schema(part)}
    assert types["tensor"] == pa.string()
    assert types["step"] == pa.int64()


class Interrupted(BaseException):
    """The process dies here."""


def dying_at(number: int) -> Callable[..., Any]:
    """Wraps a file operation: its `number`-th call happens no more."""
    calls = iter(range(number))

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if next(calls, None) is None:
                raise Interrupted
            return real(*args, **kwargs)

        return operation

    return wrap


@pytest.fixture
def die_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Interrupts the n-th rename, removal or Parquet file from now on."""
    originals = (os.replace, Path.unlink, pq.write_table)

    def arm(number: int) -> None:
        wrap = dying_at(number)
        monkeypatch.setattr(os, "replace", wrap(originals[0]))
        monkeypatch.setattr(Path, "unlink", wrap(originals[1]))
        monkeypatch.setattr(pq, "write_table", wrap(originals[2]))

    yield arm
    monkeypatch.undo()


def several_files(path: Path) -> Path:
    """A run that was interrupted twice: a merged part per table, then two write-ahead files."""
    log = LogWriter(path, info())
    write_step(log, 0)
    log.close()
    for step in (1, 2):
        log = LogWriter(path, info(), resume=True)
        write_step(log, step)
    return path


def test_compaction_interrupted_at_any_point_loses_and_doubles_nothing(
    tmp_path: Path, die_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = several_files(tmp_path / "template")
    completed, number = False, 0
    for number in range(200):
        path = tmp_path / f"run{number}"
        shutil.copytree(template, path)
        live = Run(path)  # a reader that was there before
        die_at(number)
        try:
            compact(path)
            completed = True
        except Interrupted:
            pass
        monkeypatch.undo()
        assert_complete(path, 3)
        live.refresh()
        assert counted(live) == {(s, t): 1 for s in range(3) for t in TENSORS}, number
        compact(path)  # the next attempt finishes the work
        assert_complete(path, 3)
        assert [len(list((path / t).glob("*.parquet"))) for t in TABLES] == [1, 1, 1, 1]
        assert not list((path / "wal").iterdir())
        if completed:
            break
    assert completed
    assert number > 20


def test_large_tables_are_left_to_the_compact_command(tmp_path: Path) -> None:
    path = several_files(tmp_path / "a")
    compact(path, limit=1)
    assert len(list((path / "stats").glob("*.parquet"))) == 3
    assert_complete(path, 3)
    assert compact(path) == 12
    assert len(list((path / "stats").glob("*.parquet"))) == 1
    assert_complete(path, 3)


def test_a_damaged_part_does_not_stop_the_compaction_of_the_others(tmp_path: Path) -> None:
    path = several_files(tmp_path / "a")
    compact(path, limit=1)
    damaged = sorted((path / "stats").glob("*.parquet"))[1]
    damaged.write_bytes(b"PAR1" + bytes(100))
    compact(path)
    run = Run(path)
    assert set(run.stats("weight")["step"]) == {0, 2}
    assert run.scalars("train_loss")["step"].tolist() == [0, 1, 2]
    assert damaged.name in run.problems  # kept, and still reported
    assert damaged.exists()


def test_compacting_a_damaged_write_ahead_file_says_so(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", 3, close=False)
    (wal,) = (path / "wal").glob("*.wal")
    data = bytearray(wal.read_bytes())
    data[len(data) // 2] ^= 0xFF
    wal.write_bytes(data)
    before = Run(path)
    before.last_step  # noqa: B018  (reads)
    assert wal.name in before.problems
    compact(path)
    after = Run(path)
    assert counted(after) == counted(before)
    assert any(wal.name in message for message in after.events()["message"])


def test_a_full_disk_stops_the_background_work_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "SEGMENT_BYTES", 5_000)
    real = pq.write_table

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    log = LogWriter(tmp_path / "a", info())
    for step in range(10):
        write_step(log, step)
    assert_complete(tmp_path / "a", 10)
    monkeypatch.setattr(pq, "write_table", real)
    log.close()
    assert_complete(tmp_path / "a", 10)


def test_empty_scalars_and_values_leave_a_readable_log(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "a", info())
    log.scalars(0, 0.0, {})
    log.values([])
    log.scalars(0, 0.0, {"loss": 1.0})
    log.close()
    assert Run(tmp_path / "a").problems == {}
    assert Run(tmp_path / "a").scalar_names() == ["loss"]


@pytest.mark.parametrize(
    ("name", "span"),
    [
        ("r0-000003.wal", Span("r0", 3, 3)),
        ("r0-000001-000042.parquet", Span("r0", 1, 42)),
        ("r1-x-000002.parquet", Span("r1-x", 2, 2)),
        ("notes.txt", None),
        (".r0-000001.parquet.tmp", None),
    ],
)
def test_a_file_name_says_what_it_holds(name: str, span: Span | None) -> None:
    assert Span.of(Path(name)) == span


def test_a_covered_file_does_not_count(tmp_path: Path) -> None:
    for name in ("r0-000001", "r0-000002", "r0-000001-000002", "r0-000003", "r1-000001"):
        (tmp_path / f"{name}.parquet").touch()
    assert [s.stem for s in spans(tmp_path, ".parquet")] == ["r0-000001-000002", "r0-000003", "r1-000001"]


# A process that dies ----------------------------------------------------------------------------------------

CHILD = """
import sys, os, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from made_logs import info, write_step
from layerwatch.monitor import LogWriter, log
log.SEGMENT_BYTES = 20_000
writer = LogWriter(Path({path!r}), info())
for step in range(100_000):
    write_step(writer, step)
    print(step, flush=True)
"""


def test_a_killed_writer_leaves_every_written_step(tmp_path: Path, checkout: Path) -> None:
    path = tmp_path / "a"
    code = CHILD.format(tests=str(Path(__file__).parent), path=str(path))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=checkout)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) == 150:
            child.kill()
            break
    reported = [int(line) for line in child.stdout if line.endswith("\n")]
    child.stdout.close()
    child.wait()
    done = max([150, *reported])
    run = Run(path)
    found = counted(run)
    steps = {step for step, _ in found}
    assert set(range(done + 1)) <= steps <= set(range(done + 2))
    assert set(found.values()) == {1}
    assert len(found) == len(steps) * len(TENSORS)
    assert run.problems == {}
    compact(path)
    assert counted(Run(path)) == found


def test_a_batch_is_the_unit_of_writing(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "a", info())
    log.stats(stats_batch([0]))
    (wal,) = (tmp_path / "a" / "wal").glob("*.wal")
    size = wal.stat().st_size
    log.stats(stats_batch([1]))
    os.truncate(wal, size + (wal.stat().st_size - size) * 3 // 4)
    assert set(Run(tmp_path / "a").stats("weight")["step"]) == {0}
