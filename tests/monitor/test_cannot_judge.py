"""Logs that lack something, or hold nonsense: an honest note instead of a guess, a crash or a warning."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_detectors import LAYERS, UNITS, Made, N

from layerwatch.monitor.detectors import Arrays, History
from layerwatch.monitor.findings import Finding, judge


def told(history: History) -> tuple[list[Finding], list[str]]:
    """Findings and notes. No detector may fail (numpy's warnings are errors), and findings are valid JSON."""
    found, notes = judge(history)
    assert not [note for note in notes if "failed" in note]
    reasons = [note.partition(" not judged: ")[2] for note in notes if " not judged: " in note]
    assert len(reasons) == len(set(reasons)), "notes of the same reason are one line"
    json.dumps([f.to_dict() for f in found], allow_nan=False)
    return found, notes


def quiet(made: Made) -> list[str]:
    """The notes of a history in which nothing is wrong."""
    found, notes = told(made.history())
    assert [f.problem for f in found if f.alarm] == []
    return notes


def reason(notes: list[str], problem: str) -> str:
    """Why a problem was not judged; "" when it was."""
    return next((n.partition(" judged: ")[2] for n in notes if problem in n.partition(" not ")[0]), "")


def edit(made: Made, kind: str, column: str, change: Callable[[Any], Any], names: Any = None) -> Made:
    for name in names or made.rows[kind]:
        columns = made.rows[kind][name]
        if column in columns:
            columns[column] = change(columns[column])
    return made


def test_a_complete_log_needs_no_note() -> None:
    assert quiet(Made()) == []


# ---- what was not logged


def test_nothing_at_all() -> None:
    found, notes = told(History(Arrays()))
    assert found == []
    assert reason(notes, "vanishing_gradients") == "no step was captured"
    assert reason(notes, "not_learning") == "no training loss was logged (train_loss or loss)"
    assert len(notes) <= 5


def test_no_losses() -> None:
    made = Made()
    made.extra = {"train_loss": ([], []), "val_loss": ([], [])}
    notes = quiet(made)
    for problem in ("exploding_gradients", "learning_rate_too_low", "not_learning", "loss_spike"):
        assert reason(notes, problem) == "no training loss was logged (train_loss or loss)"
    assert reason(notes, "overfitting") == "no validation loss was logged (val_loss or eval_loss)"
    assert reason(notes, "weight_growth") == ""
    assert len(notes) == 2


def test_only_validation_losses() -> None:
    made = Made()
    made.extra = {"train_loss": ([], [])}
    notes = quiet(made)
    assert len(notes) == 1
    assert "no training loss" in notes[0]
    made.val = np.concatenate([made.val, np.linspace(0.5, 2.0, 10)])
    made.extra["val_loss"] = (np.arange(made.val.size) * 10, made.val)
    assert "overfitting" in [f.problem for f in told(made.history())[0]]


def test_no_scalar_of_any_kind() -> None:
    source = Made().history().source
    assert isinstance(source, Arrays)
    source.losses = {}
    found, notes = told(History(source))
    assert found == []
    assert reason(notes, "schedule_fault") == "no learning rate was logged (lr)"
    assert len(notes) == 3


@pytest.mark.parametrize("losses", [1, 2])
def test_losses_logged_once_or_twice(losses: int) -> None:
    made = Made()
    made.loss = made.loss[:losses]
    assert reason(quiet(made), "not_learning") == f"only {losses} finite training losses were logged"


def test_a_short_run() -> None:
    notes = quiet(Made(steps=40))
    assert reason(notes, "not_learning").startswith(
        "whether anything is learnt shows in 20 training losses over 100"
    )
    assert reason(notes, "exploding_gradients") == ""


@pytest.mark.parametrize("captures", [1, 2, 4])
def test_few_captures(captures: int) -> None:
    made = Made(every=N // captures, steps=N)
    notes = quiet(made)
    words = "1 step was" if captures == 1 else f"{captures} steps were"
    assert reason(notes, "weight_growth") == f"only {words} captured"
    assert (reason(notes, "vanishing_gradients") == "") == (captures >= 3)
    assert reason(notes, "not_learning") == ""


@pytest.mark.parametrize(
    ("kind", "words", "problems"),
    [
        ("gradient", "gradients were not captured", ("vanishing_gradients", "symmetric_units")),
        ("update", "updates were not captured (updates=True)", ("layer_imbalance", "learning_rate_too_low")),
        ("activation", "activations were not captured (activations=True)", ("saturated_units", "data_fault")),
        ("weight", "weights were not captured", ("unused_parameters", "weight_growth")),
    ],
)
def test_a_kind_that_is_missing(kind: str, words: str, problems: tuple[str, ...]) -> None:
    made = Made()
    made.rows[kind] = {}
    made.active = {key: value for key, value in made.active.items() if key[0] != kind}
    notes = quiet(made)
    for problem in problems:
        assert reason(notes, problem) == words
    assert reason(notes, "not_learning") == ""
    assert len([n for n in notes if words in n]) == 1


def test_weights_only() -> None:
    made = Made()
    made.rows = {kind: made.rows[kind] for kind in ("weight", "initial_weight")}
    made.active = {}
    notes = quiet(made)
    assert reason(notes, "weight_growth") == ""
    assert {reason(notes, p) for p in ("vanishing_gradients", "layer_imbalance", "saturated_units")} == {
        "gradients were not captured",
        "updates were not captured (updates=True)",
        "activations were not captured (activations=True)",
    }


def test_a_model_without_matrices() -> None:
    made = Made()
    made.layers = [e for e in made.layers if e["role"] == "bias"]
    assert reason(quiet(made), "vanishing_gradients") == "no trainable weight matrix is watched"


def test_one_parameter() -> None:
    made = Made()
    made.layers = made.layers[:1]
    made.leaves = made.leaves[:1]
    assert quiet(made) == []


def test_empty_tables() -> None:
    source = Made().history().source
    assert isinstance(source, Arrays)
    source.rows, source.active = {}, {}
    found, notes = told(History(source))
    assert found == []
    assert reason(notes, "weight_growth") == "no step was captured"
    source.layers, source.leaves = [], []
    assert told(History(source))[0] == []


# ---- nonsense


def test_nan_everywhere() -> None:
    made = Made()
    made.loss[:], made.val[:], made.lr[:] = np.nan, np.nan, np.nan
    for rows in made.rows.values():
        for columns in rows.values():
            for name, values in columns.items():
                if isinstance(values, np.ndarray) and values.dtype == float:
                    columns[name] = (
                        columns["count"].copy() if name == "nans" else np.full_like(values, np.nan)
                    )
    found, _ = told(made.history())
    assert [f.problem for f in found] == ["nonfinite"]
    assert (found[0].severity, found[0].first_step) == ("critical", 0)


def test_losses_that_are_nan_throughout_while_the_tensors_are_whole() -> None:
    made = Made()
    made.loss[:] = np.nan
    found, _ = told(made.history())
    assert [f.problem for f in found] == ["nonfinite"]


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-310])
def test_huge_tiny_and_subnormal_numbers(scale: float) -> None:
    """All of one history scaled: leverage is |g| |w| / loss, so that nothing changes but the numbers."""
    made = Made()
    made.loss, made.val = made.loss * scale, made.val * scale
    for column in ("norm", "rms", "std", "min", "max", "p01", "p99"):
        edit(made, "gradient", column, lambda values: values * scale)
    assert quiet(made) == []


def test_values_beyond_the_squares_of_float64() -> None:
    made = Made()
    for kind in ("weight", "gradient", "update", "activation"):
        for column in ("norm", "rms", "std", "min", "max", "mean", "ratio"):
            edit(made, kind, column, lambda values: np.full_like(values, 1e200))
    made.loss[:] = 1e300
    told(made.history())


def test_gradients_of_exactly_zero() -> None:
    made = Made()
    for column in ("norm", "rms", "std", "min", "max", "p01", "p99"):
        edit(made, "gradient", column, np.zeros_like)
    for columns in made.rows["gradient"].values():
        columns["zeros"] = columns["count"].copy()
    made.active = {key: (steps, np.zeros_like(a)) if key[0] == "gradient" else (steps, a)
                   for key, (steps, a) in made.active.items()}  # fmt: skip
    for columns in made.rows["weight"].values():
        columns["state"] = np.full(N, "zero_gradient", object)
    found, _ = told(made.history())
    assert "unused_parameters" in [f.problem for f in found]


def test_all_zero_everywhere() -> None:
    made = Made()
    made.loss[:], made.val[:], made.lr[:] = 0.0, 0.0, 0.0
    for rows in made.rows.values():
        for columns in rows.values():
            for name, values in columns.items():
                if isinstance(values, np.ndarray) and values.dtype == float and name != "count":
                    columns[name] = np.zeros_like(values)
    told(made.history())


def test_steps_that_go_back_and_repeat() -> None:
    """Scalars of a training that began again without a new run: the later half repeats earlier steps."""
    made = Made()
    again = np.concatenate([np.arange(N), np.arange(N // 2, N)])
    made.extra["train_loss"] = (again, np.concatenate([made.loss, made.loss[N // 2 :]]))
    assert quiet(made) == []
    order = np.random.default_rng(0).permutation(N)
    made.extra["train_loss"] = (order, made.loss[order])
    assert quiet(made) == []


def test_steps_that_are_negative_or_far_away() -> None:
    made = Made()
    made.extra["train_loss"] = (np.arange(N) + 2**40, made.loss)
    told(made.history())
    made.extra["train_loss"] = (np.arange(N) - 500, made.loss)
    told(made.history())


def test_rows_of_a_tensor_that_the_model_does_not_know() -> None:
    made = Made()
    for kind in ("gradient", "weight", "update"):
        made.rows[kind]["a stranger"] = made.rows[kind]["0.weight"]
    assert quiet(made) == []


def test_a_thousand_layers() -> None:
    """Silent, with names of layers not repeated in notes; a few seconds at most."""
    made = Made(every=20)
    copies = 170
    layers, leaves = made.layers[:-2], made.leaves[: LAYERS - 1]
    made.layers = [
        {**e, "tensor": f"{c}.{e['tensor']}", "module": f"{c}.{e['module']}"}
        for c in range(copies)
        for e in layers
    ] + made.layers[-2:]
    made.leaves = [{**e, "module": f"{c}.{e['module']}"} for c in range(copies) for e in leaves] + made.leaves
    for rows in made.rows.values():
        rows.update(
            {f"{c}.{name}": columns for c in range(copies) for name, columns in list(rows.items())[:10]}
        )
    assert len(made.layers) > 1000
    assert quiet(made) == []


def test_names_of_ten_thousand_letters() -> None:
    long = "é/" * 5000
    made = Made()
    made.layers = [
        {**e, "tensor": f"{long}{e['tensor']}", "module": f"{long}{e['module']}"} for e in made.layers
    ]
    made.leaves = [{**e, "module": f"{long}{e['module']}"} for e in made.leaves]
    made.rows = {k: {f"{long}{name}": c for name, c in rows.items()} for k, rows in made.rows.items()}
    made.active = {(k, f"{long}{name}"): a for (k, name), a in made.active.items()}
    made.rows["gradient"][f"{long}2.weight"]["norm"] *= 1e6
    found, _ = told(made.history())
    assert [f.problem for f in found] == ["exploding_gradients"]
    assert found[0].layers[0] == f"{long}2.weight"


def test_units_without_an_activation_row() -> None:
    made = Made()
    made.active["activation", "act0"] = (made.steps, np.zeros((N, 0), bool))
    made.active["activation", "act1"] = (made.steps[:0], np.zeros((0, UNITS), bool))
    assert quiet(made) == []
