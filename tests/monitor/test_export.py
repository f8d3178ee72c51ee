"""A run as one tidy table in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_logs import TENSORS, info, make_run, row, values_at

from layerwatch.monitor import LogWriter, Run, RunError, Summary, export, summarise, tidy
from layerwatch.monitor.schema import STATS


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


def test_an_existing_file_is_replaced_whole_or_not_at_all(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.csv"
    out.write_text("old")

    def full(self: pd.DataFrame, path: Path, **_: object) -> None:
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_csv", full)
        with pytest.raises(OSError, match="No space"):
            export(run, out)
    assert out.read_text() == "old"
    export(run, out)
    assert out.read_text().startswith("step,tensor,kind,")


def test_exported_types_are_plain(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    export(run, out)
    schema = pq.read_schema(out)
    assert all(schema.field(name).type == pa.string() for name in ("tensor", "kind", "state", "stage"))
    assert all(
        schema.field(name).type == pa.int64() for name in ("step", "units", "active_units", "sign_flips")
    )
