"""Training and validation loss: under which names they are logged, and the gap between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

#: Names under which the two losses are looked for, in this order.
TRAIN = ("train_loss", "loss", "train/loss", "training_loss")
VAL = ("val_loss", "eval_loss", "valid_loss", "validation_loss", "val/loss", "eval/loss")


def gap(train: pd.DataFrame, val: pd.DataFrame) -> pd.DataFrame:
    """Validation minus training loss at each validation step, and its noise.

    The training loss is the mean since the previous validation, because one batch is too noisy to subtract;
    where nothing was logged in between it is interpolated. Validations at the same step are averaged. `noise`
    is the standard error of the difference: from the spread of the training losses that were averaged (as if
    they were independent) and of the repeated validations; NaN where fewer than two losses tell.
    Columns: step, train, val, gap, noise.
    """
    columns = ["step", "train", "val", "gap", "noise"]
    train, val = train[np.isfinite(train["value"])], val[np.isfinite(val["value"])]
    if train.empty or val.empty:
        return pd.DataFrame(columns=columns, dtype=float)
    at, level, error = _by_group(val["step"], val["value"])
    steps, values = train["step"].to_numpy(), train["value"].to_numpy(dtype=float)
    group = np.searchsorted(at, steps)  # the validation that each training loss comes before
    places, mean, spread = _by_group(group, values)
    known = places < len(at)
    train_mean, train_error = np.interp(at, steps, values), np.full(len(at), np.nan)
    train_mean[places[known]], train_error[places[known]] = mean[known], spread[known]
    noise = np.sqrt(train_error + np.nan_to_num(error))
    found = (at, train_mean, level, level - train_mean, noise)
    return pd.DataFrame(dict(zip(columns, found, strict=True)))


def _by_group(group: Any, values: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups in ascending order, means, and the means' squared standard errors (NaN: of one value)."""
    found = (
        pd.Series(np.asarray(values, dtype=float)).groupby(np.asarray(group)).agg(["mean", "var", "count"])
    )
    error = (found["var"] / found["count"]).to_numpy(dtype=float)
    return found.index.to_numpy(), found["mean"].to_numpy(dtype=float), error
