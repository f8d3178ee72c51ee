"""docs/log-format.md: complete, and its own queries run on a real log and agree with `Run`."""

from __future__ import annotations

import inspect
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from layerwatch import Run, Watcher, watch
from layerwatch.hooks import values
from layerwatch.monitor import KINDS, SCHEMA_VERSION, bucket_edges
from layerwatch.monitor import log as log_module
from layerwatch.monitor.bins import KEPT
from layerwatch.monitor.reader import LogReader
from layerwatch.monitor.rebin import NEAR_ZERO
from layerwatch.monitor.schema import ROLLUPS, SCHEMAS, TABLES
from layerwatch.monitor.summary import bucket_of
from layerwatch.monitor.tiers import FULL_CAPTURES
from layerwatch.monitor.wal import _CODES, _HEAD, MAGIC, encode

TYPES = {
    pa.int32(): "int32",
    pa.int64(): "int64",
    pa.float64(): "float64",
    pa.string(): "string",
    pa.bool_(): "bool",
    pa.binary(): "binary",
    pa.list_(pa.int16()): "list of int16",
    pa.list_(pa.int64()): "list of int64",
    pa.list_(pa.float64()): "list of float64",
}


@pytest.fixture(scope="module")
def page(checkout: Path) -> str:
    return (checkout / "docs" / "log-format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real training in runs/exp1: 40 steps, then resumed from step 25 and 50 long."""
    folder = tmp_path_factory.mktemp("page")
    train(folder / "runs" / "exp1", 40)
    train(folder / "runs" / "exp1", 25, resume=25)
    return folder


def train(run: Path, steps: int, *, resume: int | bool = False, close: bool = True) -> Watcher:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    watcher = watch(model, optimizer, run=run, every=1, resume=resume)
    for _ in range(steps):
        loss = model(torch.randn(32, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        watcher.log(train_loss=loss)
    if close:
        watcher.close()
    return watcher


def section(page: str, title: str) -> str:
    """The text below a heading, up to the next one of the same level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


# Completeness -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
def test_every_column_is_documented_with_its_type_and_nothing_else(page: str, table: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\w ]+) \| (.+) \|$", section(page, table), re.MULTILINE)
    assert [(name, kind) for name, kind, _ in rows] == [(f.name, TYPES[f.type]) for f in TABLES[table]]
    assert all(len(text) > 3 for *_, text in rows)


def test_the_columns_of_roll_ups_are_documented(page: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\w ]+) \| (.+) \|$", section(page, "Roll-ups"), re.MULTILINE)
    more = [f for f in SCHEMAS["rollup16"] if f.name not in TABLES["stats"].names]
    assert [(name, kind) for name, kind, _ in rows] == [(f.name, TYPES[f.type]) for f in more]
    for name in ROLLUPS:
        assert f"`{name}`" in section(page, "Roll-ups")


def test_the_checksums_of_a_part_are_as_the_page_says(root: Path) -> None:
    (part,) = (root / "runs" / "exp1" / "stats").glob("*.parquet")
    data = part.read_bytes()
    magic, checksum, length = struct.unpack_from("<4sII", data, 4)
    assert (data[:4], magic) == (b"PAR1", b"LWC1")
    tail = data[-length:]
    assert zlib.crc32(tail) == checksum
    footer = pq.read_metadata(part)
    for n in range(footer.num_row_groups * footer.num_columns):
        offset, size, expected = struct.unpack_from("<QII", tail, 16 * n)
        column = footer.row_group(n // footer.num_columns).column(n % footer.num_columns)
        assert size == column.total_compressed_size
        assert zlib.crc32(data[offset : offset + size]) == expected


def test_kinds_states_and_events_are_documented(page: str) -> None:
    for kind in KINDS:
        assert f"`{kind}`" in section(page, "stats"), kind
    for state in ("trainable", "frozen", "unused", "zero_gradient", "no_optimizer", "lr_zero"):
        assert f"`{state}`" in section(page, "stats"), state
    for stage in ("before_clip", "at_step"):
        assert f"`{stage}`" in section(page, "stats"), stage


def test_what_a_real_run_holds_is_documented(page: str, root: Path) -> None:
    run = Run(root / "runs" / "exp1")
    text = section(page, "run.json")
    for key in run.info:
        assert f"`{key}`" in text, key
    for key in {k for entry in run.info["tensors"] + run.info["modules"] for k in entry}:
        assert f"`{key}`" in text, key
    for scalar in set(run.scalar_names()) - {"train_loss"}:
        assert f"`{scalar}`" in section(page, "scalars"), scalar
    for event in run.events()["event"]:
        assert f"`{event}`" in section(page, "events"), event
    names = {p.name for p in run.path.iterdir()}
    assert names == {"run.json", "wal", *TABLES, "rollup16"}
    for name in names | {"errors.log", "damaged", *SCHEMAS}:
        assert name in page, name


def test_constants_on_the_page_are_those_of_the_code(page: str) -> None:
    assert f"Format version: {SCHEMA_VERSION} " in page
    assert f"{log_module.SEGMENT_BYTES >> 20} MB" in page
    assert f"{log_module.SEGMENT_SECONDS:.0f} seconds" in page
    assert f"{values.MAX_ELEMENTS:,} elements" in page
    assert f"{FULL_CAPTURES:,} captures" in section(page, "Write-ahead files and parts")
    assert f"{KEPT:,} captures" in section(page, "Roll-ups")
    seconds = inspect.signature(watch).parameters["sync_seconds"].default
    assert f"last {seconds:.0f} seconds" in section(page, "What is guaranteed")
    assert f"between 0 and {NEAR_ZERO:g}" in section(page, "Imported from TensorBoard")
    frames = section(page, "Write-ahead files and parts")
    assert f"`{MAGIC.decode()}`" in frames
    for name, code in _CODES.items():
        assert f"{code} {name}" in frames
    assert _HEAD.size == 4 + 1 + 4 + 4


def test_the_formula_of_the_buckets() -> None:
    x = np.concatenate([np.random.default_rng(0).standard_normal(500) * 10.0**k for k in range(-30, 30, 7)])
    e = np.floor(np.log2(np.abs(x)))
    j = np.floor((np.abs(x) / 2.0**e - 1) * 4)
    assert (np.sign(x) * (4 * (e + 127) + j)).astype(int).tolist() == bucket_of(x).tolist()
    assert [float(edge[0]) for edge in bucket_edges(np.array([508]))] == [1.0, 1.25]


# The queries ------------------------------------------------------------------------------------------------


@pytest.fixture
def here(root: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run, from the folder in which the page's queries are meant to run."""
    monkeypatch.chdir(root)
    run = Run("runs/exp1")
    assert run.sessions()["superseded_from"].tolist()[:1] == [25]
    return run


def test_the_sql_queries(page: str, here: Run) -> None:
    with duckdb.connect() as connection:
        view, *queries = blocks(page, "sql")
        connection.execute(view)
        norms, ratios, histogram, split, half, _ = (connection.execute(query).df() for query in queries)
    weights = here.stats("weight").sort_values(["tensor", "step"], ignore_index=True)
    assert len(norms) == 4 * 50  # 40 steps of the first session are 25 that count
    pd.testing.assert_frame_equal(
        norms[["tensor", "step", "norm"]], weights[["tensor", "step", "norm"]], check_dtype=False
    )
    wanted = here.stats("update").groupby("tensor")["ratio"].max()
    assert dict(zip(ratios["tensor"], ratios["ratio"], strict=True)) == pytest.approx(wanted.to_dict())
    mine = here.histograms("gradient", "0.weight")
    mine = mine[mine["low"] < mine["high"]].reset_index(drop=True)
    assert histogram["step"].tolist() == mine["step"].tolist()
    assert histogram["elements"].tolist() == mine["count"].tolist()
    assert histogram["low"].tolist() == pytest.approx(mine["low"].tolist())
    assert histogram["high"].tolist() == pytest.approx(mine["high"].tolist())
    updates = here.stats("update").sort_values(["tensor", "step"])
    for column in ("parallel", "perpendicular"):
        assert split[column].tolist() == pytest.approx(updates[column].tolist(), abs=1e-12)
    gradients = here.stats("gradient").sort_values(["tensor", "step"])
    assert half["underflow"].tolist() == pytest.approx(gradients["underflow"].tolist())


def test_the_query_of_roll_ups(page: str, here: Run) -> None:
    found = duckdb.execute(blocks(page, "sql")[-1]).df()
    for session, first, captures in ((0, 0, [16, 16, 8]), (1, 25, [16, 9])):
        norms = Run("runs/exp1", session=session).stats("gradient", "0.weight").set_index("step")["norm"]
        mine = found[(found["session"] == session) & (found["tensor"] == "0.weight")]
        assert mine["captures"].tolist() == captures
        for row in mine.to_dict("records"):
            own = norms[(norms.index >= max(row["step"], first)) & (norms.index <= row["last_step"])]
            assert row["norm"] == pytest.approx(np.sqrt(np.square(own).mean()))
            assert row["highest"] == pytest.approx(own.max())


def test_the_python_queries(page: str, here: Run) -> None:
    by_polars, by_pandas, _ = blocks(page, "python")
    found: dict[str, Any] = {}
    exec(by_polars, found)
    drift = here.drift().sort_values(["tensor", "step"])
    assert found["result"]["tensor"].to_list() == drift["tensor"].tolist()
    assert found["result"]["relative_l2"].to_list() == pytest.approx(drift["relative_l2"].tolist())
    assert max(found["result"]["relative_l2"]) > 0
    found = {}
    exec(by_pandas, found)
    gradients = here.stats("gradient").sort_values(["tensor", "step"])
    for column in ("mean", "std"):
        assert found["result"][column].tolist() == pytest.approx(gradients[column].tolist(), abs=1e-12)
    assert found["loss"].tolist() == here.scalars("train_loss")["value"].tolist()
    assert len(found["loss"]) == 50


def test_the_reader_of_write_ahead_files(page: str, tmp_path: Path) -> None:
    """It gives the rows of a live run, all of them."""
    watcher = train(tmp_path / "live", 7, close=False)
    try:
        found: dict[str, Any] = {}
        exec(blocks(page, "python")[-1], found)
        (wal,) = (tmp_path / "live" / "wal").iterdir()
        mine = found["read_wal"](str(wal))
        log = LogReader(tmp_path / "live")
        for number, table in enumerate(TABLES, 1):
            theirs = log.table(table)
            assert theirs.num_rows > 0
            assert mine[number].cast(theirs.schema).to_pylist() == theirs.to_pylist()
        assert mine[1]["step"].to_pylist()[-1] == 6
        whole = wal.read_bytes()
        copy = tmp_path / "copy.wal"
        copy.write_bytes(whole[:-20])  # torn
        assert found["read_wal"](str(copy))[1].num_rows <= mine[1].num_rows
        places = [m.start() for m in re.finditer(b"LWF1", whole)]
        copy.write_bytes(whole[: places[3] + 20] + b"\xff" + whole[places[3] + 21 :])  # flipped
        lost = sum(t.num_rows for t in mine.values()) - sum(
            t.num_rows for t in found["read_wal"](str(copy)).values()
        )
        assert 0 < lost < sum(t.num_rows for t in mine.values()) / 2
        copy.write_bytes(b"".join(map(bytes, encode(("header", b'{"schema_version": 3}')))))
        with pytest.raises(ValueError, match="another format version"):
            found["read_wal"](str(copy))
    finally:
        watcher.close()


def test_every_code_block_was_run(page: str) -> None:
    assert len(blocks(page, "sql")) == 7
    assert len(blocks(page, "python")) == 3
    assert len(re.findall(r"^```\w+$", page, re.MULTILINE)) == 7 + 3 + len(blocks(page, "text"))


def test_the_counts_add_up_as_the_page_says(root: Path) -> None:
    table = pd.read_parquet(root / "runs" / "exp1" / "stats")
    table = table[table["kind"] != "drift"]
    special = table[["zeros", "subnormals", "nans", "pos_infs", "neg_infs"]].sum(axis=1)
    assert (table["count"] == table["counts"].map(sum) + special).all()
