"""docs/log-format.md: complete, and its own queries run on a real log and agree with `Run`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch import nn

from layerwatch import Run, watch
from layerwatch.hooks import values
from layerwatch.monitor import KINDS, SCHEMA_VERSION, bucket_edges
from layerwatch.monitor import log as log_module
from layerwatch.monitor.schema import TABLES
from layerwatch.monitor.summary import bucket_of
from layerwatch.monitor.wal import _CODES, _HEAD, MAGIC

TYPES = {
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
    """A folder with a real training in runs/exp1."""
    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with watch(model, optimizer, run=folder / "runs" / "exp1", every=2) as watcher:
        for _ in range(11):
            loss = model(torch.randn(32, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            watcher.log(train_loss=loss)
    return folder


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
    assert names == {"run.json", "wal", *TABLES}
    for name in names | {"errors.log"}:
        assert name in page, name


def test_constants_on_the_page_are_those_of_the_code(page: str) -> None:
    assert f"Format version: {SCHEMA_VERSION} " in page
    assert f"{log_module.SEGMENT_BYTES >> 20} MB" in page
    assert f"{log_module.SEGMENT_SECONDS:.0f} seconds" in page
    assert f"{values.MAX_ELEMENTS:,} elements" in page
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


def test_the_sql_queries(page: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    run = Run("runs/exp1")
    norms, ratios, histogram, split, half = (duckdb.execute(query).df() for query in blocks(page, "sql"))
    weights = run.stats("weight").sort_values(["tensor", "step"], ignore_index=True)
    assert len(norms) == 6 * 4
    pd.testing.assert_frame_equal(
        norms[["tensor", "step", "norm"]], weights[["tensor", "step", "norm"]], check_dtype=False
    )
    wanted = run.stats("update").groupby("tensor")["ratio"].max()
    assert dict(zip(ratios["tensor"], ratios["ratio"], strict=True)) == pytest.approx(wanted.to_dict())
    mine = run.histogram("gradient", "0.weight", step=0)
    mine = mine[mine["low"] < mine["high"]].reset_index(drop=True)
    assert histogram["elements"].tolist() == mine["count"].tolist()
    assert histogram["low"].tolist() == pytest.approx(mine["low"].tolist())
    assert histogram["high"].tolist() == pytest.approx(mine["high"].tolist())
    updates = run.stats("update").sort_values(["tensor", "step"])
    for column in ("parallel", "perpendicular"):
        assert split[column].tolist() == pytest.approx(updates[column].tolist(), abs=1e-12)
    gradients = run.stats("gradient").sort_values(["tensor", "step"])
    assert half["underflow"].tolist() == pytest.approx(gradients["underflow"].tolist())


def test_the_python_queries(page: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    run = Run("runs/exp1")
    by_polars, by_pandas = blocks(page, "python")
    found: dict[str, Any] = {}
    exec(by_polars, found)
    drift = run.drift().sort_values(["tensor", "step"])
    assert found["result"]["tensor"].to_list() == drift["tensor"].tolist()
    assert found["result"]["relative_l2"].to_list() == pytest.approx(drift["relative_l2"].tolist())
    assert max(found["result"]["relative_l2"]) > 0
    found = {}
    exec(by_pandas, found)
    gradients = run.stats("gradient").sort_values(["tensor", "step"])
    for column in ("mean", "std"):
        assert found["result"][column].tolist() == pytest.approx(gradients[column].tolist(), abs=1e-15)
    assert found["loss"].tolist() == run.scalars("train_loss")["value"].tolist()


def test_every_code_block_was_run(page: str) -> None:
    assert len(blocks(page, "sql")) == 5
    assert len(blocks(page, "python")) == 2
    assert len(re.findall(r"^```\w+$", page, re.MULTILINE)) == 5 + 2 + len(blocks(page, "text"))


def test_the_counts_add_up_as_the_page_says(root: Path) -> None:
    table = pd.read_parquet(root / "runs" / "exp1" / "stats")
    table = table[table["kind"] != "drift"]
    special = table[["zeros", "subnormals", "nans", "pos_infs", "neg_infs"]].sum(axis=1)
    assert (table["count"] == table["counts"].map(sum) + special).all()
