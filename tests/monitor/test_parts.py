"""Parquet parts: what any reader sees, and what a checksum sees."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_logs import TENSORS, make_run, stats_batch

from layerwatch.monitor.parts import DamagedError, PartWriter, open_part, write_part
from layerwatch.monitor.schema import SORT_KEYS, TABLES
from layerwatch.monitor.spans import Span


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
    of = {meta.row_group(0).column(i).path_in_schema: meta.row_group(0).column(i) for i in range(30)}
    assert of["counts.list.element"].compression == of["sum"].compression == "ZSTD"
    assert of["step"].compression == "UNCOMPRESSED"


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


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """A part of a few rows."""
    (tmp_path / "stats").mkdir()
    return write_part(tmp_path, "stats", Span("r0", 1, 1), [stats_batch([0, 1, 2])])


def test_a_part_reads_as_it_was_written(part: Path) -> None:
    rows = open_part(part, table="stats").read()
    assert rows.equals(pq.read_table(part))
    assert rows["step"].to_pylist() == [0, 1, 2] * len(TENSORS)
    assert [p.name for p in part.parent.iterdir()] == ["r0-000001.parquet"]
    with pa.memory_map(str(part)) as file:  # any file that can be read at any place
        assert open_part(file, table="stats").read().equals(rows)


def test_a_flipped_bit_anywhere_is_noticed(part: Path) -> None:
    data = part.read_bytes()
    for place in range(4, len(data), 3):  # the magic before them is no part of the content
        part.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        with pytest.raises(DamagedError):
            open_part(part, table="stats").read()


def test_a_part_that_is_cut_short_is_noticed(part: Path) -> None:
    data = part.read_bytes()
    for size in range(0, len(data), 7):
        part.write_bytes(data[:size])
        with pytest.raises(DamagedError):
            open_part(part, table="stats").read()


def test_a_part_of_another_table_or_a_newer_version_is_not_read(part: Path, tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="expected the columns of scalars, found step, time, tensor"):
        open_part(part, table="scalars")
    newer = pq.read_table(part).replace_schema_metadata({"layerwatch_schema_version": "99"})
    pq.write_table(newer, part)
    with pytest.raises(DamagedError, match=r"of log format 99, this layerwatch reads up to \d+: upgrade"):
        open_part(part, table="stats")


def test_an_error_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    def write() -> None:
        with PartWriter(tmp_path / "r0-000001.parquet", "scalars") as writer:
            writer.write(TABLES["scalars"].empty_table())
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert not list(tmp_path.iterdir())
