"""Bytes that change under a log: what is read is what was written, or the file is named as damaged."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_logs import TENSORS, make_run, restarted_run
from rights import without_rights

from layerwatch.monitor import Run, RunError
from layerwatch.monitor.reader import LogReader
from layerwatch.monitor.schema import TABLES
from layerwatch.monitor.wal import WalReader

NAMED = (*TABLES, "rollup16")
Truth = dict[str, set[str]]


def rows_of(log: LogReader) -> Truth:
    """Every row of every table, as text."""
    return {name: {repr(row) for row in log.table(name).to_pylist()} for name in NAMED}


class Original:
    """A run before anything happened to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        self.content = {name: (path / name).read_bytes() for name in self.files}
        self.shown = rows_of(LogReader(path))
        # With its start lost, a session's first steps may show what they superseded.
        self.written = rows_of(LogReader(path))
        for session in Run(path).sessions()["session"]:
            for name, rows in rows_of(LogReader(path, session)).items():
                self.written[name] |= rows
        run = Run(path)
        self.info = run.info
        self.overview = run.overview("weight", max_points=8)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    found = Original(restarted_run(tmp_path_factory.mktemp("damage") / "a", first=36, upto=40))
    folders = {Path(name).parts[0] for name in found.files}
    assert folders >= {"wal", *NAMED, "run.json"}
    return found


def check(original: Original, name: str) -> bool:
    """Reads everything of a run one of whose files was changed; returns whether that was noticed."""
    run = Run(original.path)
    served = rows_of(run._log)
    for table, rows in served.items():
        assert rows <= original.written[table], (name, table)
    frame = run.stats("update")
    assert np.isfinite(frame["norm"]).all()
    seen = run.overview("weight", max_points=8)
    for read in (run.tensors, run.events, run.sessions, run.kinds):
        read()
    run.scalars("lr")
    run.values("0.bias")
    problems = run.problems
    assert set(problems) <= {name}, problems
    if not problems:
        assert served == original.shown, name
        assert run.info == original.info, name
    if not problems or name.startswith("rollup"):
        assert same(seen, original.overview), name
    return bool(problems)


def same(a: tuple, b: tuple) -> bool:
    return all(
        list(x) == list(y) if isinstance(x, list) else np.allclose(x, y, rtol=1e-12, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def is_an_earlier_state(original: Original, name: str, data: bytes) -> bool:
    """A write-ahead file cut between two frames is what it was at an earlier moment."""
    return name.startswith("wal/") and original.content[name].startswith(data) and data != b""


@contextlib.contextmanager
def changed(original: Original, name: str, data: bytes) -> Iterator[None]:
    path = original.path / name
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(original.content[name])


Change = Callable[[bytes], bytes]


@st.composite
def changes(draw: st.DrawFn) -> tuple[int, Change]:
    """Which file, and what happens to its bytes."""
    file = draw(st.integers(0, 1 << 16))
    where = draw(st.floats(0, 1, exclude_max=True))
    length = draw(st.integers(1, 64))
    noise = draw(st.binary(min_size=1, max_size=64))
    bit = draw(st.integers(0, 7))

    def flip(data: bytes) -> bytes:
        at = int(where * len(data))
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]

    def overwrite(data: bytes) -> bytes:
        at = int(where * len(data))
        return (data[:at] + noise + data[at + len(noise) :])[: len(data)]

    kinds: list[Change] = [
        flip,
        flip,
        overwrite,
        lambda d: d[: int(where * len(d))],  # cut
        lambda d: d[: int(where * len(d))] + d[int(where * len(d)) + length :],  # a piece is missing
        lambda d: d[: int(where * len(d))] + noise + d[int(where * len(d)) :],  # a piece came in
        lambda d: d[: int(where * len(d))] + bytes(length) + d[int(where * len(d)) + length :],  # zeroed
        lambda d: d + noise,
    ]
    return file, draw(st.sampled_from(kinds))


def mutate(original: Original, change: tuple[int, Change], counts: dict[str, int]) -> None:
    number, kind = change
    name = original.files[number % len(original.files)]
    data = kind(original.content[name])
    if data == original.content[name]:
        return
    with changed(original, name, data):
        if is_an_earlier_state(original, name, data):
            reader = WalReader(original.path / name)
            reader.read()
            torn = reader.tail > 0 or reader.offset == 0
            assert set(Run(original.path).problems) == ({name} if torn else set())
            served = rows_of(LogReader(original.path))
            assert all(served[table] <= original.written[table] for table in served)
        else:
            counts["noticed" if check(original, name) else "harmless"] += 1


COUNTS = {"noticed": 0, "harmless": 0}
quietly = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=120, derandomize=True, **quietly)
@given(change=changes())
def test_changed_bytes_are_named_or_change_nothing(original: Original, change: tuple[int, Change]) -> None:
    mutate(original, change, COUNTS)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_thousands_of_changes(original: Original) -> None:
    counts = {"noticed": 0, "harmless": 0}

    @settings(max_examples=5000, **quietly)
    @given(change=changes())
    def run(change: tuple[int, Change]) -> None:
        mutate(original, change, counts)

    run()
    assert counts["noticed"] > 3000, counts
    # Nobody looks at the `PAR1` at the beginning of a part, where many changes begin.
    assert counts["harmless"] < counts["noticed"] / 5, counts


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_bit_of_a_part(original: Original) -> None:
    """Footer, page headers, pages: nothing is served that was not written."""
    name = next(n for n in original.files if n.startswith("scalars/"))
    data, noticed = original.content[name], 0
    for position in range(8 * len(data)):
        broken = bytearray(data)
        broken[position // 8] ^= 1 << position % 8
        with changed(original, name, bytes(broken)):
            log = LogReader(original.path)
            served = {repr(row) for row in log.table("scalars").to_pylist()}
            assert served <= original.written["scalars"], position
            assert log.problems or served == original.shown["scalars"], position
            noticed += bool(log.problems)
    assert noticed >= 8 * (len(data) - 4)  # `PAR1` at the beginning is not looked at


def test_every_file_emptied_or_replaced_by_a_folder(original: Original) -> None:
    for name in original.files:
        with changed(original, name, b""):
            assert check(original, name), name
        path = original.path / name
        path.unlink()
        path.mkdir()
        try:
            assert check(original, name), name
        finally:
            path.rmdir()
            path.write_bytes(original.content[name])


def test_a_folder_of_the_log_replaced_by_a_file(tmp_path: Path) -> None:
    for folder in ("stats", "wal", "events", "rollup16"):
        path = restarted_run(tmp_path / folder)
        shutil.rmtree(path / folder)
        (path / folder).write_text("mine")
        run = Run(path)
        run.stats("weight")
        run.overview("weight")
        run.events()
        assert list(run.problems) == [folder]
        assert run.scalars("lr")["step"].tolist() == list(range(60 if folder != "wal" else 40))


def test_files_that_may_not_be_read_are_named() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = restarted_run(Path(folder) / "a")
        whole = Run(path).stats("weight", columns=["step", "norm"])
        names = sorted(p for p in path.rglob("*") if p.is_file())
        for file in [*names, path / "stats", path / "wal"]:
            mode = file.stat().st_mode
            file.chmod(0)
            try:
                with without_rights():
                    run = Run(path)
                    shown = run.stats("weight", columns=["step", "norm"])
                    run.overview("weight", max_points=8)
                    run.scalars("lr")
                    run.values("0.bias")
                assert list(run.problems) == [file.relative_to(path).as_posix()]
                assert len(shown) <= len(whole)
                if file.parent.name not in ("stats", "wal", "a"):
                    assert shown.equals(whole)
            finally:
                file.chmod(mode)


def test_foreign_files_in_the_way(original: Original) -> None:
    """Names that are none of ours are left alone; a file with a name of ours is read, and named."""
    foreign = ["stats/notes.parquet", "wal/old.txt", "stats/.r0-000007.parquet.tmp", "notes.md"]
    for name in foreign:
        (original.path / name).write_text("mine")
    try:
        assert not check(original, "nothing")
        for name in ("stats/r0-000900.parquet", "wal/r9-000001.wal", "rollup16/r0-s7-000000.parquet"):
            (original.path / name).write_text("mine, too")
            try:
                assert check(original, name), name
            finally:
                (original.path / name).unlink()
        part = next(n for n in original.files if n.startswith("stats/"))
        with changed(original, part, original.content[next(n for n in original.files if "scalars/" in n)]):
            assert check(original, part)  # a part of another table
    finally:
        for name in foreign:
            (original.path / name).unlink()


def test_damage_costs_only_its_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwatch.monitor.parts.ROW_GROUP", 20)
    path = make_run(tmp_path / "a", 40)
    (part,) = (path / "stats").glob("*.parquet")
    data = bytearray(part.read_bytes())
    data[len(data) // 4] ^= 1
    part.write_bytes(data)
    run = Run(path)
    assert 3 * 40 - 25 < len(run.stats("weight")) < 3 * 40
    assert list(run.problems) == [f"stats/{part.name}"]
    assert "\n" not in run.problems[f"stats/{part.name}"]


def test_a_damaged_roll_up_is_replaced_by_finer_rows(original: Original) -> None:
    name = next(n for n in original.files if n.startswith("rollup16/"))
    whole = Run(original.path).stats("weight", max_points=8)
    with changed(original, name, original.content[name][:-1]):
        run = Run(original.path)
        pd.testing.assert_frame_equal(run.stats("weight", max_points=8), whole, rtol=1e-12)
        assert list(run.problems) == [name]


def test_nothing_but_damage_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.json").write_text("{")
    with pytest.raises(RunError, match="is damaged, and there are no tables") as caught:
        Run(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_detectors_read_a_run_without_its_description(original: Original) -> None:
    with changed(original, "run.json", b"\0" * 100):
        run = Run(original.path)
        run.findings()
        assert any(note.startswith("run.json:") for note in run.notes())
        assert run.tensors()["tensor"].tolist() == sorted(TENSORS)
