"""A run as one tidy table in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_logs import TENSORS, info, make_run, row, values_at

from layerwatch.monitor import LogWriter, Run, RunError, Summary, export, summarise, tidy
from layerwatch.monitor.reader import LogReader
from layerwatch.monitor.schema import STATS

export_module = sys.modules["layerwatch.monitor.export"]  # the package shows the function of this name


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two steps with every kind of row."""
    log = LogWriter(tmp_path / "run", info())
    rows = []
    for step in (0, 1):
        for tensor in TENSORS:
            x = values_at(step, tensor)
            rows += [
                row(step, tensor, "weight", summarise(x)),
                row(step, tensor, "gradient", summarise(x / 10), stage="at_step", units=3, active=b"\x80"),
                row(step, tensor, "update", summarise(-x / 100), dot=-1.0, ref_sum_sq=4.0, lost=2),
            ]
            drift = Summary(count=12, sum_sq=0.25, dot=1.0, ref_sum_sq=1.0, sign_flips=step)
            rows.append(row(step, tensor, "drift", drift, min=None, max=None))
        rows.append(row(step, "1", "activation", summarise(np.ones(8)), units=4, samples=2, active=b"\xf0"))
    rows.append(row(0, TENSORS[0], "initial_weight", summarise(np.ones(12)), state=None))
    log.stats(pa.RecordBatch.from_pylist(rows, STATS))
    log.close()
    return Run(tmp_path / "run")


def test_one_row_per_step_tensor_and_kind(run: Run) -> None:
    frame = tidy(run)
    assert len(frame) == 2 * (3 * 3 + 1) + 1
    assert not frame.duplicated(["step", "tensor", "kind"]).any()
    assert list(frame.columns[:3]) == ["step", "tensor", "kind"]
    assert set(frame["kind"]) == {"weight", "gradient", "update", "activation", "initial_weight"}
    weights = frame[frame["kind"] == "weight"].set_index(["tensor", "step"])
    assert weights.loc[("0.bias", 1), "norm"] == pytest.approx(np.linalg.norm(values_at(1, "0.bias")))
    assert weights["relative_l2"].tolist() == [0.5] * 6
    assert weights["sign_flips"].tolist() == [0, 1] * 3
    assert frame.loc[frame["kind"] != "weight", "relative_l2"].isna().all()
    assert frame.loc[frame["kind"] == "update", "lost"].tolist() == [2] * 6


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_the_file_is_the_table(run: Run, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out{suffix}"
    rows = export(run, out)
    read = pd.read_csv(out) if suffix == ".csv" else pd.read_parquet(out)
    frame = tidy(run)
    assert rows == len(read) == len(frame)
    assert list(read.columns) == list(frame.columns)
    for column in frame.columns:
        wanted, got = frame[column], read[column]
        if pd.api.types.is_float_dtype(wanted):
            assert np.allclose(got.astype(float), wanted, rtol=1e-15, equal_nan=True), column
        else:
            assert (
                got.astype(object).where(got.notna(), None).tolist()
                == wanted.astype(object).where(wanted.notna(), None).tolist()
            ), column
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_parquet_file_has_plain_types(run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "out.parquet")
    types = {f.name: f.type for f in pq.read_schema(tmp_path / "out.parquet")}
    assert types["step"] == pa.int64()
    assert pa.types.is_string(types["tensor"]) or pa.types.is_large_string(types["tensor"])
    assert types["norm"] == pa.float64()
    assert not any(pa.types.is_null(t) for t in types.values())


def test_an_empty_run_is_a_clear_error_and_leaves_no_file(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path / "a", 0))
    with pytest.raises(RunError, match="holds no captured step yet"):
        export(run, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
    assert tidy(run).empty


@pytest.mark.parametrize("name", ["out.xlsx", "out", "out.parquet.gz", "missing/out.csv"])
def test_a_wrong_output_is_refused(run: Run, tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match=r"expected an (output|existing folder)"):
        export(run, tmp_path / name)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_an_existing_file_is_replaced_whole_or_not_at_all(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    out = tmp_path / f"out{suffix}"
    out.write_text("old")
    pieces = export_module._pieces

    def full(*arguments: Any) -> Iterator[pa.Table]:
        yield next(pieces(*arguments))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "_pieces", full)
        with pytest.raises(RunError, match="No space left on device: choose another place"):
            export(run, out)
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == [out.name, "run"]
    export(run, out)
    assert out.read_bytes()[:4] in (b"PAR1", b"step")
    assert sorted(p.name for p in tmp_path.iterdir()) == [out.name, "run"]


def test_no_permission_names_the_file_that_was_asked_for(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out.csv").mkdir()
    with pytest.raises(RunError, match=r"expected to write .*/out.csv, but Is a directory"):
        export(run, tmp_path / "out.csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.csv", "run"]


# Filters ----------------------------------------------------------------------------------------------------


def read(run: Run, out: Path, **filters: Any) -> pd.DataFrame:
    rows = export(run, out, **filters)
    frame = pd.read_parquet(out)
    assert len(frame) == rows
    return frame


def test_filters_are_rows_of_the_whole(run: Run, tmp_path: Path) -> None:
    whole = tidy(run)
    for filters, kept in (
        ({"kinds": ["gradient", "weight"]}, whole["kind"].isin(["gradient", "weight"])),
        ({"tensor": r"^0\."}, whole["tensor"].str.startswith("0.")),
        ({"steps": (1, None)}, whole["step"] >= 1),
        ({"steps": (None, 0)}, whole["step"] <= 0),
        ({"steps": (0, 1)}, whole["step"] >= 0),
        (
            {"steps": (1, 1), "tensor": "weight", "kinds": ["weight"]},
            (whole["step"] == 1) & whole["tensor"].str.contains("weight") & (whole["kind"] == "weight"),
        ),
    ):
        mine = read(run, tmp_path / "out.parquet", **filters)
        wanted = whole[kept].reset_index(drop=True)
        assert len(wanted) > 0
        pd.testing.assert_frame_equal(mine, wanted, check_dtype=False)


def test_rows_come_by_kind_tensor_and_step(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path / "made", 30))
    frame = read(run, tmp_path / "out.parquet")
    assert list(zip(frame["tensor"], frame["step"], strict=True)) == [
        (t, s) for t in TENSORS for s in range(30)
    ]


@pytest.mark.parametrize("piece", [7, 64, 1000])
def test_pieces_make_the_same_table(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    made = Run(make_run(tmp_path / "made", 40))
    for which in (run, made):
        whole = tidy(which)
        with monkeypatch.context() as patch:
            patch.setattr(export_module, "PIECE", piece)
            pd.testing.assert_frame_equal(read(which, tmp_path / "out.parquet"), whole, check_dtype=False)


def test_memory_is_bounded_by_the_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(make_run(tmp_path / "made", 50))
    monkeypatch.setattr(export_module, "PIECE", 20)
    most = 0
    read = export_module.rows

    def counting(log: LogReader, columns: list[str], *more: Any) -> pa.Table:
        nonlocal most
        found = read(log, columns, *more)
        if "buckets" in columns:
            most = max(most, found.num_rows)
        return found

    monkeypatch.setattr(export_module, "rows", counting)
    assert export(run, tmp_path / "out.csv") == 150
    assert 0 < most <= 21


@pytest.mark.parametrize("piece", [2, 1000])
def test_where_only_roll_ups_are_left_their_rows_are_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    path = make_run(tmp_path / "made", 80)
    full = tidy(Run(path))
    assert full["captures"].tolist() == [1] * 240
    assert full["last_step"].tolist() == full["step"].tolist()
    for part in (path / "stats").iterdir():
        part.unlink()
    monkeypatch.setattr(export_module, "PIECE", piece)
    frame = read(Run(path), tmp_path / "out.parquet", steps=(20, 40))
    assert frame["step"].tolist() == [16, 32] * 3
    assert frame["captures"].tolist() == [16] * 6
    assert frame["last_step"].tolist() == [31, 47] * 3
    for rolled in frame.to_dict("records"):
        own = full[
            (full["tensor"] == rolled["tensor"]) & full["step"].between(rolled["step"], rolled["last_step"])
        ]
        assert rolled["count"] == own["count"].sum()
        assert rolled["norm"] == pytest.approx(np.sqrt(np.square(own["norm"]).mean()))


WRONG = {
    "unknown kind": ({"kinds": ["gradients"]}, "got 'gradients': did you mean gradient"),
    "no kind at all": ({"kinds": ["xyz"]}, "choose among weight, "),
    "drift": ({"kinds": ["drift"]}, "told on the rows of kind weight"),
    "no regex": ({"tensor": "("}, "expected a regular expression for the tensors"),
    "steps turned around": ({"steps": (5, 1)}, "turn them around"),
    "kind that the run has not": ({"kinds": ["momentum"]}, "no rows of kind momentum: it has weight"),
    "tensor that the run has not": ({"tensor": "0.wieght"}, "in the name of no tensor .*: there is 0.weight"),
    "steps that the run has not": ({"steps": (7, None)}, "is in steps 7:: it has 2 steps from 0 to 1"),
    "nothing together": ({"tensor": "bias", "kinds": ["activation"]}, "all filters together"),
    "kinds of scalars": ({"table": "scalars", "kinds": ["weight"]}, "leave out --kind"),
    "scalars that are not there": ({"table": "scalars"}, "holds no scalar yet"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(run: Run, tmp_path: Path, case: str) -> None:
    filters, message = WRONG[case]
    with pytest.raises(RunError, match=message):
        export(run, tmp_path / "out.csv", **filters)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# Scalars and histograms -------------------------------------------------------------------------------------


def test_scalars(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "run", info())
    for step in range(5):
        log.scalars(step, 10.0 + step, {"train_loss": 1.0 / (1 + step), "lr": 0.1})
    log.scalars(5, 15.0, {"train_loss": float("nan"), "lr": float("inf")})
    log.close()
    run = Run(tmp_path / "run")
    frame = read(run, tmp_path / "out.parquet", table="scalars")
    assert list(frame.columns) == ["step", "time", "name", "value"]
    assert frame["name"].tolist() == ["lr"] * 6 + ["train_loss"] * 6
    for name in ("lr", "train_loss"):
        mine = frame[frame["name"] == name].drop(columns="name").reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, run.scalars(name))
    assert np.isnan(frame["value"].iloc[-1])
    some = read(run, tmp_path / "out.parquet", table="scalars", tensor="loss", steps=(1, 3))
    assert (some["name"].unique().tolist(), some["step"].tolist()) == (["train_loss"], [1, 2, 3])
    export(run, tmp_path / "out.csv", table="scalars")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out.csv"), frame, check_dtype=False)
    assert pq.read_schema(tmp_path / "out.parquet").field("name").type == pa.string()


def test_histograms(run: Run, tmp_path: Path) -> None:
    frame = read(run, tmp_path / "out.parquet", table="histograms")
    assert list(frame.columns) == ["step", "tensor", "kind", "low", "high", "count"]
    assert set(frame["kind"]) == set(tidy(run)["kind"])
    for tensor in TENSORS:
        mine = frame[(frame["tensor"] == tensor) & (frame["kind"] == "gradient") & (frame["step"] == 1)]
        wanted = run.histogram("gradient", tensor, 1)
        pd.testing.assert_frame_equal(mine[["low", "high", "count"]].reset_index(drop=True), wanted)
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert (schema.field("tensor").type, schema.field("step").type) == (pa.string(), pa.int64())


def test_exported_types_are_plain(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    export(run, out)
    schema = pq.read_schema(out)
    assert all(schema.field(name).type == pa.string() for name in ("tensor", "kind", "state", "stage"))
    assert all(
        schema.field(name).type == pa.int64() for name in ("step", "units", "active_units", "sign_flips")
    )
