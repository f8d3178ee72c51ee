"""A run as one tidy table: one row per step, tensor and kind with the derived statistics."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from .derive import COMMON, EXTRA
from .errors import RunError
from .run import Run
from .schema import KINDS

SUFFIXES = (".parquet", ".csv")
#: Whole numbers that are empty for some kinds, and text.
WHOLE = ("units", "active_units", "lost", "samples", "sign_flips")
TEXT = ("tensor", "kind", "state", "stage")


def tidy(run: Run) -> pd.DataFrame:
    """step, tensor, kind, then every statistic of `Run.stats`; relative_l2, cosine, sign_flips on the weight
    rows.

    Columns that do not apply to a kind are empty there.
    """
    frames = [run.stats(kind).assign(kind=kind) for kind in KINDS if kind != "drift"]
    tidied = pd.concat([f for f in frames if len(f)] or frames, ignore_index=True)
    drift = run.drift()[["step", "tensor", "relative_l2", "cosine", "sign_flips"]].assign(kind="weight")
    tidied = tidied.merge(drift, "left", ["step", "tensor", "kind"])
    extra = [column for columns in EXTRA.values() for column in columns]
    order = ["step", "tensor", "kind", *COMMON, *extra, "relative_l2", "cosine", "sign_flips"]
    tidied = tidied.reindex(columns=list(dict.fromkeys(order)))
    return tidied.astype(dict.fromkeys(WHOLE, "Int64"))


def export(run: Run, out: str | Path) -> int:
    """Write `tidy(run)` to a .parquet or .csv file, whole or not at all; returns the number of rows.

    Raises:
        RunError: another suffix, or the run holds no captured step.
    """
    target = Path(out)
    if target.suffix not in SUFFIXES:
        raise RunError(
            f"expected an output that ends in {' or '.join(SUFFIXES)}, got {str(out)!r}: choose one of them"
        )
    if not target.resolve().parent.is_dir():
        raise RunError(
            f"expected an existing folder for the output, but {target.parent} is none: make it first"
        )
    frame = tidy(run)
    if frame.empty:
        raise RunError(f"the run {run.path} holds no captured step yet: there is nothing to export")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    if target.suffix == ".csv":
        frame.to_csv(temporary, index=False)
    else:
        table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
        plain = [f.with_type(pa.string()) if f.name in TEXT else f for f in table.schema]
        pq.write_table(table.cast(pa.schema(plain)), temporary, compression="zstd")
    os.replace(temporary, target)
    return len(frame)
