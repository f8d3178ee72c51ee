"""What a writer does in the background: merging in tiers, roll-ups on disk, what keep="rollup" removes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_logs import TENSORS, info, row, values_at

from layerwatch.monitor import bins, compact, summarise, tiers
from layerwatch.monitor.compact import advance
from layerwatch.monitor.description import write_json
from layerwatch.monitor.parts import DamagedError, PartWriter, open_part, write_part
from layerwatch.monitor.reader import LogReader
from layerwatch.monitor.rollup import roll_up
from layerwatch.monitor.schema import FACTORS, SCHEMA_VERSION, SCHEMAS, SORT_KEYS, TABLES, rollup_table
from layerwatch.monitor.spans import Span, spans
from layerwatch.monitor.tiers import Part, due
from layerwatch.monitor.wal import WalWriter, batch_frame


@lru_cache(8)
def rows_of(first: int, last: int, session: int = 0) -> pa.RecordBatch:
    """Every tensor at captures `first` to `last` (not included) of a session; step = capture."""
    kinds = [summarise(values_at(s, t)) for s in range(10) for t in TENSORS]  # there are ten different ones
    rows = [
        {**row(c, t, "weight", kinds[c % 10 * len(TENSORS) + i]), "session": session, "capture": c}
        for c in range(first, last) for i, t in enumerate(TENSORS)
    ]  # fmt: skip
    return pa.RecordBatch.from_pylist(rows, TABLES["stats"])


def write_segment(run: Path, number: int, rows: pa.RecordBatch, writer: str = "r0") -> Span:
    """A finished write-ahead file."""
    span = Span(writer, number, number)
    (run / "wal").mkdir(parents=True, exist_ok=True)
    wal = WalWriter(run / "wal" / f"{span.stem}.wal", {"writer": writer})
    wal.write(batch_frame("stats", rows))
    wal.close()
    return span


def new_run(path: Path, **more: Any) -> Path:
    for table in TABLES:
        (path / table).mkdir(parents=True)
    write_json(
        path / "run.json", {"schema_version": SCHEMA_VERSION, "created": 0.0, "closed": True, **info(**more)}
    )
    return path


def log_of(path: Path, sizes: Sequence[int], keep: str = "full", session: int = 0, first: int = 1) -> Path:
    """A run that was written in segments of so many captures each."""
    if not path.exists():
        new_run(path, keep=keep)
    done = 0
    for number, size in enumerate(sizes, first):
        segment = write_segment(path, number, rows_of(done, done + size, session))
        done += size
        advance(path, "r0", [segment], session=session, complete=max(0, done - 2), keep=keep)
    return path


def table_of(run: Path, table: str) -> pa.Table:
    """All rows of a table's parts, sorted."""
    found = [open_part(p, table=table).read() for p in spans(run / table, ".parquet").values()]
    rows = pa.concat_tables([SCHEMAS[table].empty_table(), *(t.replace_schema_metadata(None) for t in found)])
    return rows.sort_by(SORT_KEYS[table]).combine_chunks()


def captures_in(run: Path) -> list[int]:
    """The captures that are there in full, in parts or write-ahead files, with repetitions."""
    rows = LogReader(run).table("stats", ["tensor", "capture"])
    of_one = np.array(rows["tensor"].to_pylist()) == TENSORS[0]
    return sorted(rows["capture"].to_numpy()[of_one].tolist())


def files(run: Path) -> dict[str, list[str]]:
    """The files of each folder."""
    return {
        p.name: sorted(f.name for f in p.iterdir()) for p in run.iterdir() if p.is_dir() and any(p.iterdir())
    }


def assert_levels(run: Path, captures: int, session: int = 0, *, over: bool = False) -> None:
    """Every level holds the bins that are complete, and they are what merging the rows gives; when the
    session is `over` also the last, partial bin of levels that have a complete one."""
    count = captures
    everything = pa.Table.from_batches([rows_of(0, captures, session)]).sort_by(SORT_KEYS["stats"])
    for factor in FACTORS:
        count = count // 16 + (over and count > 16 and count % 16 > 0)
        whole = everything.filter(np.less(everything["capture"].to_numpy(), count * factor))
        found = table_of(run, rollup_table(factor))
        found = found.filter(np.equal(found["session"].to_numpy(), session))
        wanted = roll_up(whole, factor)
        assert found.num_rows == wanted.num_rows == count * len(TENSORS)
        for name in found.column_names:
            if pa.types.is_floating(found.schema.field(name).type):  # added in another order
                np.testing.assert_allclose(
                    found[name].to_numpy(), wanted[name].to_numpy(), rtol=1e-12, atol=1e-9
                )
            else:
                assert found[name].to_pylist() == wanted[name].to_pylist(), (factor, name)


# Tiers ------------------------------------------------------------------------------------------------------


def test_segments_become_few_sorted_parts(tmp_path: Path) -> None:
    run = log_of(tmp_path / "a", [3] * 60)
    assert captures_in(run) == list(range(180))
    assert files(run)["stats"] == [
        "r0-000001-000057.parquet", "r0-000058.parquet", "r0-000059.parquet", "r0-000060.parquet",
    ]  # fmt: skip
    assert len(files(run)["scalars"]) < 16
    for name in files(run)["stats"]:
        part = pq.read_table(run / "stats" / name)
        assert part.sort_by(SORT_KEYS["stats"]).equals(part)
    assert "wal" not in files(run)
    before = table_of(run, "stats")
    assert compact(run) > 0
    assert files(run)["stats"] == ["r0-000001-000060.parquet"]
    assert table_of(run, "stats").equals(before)
    assert compact(run) == 0  # nothing is left to do


def described(rows: int, number: int, width: int = 1, captures: int = 1, *, usable: bool = True) -> Part:
    """A part of so many rows, of `width` segments from `number` on."""
    span = Span("r0", number, number + width - 1)
    return Part(span, Path("stats") / f"{span.stem}.parquet", 100, rows, {0: (0, captures - 1)}, usable)


@pytest.mark.parametrize(
    ("parts", "chosen"),
    [
        ([described(9, i) for i in range(7)], []),
        ([described(9, i) for i in range(8)], range(8)),
        ([described(9, i) for i in range(9)], range(8)),
        ([described(9_000, 0), *(described(9, i) for i in range(1, 9))], range(1, 9)),  # the small ones
        ([*(described(9, i) for i in range(7)), described(9_000, 7)], range(8)),
        ([*(described(9, i) for i in range(6)), described(9_000, 6)], []),
        ([described(9, i, usable=i != 3) for i in range(9)], []),  # never across one that is damaged
        ([described(9, i + (i > 3)) for i in range(8)], []),  # nor across a file that is missing
        ([described(9, i, captures=1025) for i in range(8)], []),  # more than half full
        ([described(9, i, captures=700) for i in range(8)], range(2)),  # a third one has no room
    ],
)
def test_which_parts_are_merged(parts: list[Part], chosen: Sequence[int]) -> None:
    assert due(parts) == [parts[i] for i in chosen]


def test_a_full_part_is_not_merged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "FULL_CAPTURES", 32)
    run = log_of(tmp_path / "a", [6] * 30)
    compact(run)
    held = [tiers._describe(p, "stats", s, 0, 0).width for s, p in spans(run / "stats", ".parquet").items()]
    assert sum(held) == 180
    assert all(16 < width <= 32 for width in held[:-1])
    assert captures_in(run) == list(range(180))


def test_a_part_that_turns_out_to_be_damaged_stays(tmp_path: Path) -> None:
    run = log_of(tmp_path / "a", [20] * 5)
    damaged = run / "stats" / "r0-000003.parquet"
    data = bytearray(damaged.read_bytes())
    data[200] ^= 4  # in a page: the footer is whole
    damaged.write_bytes(data)
    compact(run)
    assert files(run)["stats"] == [
        "r0-000001-000002.parquet", "r0-000003.parquet", "r0-000004-000005.parquet",
    ]  # fmt: skip
    assert damaged.read_bytes() == data
    with pytest.raises(DamagedError):
        open_part(damaged, table="stats").read()


def test_parts_of_other_writers_and_of_version_1_stay_as_they_are(tmp_path: Path, checkout: Path) -> None:
    run = tmp_path / "a"
    shutil.copytree(checkout / "tests" / "data" / "v1" / "closed", run)
    write_segment(run, 7, rows_of(0, 5), "r1")
    write_part(run, "stats", Span("r1", 1, 1), [rows_of(0, 5)])
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    segments = [
        write_segment(run, number, rows_of(20 * number, 20 * number + 20)) for number in range(10, 18)
    ]
    advance(run, "r0", segments, session=0, complete=300, keep="rollup")
    assert {p: p.read_bytes() for p in before} == before
    assert "r0-000010-000017.parquet" in files(run)["stats"]
    compact(run)
    assert [p for p in before if p.exists() and p.read_bytes() == before[p] and p.parent.name in TABLES]


# Roll-ups on disk -------------------------------------------------------------------------------------------


def test_every_level_is_written_as_captures_come_in(tmp_path: Path) -> None:
    sizes = [5, 200, 1, 2, 1000, 90, 3000, 17]
    run = log_of(tmp_path / "a", sizes)
    complete = sum(sizes) - 2
    assert files(run)["rollup16"][0] == "r0-s0-000000-000011.parquet"
    assert [len(files(run).get(rollup_table(f), [])) > 0 for f in FACTORS] == [True, True, True, False]
    assert_levels(run, complete)
    assert captures_in(run) == list(range(sum(sizes)))


def test_only_complete_bins_are_written(tmp_path: Path) -> None:
    run = new_run(tmp_path / "a")
    for number, (size, complete, expected) in enumerate(
        [(16, 14, 0), (1, 15, 0), (1, 16, 1), (30, 46, 2)], 1
    ):
        done = sum((16, 1, 1, 30)[: number - 1])
        segment = write_segment(run, number, rows_of(done, done + size))
        advance(run, "r0", [segment], session=0, complete=complete)
        assert table_of(run, "rollup16").num_rows == expected * len(TENSORS)
    compact(run)  # the session is over
    assert_levels(run, 48)


def test_sessions_are_rolled_up_apart(tmp_path: Path) -> None:
    run = log_of(tmp_path / "a", [50])
    log_of(run, [40, 30], session=1, first=2)
    assert_levels(run, 50, over=True)  # all its captures have come
    assert_levels(run, 68, session=1)
    assert files(run)["rollup16"] == [
        "r0-s0-000000-000002.parquet", "r0-s0-000003.parquet",
        "r0-s1-000000-000001.parquet", "r0-s1-000002-000003.parquet",
    ]  # fmt: skip
    compact(run)
    assert_levels(run, 70, session=1, over=True)
    assert files(run)["stats"] == ["r0-000001-000003.parquet"]
    assert files(run)["rollup16"] == ["r0-s0-000000-000003.parquet", "r0-s1-000000-000004.parquet"]


def test_a_log_without_roll_ups_gets_them(tmp_path: Path) -> None:
    run = new_run(tmp_path / "a")
    for number, first in enumerate(range(0, 600, 30), 1):
        write_segment(run, number, rows_of(first, first + 30))
    assert compact(run) >= 20
    assert_levels(run, 600, over=True)
    assert captures_in(run) == list(range(600))


def test_a_row_between_captures_counts_in_the_bin_of_the_one_before(tmp_path: Path) -> None:
    batch = rows_of(0, 20).to_pylist()
    between = [{**r, "kind": "gradient_norm", "step": r["step"] + 1} for r in batch]
    run = new_run(tmp_path / "a")
    segment = write_segment(run, 1, pa.RecordBatch.from_pylist([*batch, *between], TABLES["stats"]))
    advance(run, "r0", [segment], session=0, complete=16)
    found = table_of(run, "rollup16")
    assert found["kind"].to_pylist() == ["gradient_norm"] * 3 + ["weight"] * 3
    assert found["captures"].to_pylist() == [16] * 6
    assert found["last_step"].to_pylist() == [16] * 3 + [15] * 3


# What is kept -----------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept, and what is full, is much less than usual."""
    monkeypatch.setattr(bins, "KEPT", 64)
    monkeypatch.setattr(tiers, "FULL_CAPTURES", 32)


def held_bins(run: Path, factor: int, session: int = 0) -> list[int]:
    found = [s for s in spans(run / rollup_table(factor), ".parquet") if s.writer == f"r0-s{session}"]
    return [number for span in found for number in range(span.first, span.last + 1)]


@pytest.mark.usefixtures("small")
def test_old_rows_go_when_a_roll_up_holds_them(tmp_path: Path) -> None:
    run = log_of(tmp_path / "a", [120] * 25, keep="rollup")
    kept = captures_in(run)
    assert kept == list(range(kept[0], 3000))
    assert 64 <= len(kept) < 64 + 120
    fine, coarse = held_bins(run, 16), held_bins(run, 256)
    assert fine == list(range(fine[0], 187))
    assert 64 <= len(fine) < 64 + 32
    assert coarse == list(range(11))
    assert fine[0] * 16 <= kept[0]
    assert fine[0] <= 11 * 16  # no gap between the levels
    assert set(table_of(run, "rollup256")["captures"].to_pylist()) == {256}


@pytest.mark.usefixtures("small")
def test_nothing_is_removed_from_a_full_log(tmp_path: Path) -> None:
    run = log_of(tmp_path / "a", [60] * 10)
    compact(run)
    assert captures_in(run) == list(range(600))


@pytest.mark.usefixtures("small")
def test_the_compact_command_keeps_what_the_run_keeps(tmp_path: Path) -> None:
    run = new_run(tmp_path / "a", keep="rollup")
    for number, first in enumerate(range(0, 600, 30), 1):
        write_segment(run, number, rows_of(first, first + 30))
    compact(run)
    kept = captures_in(run)
    assert kept == list(range(kept[0], 600))
    assert 64 <= len(kept) < 64 + 60
    assert held_bins(run, 16) == list(range(38))


@pytest.mark.usefixtures("small")
def test_the_end_of_a_session_is_rolled_up_before_it_is_removed(tmp_path: Path) -> None:
    run = log_of(tmp_path / "a", [21, 20], keep="rollup")
    log_of(run, [40] * 5, keep="rollup", session=1, first=3)
    stats = table_of(run, "stats")
    assert set(stats["session"].to_pylist()) == {1}
    rolled = table_of(run, "rollup16").to_pylist()
    assert [r["captures"] for r in rolled if r["session"] == 0 and r["tensor"] == TENSORS[0]] == [16, 16, 9]


# Interruptions ----------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """The process dies here."""


@pytest.fixture
def die_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Interrupts the n-th rename, removal, synchronisation or Parquet file from now on."""
    places = [(os, "replace"), (os, "fsync"), (Path, "unlink"), (pq, "ParquetWriter")]
    real = [getattr(owner, name) for owner, name in places]

    def arm(number: int) -> None:
        calls = iter(range(number))

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def operation(*args: Any, **kwargs: Any) -> Any:
                if next(calls, None) is None:
                    raise Interrupted
                return original(*args, **kwargs)

            return operation

        for (owner, name), original in zip(places, real, strict=True):
            setattr(owner, name, wrap(original))

    def disarm() -> None:
        for (owner, name), original in zip(places, real, strict=True):
            setattr(owner, name, original)

    arm.disarm = disarm  # type: ignore[attr-defined]
    yield arm
    disarm()


def pending(path: Path) -> tuple[Path, list[Span]]:
    """A run with parts of several sizes, and segments that are to be worked off."""
    run = log_of(path, [30] * 7, keep="rollup")
    return run, [write_segment(run, 8 + i, rows_of(210 + 30 * i, 240 + 30 * i)) for i in range(3)]


def assert_whole(run: Path) -> None:
    """Every capture is there exactly once in full, or else in a roll-up."""
    kept = captures_in(run)
    assert kept == list(range(kept[0], 300))
    fine, coarse = held_bins(run, 16), held_bins(run, 256)
    assert kept[0] == 0 or kept[0] <= (fine[-1] + 1) * 16
    assert not fine or fine[0] == 0 or fine[0] <= len(coarse) * 16
    assert LogReader(run).problems == {}


@pytest.mark.usefixtures("small")
def test_interrupted_anywhere_it_loses_and_doubles_nothing(tmp_path: Path, die_at: Any) -> None:
    template, segments = pending(tmp_path / "template")
    finished = tmp_path / "finished"
    shutil.copytree(template, finished)
    advance(finished, "r0", segments, session=0, complete=298, keep="rollup")
    assert_whole(finished)
    assert captures_in(finished)[0] > 0
    number, completed = 0, False
    while not completed:
        run = tmp_path / f"run{number}"
        shutil.copytree(template, run)
        die_at(number)
        try:
            advance(run, "r0", segments, session=0, complete=298, keep="rollup")
            completed = True
        except Interrupted:
            pass
        die_at.disarm()
        assert_whole(run)
        advance(run, "r0", segments, session=0, complete=298, keep="rollup")  # the next attempt ends the work
        assert_whole(run)
        for table in ("stats", "rollup16"):
            assert table_of(run, table).equals(table_of(finished, table))
        shutil.rmtree(run)
        number += 9  # a sample; `make soak` kills real processes
    assert number > 60


@pytest.mark.usefixtures("small")
def test_it_stops_when_asked_and_goes_on_later(tmp_path: Path) -> None:
    template, segments = pending(tmp_path / "template")
    for number in range(200):
        run = tmp_path / f"run{number}"
        shutil.copytree(template, run)
        asked = iter([False] * (4 * number))
        stop = partial(next, asked, True)
        advance(run, "r0", segments, session=0, complete=298, keep="rollup", stop=stop)
        assert_whole(run)
        if next(asked, None) is not None:  # it was not stopped
            break
        advance(run, "r0", segments, session=0, complete=298, keep="rollup")
        assert_whole(run)
        assert not any((run / "wal").iterdir())
    else:
        pytest.fail("it never came to the end")
    assert number > 2


KILLED = """
import sys
from pathlib import Path
from layerwatch.monitor import bins, compact, tiers
bins.KEPT, tiers.FULL_CAPTURES = 64, 32
print("ready", flush=True)
sys.stdin.readline()
compact(Path(sys.argv[1]))
print("done", flush=True)
"""


def kill_at_random(
    template: Path, run: Path, rng: np.random.Generator, checkout: Path, longest: float
) -> bool:
    """Compact a copy in a process that is killed; whether it came to its end before."""
    shutil.copytree(template, run)
    command = [sys.executable, "-c", KILLED, str(run)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout)
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        child.stdout.readline()
        child.stdin.write("\n")
        child.stdin.flush()
        time.sleep(rng.random() * longest)
        child.kill()
        return "done" in child.stdout.read()


def check_kills(tmp_path: Path, checkout: Path, kills: int) -> int:
    """How often the process was killed before its end; nothing is lost whenever it was."""
    template, _ = pending(tmp_path / "template")
    rng = np.random.default_rng(kills)
    in_the_middle = 0
    for number in range(kills):
        run = tmp_path / f"run{number}"
        in_the_middle += not kill_at_random(template, run, rng, checkout, 0.4)
        assert_whole(run)
        compact(run)
        assert_whole(run)
        assert not [p for p in run.rglob("*") if p.name.startswith(".")]
        shutil.rmtree(run)
    return in_the_middle


@pytest.mark.usefixtures("small")
def test_killed_while_it_compacts(tmp_path: Path, checkout: Path) -> None:
    check_kills(tmp_path, checkout, 2)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("small")
def test_killed_a_hundred_times_while_it_compacts(tmp_path: Path, checkout: Path) -> None:
    assert check_kills(tmp_path, checkout, 100) > 10


# Memory -----------------------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
from layerwatch.monitor import compact
compact(Path(sys.argv[1]))
(peak,) = [l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")]
print(peak)
"""


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_memory_does_not_grow_with_the_run(tmp_path: Path, checkout: Path) -> None:
    big = pa.concat_tables([pa.Table.from_batches([rows_of(0, 3000)])] * 10).sort_by(SORT_KEYS["stats"])
    run = new_run(tmp_path / "a")
    for number in range(1, 17):
        with PartWriter(run / "stats" / f"r0-{number:06d}.parquet", "stats") as part:
            part.write(big)
    command = [sys.executable, "-c", PEAK, str(run)]
    peak = subprocess.run(command, check=True, capture_output=True, text=True, cwd=checkout).stdout
    assert int(peak) < 300 * 1024
