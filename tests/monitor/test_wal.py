"""Frames of the write-ahead file: torn, flipped, followed while they are written."""

from __future__ import annotations

import json
import os
import random
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_logs import TENSORS, stats_batch

from layerwatch.monitor import SCHEMA_VERSION
from layerwatch.monitor.schema import TABLES, upgrade
from layerwatch.monitor.wal import MAGIC, WalReader, WalWriter, batch_frame, encode, rows_frame

HEAD = 13  # bytes before a payload


def write(path: Path, steps: int = 4, tensors: int = 3) -> list[int]:
    """A file with a stats and a scalars frame per step; returns where each frame ends, the header's first."""
    writer = WalWriter(path, {"writer": "r0"})
    ends = [writer.size]
    for step in range(steps):
        writer.write(batch_frame("stats", upgrade(stats_batch([step])[:tensors], "stats")))
        ends.append(writer.size)
        writer.write(rows_frame("scalars", [[step, 0.5, "train_loss", float(step), 0]]))
        ends.append(writer.size)
    writer.close()
    return ends


def rows(reader: WalReader, table: str = "scalars") -> list[int]:
    return [step for batch in reader.tables[table] for step in batch["step"].to_pylist()]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.wal")
    reader = WalReader(tmp_path / "a.wal")
    assert reader.read()
    assert rows(reader) == [0, 1, 2, 3]
    assert rows(reader, "stats") == [s for s in range(4) for _ in TENSORS]
    assert (
        pa.Table.from_batches(reader.tables["stats"])
        .to_batches()[1]
        .equals(upgrade(stats_batch([1]), "stats"))
    )
    assert reader.damaged == 0
    assert not reader.read()


def test_a_file_cut_at_every_byte_gives_every_whole_frame(tmp_path: Path) -> None:
    ends = write(tmp_path / "whole.wal", steps=1, tensors=1)
    data = (tmp_path / "whole.wal").read_bytes()
    assert ends[-1] == len(data)
    cut = tmp_path / "cut.wal"
    for size in range(len(data) + 1):
        cut.write_bytes(data[:size])
        reader = WalReader(cut)
        reader.read()
        whole = sum(end <= size for end in ends)
        found = 1 + sum(map(len, reader.tables.values())) if size >= ends[0] else 0
        assert found == whole, size
        assert reader.damaged == 0, size
        with cut.open("ab") as file:  # the writer goes on
            file.write(data[size:])
        reader.read()
        assert rows(reader) == [0], size


def test_a_flipped_byte_costs_its_own_frame_only(tmp_path: Path) -> None:
    ends = write(tmp_path / "a.wal")
    data = (tmp_path / "a.wal").read_bytes()
    rng = random.Random(0)
    for position in [*range(ends[0], ends[0] + HEAD), *rng.sample(range(ends[0], ends[-1]), 150)]:
        broken = bytearray(data)
        broken[position] ^= 1 << rng.randrange(8)
        (tmp_path / "a.wal").write_bytes(broken)
        reader = WalReader(tmp_path / "a.wal")
        reader.read()
        hit = sum(end <= position for end in ends) - 1  # number of the frame, the header not counted
        lost_scalar = {hit // 2} if hit % 2 else set()
        lost_stats = set() if hit % 2 else {hit // 2}
        assert set(rows(reader)) == set(range(4)) - lost_scalar, position
        assert set(rows(reader, "stats")) == set(range(4)) - lost_stats, position
        if hit < 2 * 4 - 1:  # damage in the last frame looks like a tail that is still being written
            assert reader.damaged == ends[hit + 1] - ends[hit], position


def test_random_garbage_is_survived(tmp_path: Path) -> None:
    write(tmp_path / "a.wal")
    data = (tmp_path / "a.wal").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(50):
        start, stop = np.sort(rng.integers(0, len(data), 2))
        broken = data[:start] + rng.bytes(int(rng.integers(0, 400))) + data[stop:]
        (tmp_path / "a.wal").write_bytes(broken)
        reader = WalReader(tmp_path / "a.wal")
        reader.read()
        assert set(rows(reader)) <= {0, 1, 2, 3}
        assert len(rows(reader)) == len(set(rows(reader)))


def test_the_magic_inside_a_payload_is_data(tmp_path: Path) -> None:
    """Also right behind a torn frame, where the reader searches for the next one."""
    tricky = b"".join(encode(("scalars", json.dumps([[7, 0.0, "forged", 1.0, 0]]).encode())))
    batch = pa.RecordBatch.from_pylist(
        [
            {
                "step": 0,
                "time": 0.0,
                "tensor": MAGIC.decode() * 5,
                "kind": "weight",
                "values": [1.0],
                "session": 0,
            }
        ],
        TABLES["values"],
    )
    writer = WalWriter(tmp_path / "a.wal", {})
    before = writer.size
    writer.write(batch_frame("values", batch))
    writer.write(rows_frame("events", [[1, 0.0, MAGIC.decode(), tricky.decode("latin-1"), 0]]))
    writer.write(rows_frame("scalars", [[1, 0.0, MAGIC.decode(), 1.0, 0]]))
    writer.close()
    reader = WalReader(tmp_path / "a.wal")
    reader.read()
    assert rows(reader) == [1]
    assert reader.tables["events"][0]["message"].to_pylist() == [tricky.decode("latin-1")]
    assert reader.damaged == 0

    data = bytearray((tmp_path / "a.wal").read_bytes())
    data[before + HEAD + 40] ^= 0xFF  # the first payload no longer matches its checksum
    (tmp_path / "a.wal").write_bytes(data)
    reader = WalReader(tmp_path / "a.wal")
    reader.read()
    assert rows(reader) == [1]
    assert reader.tables["values"] == []
    assert reader.damaged > 0


def test_a_reader_follows_a_writer_and_never_sees_half_a_frame(tmp_path: Path) -> None:
    writer = WalWriter(tmp_path / "a.wal", {})
    steps = 300
    batches = [upgrade(stats_batch([s] * 20), "stats") for s in range(3)]

    def work() -> None:
        for step in range(steps):
            writer.write(batch_frame("stats", batches[step % 3]))
            writer.write(rows_frame("scalars", [[step, 0.0, "loss", 0.0, 0]]))

    thread = threading.Thread(target=work)
    reader = WalReader(tmp_path / "a.wal")
    thread.start()
    while thread.is_alive():
        reader.read()
        # The stats frame of a step comes first: its scalars are never there without it.
        assert (
            len(reader.tables["scalars"]) <= len(reader.tables["stats"]) <= len(reader.tables["scalars"]) + 1
        )
    thread.join()
    reader.read()
    assert rows(reader) == list(range(steps))
    assert all(b.num_rows == 20 * len(TENSORS) for b in reader.tables["stats"])
    assert reader.damaged == 0


def test_a_write_that_the_system_cuts_short_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(os, "writev", lambda fd, pieces: real(fd, b"".join(pieces)[:100]))
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    ends = write(tmp_path / "a.wal")
    reader = WalReader(tmp_path / "a.wal")
    reader.read()
    assert rows(reader) == [0, 1, 2, 3]
    assert ends[-1] == (tmp_path / "a.wal").stat().st_size


def test_a_missing_file_is_no_news(tmp_path: Path) -> None:
    assert not WalReader(tmp_path / "gone.wal").read()


def test_a_frame_of_a_newer_layerwatch_is_reported_not_guessed(tmp_path: Path) -> None:
    header = b"".join(encode(("header", json.dumps({"schema_version": SCHEMA_VERSION + 1}).encode())))
    scalars = b"".join(encode(("scalars", json.dumps([[0, 0.0, "loss", 1.0, 0]]).encode())))
    (tmp_path / "a.wal").write_bytes(header + scalars)
    reader = WalReader(tmp_path / "a.wal")
    reader.read()
    assert reader.newer
    assert rows(reader) == []
    assert not reader.read()


def test_an_existing_file_is_never_appended_to(tmp_path: Path) -> None:
    write(tmp_path / "a.wal")
    with pytest.raises(FileExistsError):
        WalWriter(tmp_path / "a.wal", {})


def test_a_group_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    """Cut at every byte: the rows of a capture's tables appear together."""
    writer = WalWriter(tmp_path / "a.wal", {})
    stats, loss = upgrade(stats_batch([0])[:1], "stats"), [[0, 0.0, "loss", 1.0, 0]]
    writer.write(batch_frame("stats", stats), rows_frame("scalars", loss))
    writer.close()
    data = (tmp_path / "a.wal").read_bytes()
    for size in range(len(data) + 1):
        (tmp_path / "a.wal").write_bytes(data[:size])
        reader = WalReader(tmp_path / "a.wal")
        reader.read()
        whole = size == len(data)
        assert (rows(reader, "stats"), rows(reader)) == (([0], [0]) if whole else ([], [])), size


def test_a_frame_that_does_not_fit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = WalWriter(tmp_path / "a.wal", {})
    writer.write(rows_frame("scalars", [[0, 0.0, "loss", 1.0, 0]]))
    before, real = (tmp_path / "a.wal").read_bytes(), os.write

    def first(descriptor: int, pieces: list[bytes]) -> int:
        return real(descriptor, b"".join(pieces)[:10])

    def then(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "writev", first)
    monkeypatch.setattr(os, "write", then)
    with pytest.raises(OSError, match="No space"):
        writer.write(rows_frame("scalars", [[1, 0.0, "loss", 1.0, 0]]))
    monkeypatch.undo()
    assert (tmp_path / "a.wal").read_bytes() == before
    writer.write(rows_frame("scalars", [[2, 0.0, "loss", 1.0, 0]]))
    reader = WalReader(tmp_path / "a.wal")
    reader.read()
    assert rows(reader) == [0, 2]
    assert reader.damaged == 0
