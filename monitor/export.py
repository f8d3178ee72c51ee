"""A run as one tidy table: one row per step, tensor and kind with the derived statistics."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from .derive import COMMON, EXTRA
from .errors import RunError
from .run import Run

SUFFIXES = (".parquet", ".csv")


def tidy(run: Run) -> pd.DataFrame:
    """step, tensor, kind, then every statistic of `Run.stats`; relative_l2, cosine, sign_flips on the weight
    rows.

    Columns that do not apply to a kind are empty there.
    """
    frames = []
    for kind in ("initial_weight", "weight", "gradient", "update", "activation"):
        frame = run.stats(kind).assign(kind=kind)
        if kind == "weight":
            frame = frame.merge(
                run.drift()[["step", "tensor", "relative_l2", "cosine", "sign_flips"]],
                "left",
                ["step", "tensor"],
            )
        frames.append(frame)
    extra = [c for columns in EXTRA.values() for c in columns]
    columns = list(
        dict.fromkeys(["step", "tensor", "kind", *COMMON, *extra, "relative_l2", "cosine", "sign_flips"])
    )
    filled = [f.reindex(columns=columns) for f in frames if len(f)]
    if not filled:
        return pd.DataFrame(columns=columns)
    return pd.concat(
        [f.astype({c: "object" for c in columns if f[c].isna().all()}) for f in filled], ignore_index=True
    ).infer_objects()


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
        frame.astype({"tensor": "str", "kind": "str"}).to_parquet(temporary, index=False, compression="zstd")
    os.replace(temporary, target)
    return len(frame)
