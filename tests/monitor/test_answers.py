"""Answers that are kept in bounded memory, and the means of stored values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from made_logs import info

from layerwatch.monitor import LogWriter, Run
from layerwatch.monitor.answers import SMALL, Answers, weight


def test_the_answers_used_last_are_kept_up_to_so_many_bytes() -> None:
    answers, made = Answers(3 * (SMALL + 8000)), []

    def ask(key: str, size: int = 1000) -> np.ndarray:
        return answers.get(key, lambda: made.append(key) or np.zeros(size))

    for key in ("a", "b", "c", "a", "d", "a", "b"):
        ask(key)
    assert made == ["a", "b", "c", "d", "b"]  # b was used longest ago when d came
    assert len(answers) == 3
    ask("large", 10**6)
    assert len(answers) == 1
    assert ask("large", 1).size == 10**6
    answers.clear()
    assert (len(answers), answers.used) == (0, 0)


def test_the_weight_of_an_answer_is_that_of_its_arrays() -> None:
    frame = pd.DataFrame({"x": np.zeros(1000), "name": ["layer"] * 1000})
    assert weight(frame) > 8000
    assert weight((np.zeros(1000), [np.zeros(500)], {"a": frame})) > 8000 + 4000 + 8000
    assert weight("text") == SMALL


def test_means_of_stored_values_by_module(tmp_path: Path) -> None:
    rows = {("b", 0): [0.0, 1.0], ("a", 0): [0.5, 0.5, 0.5], ("b", 7): [1.0, 1.0], ("c", 7): [np.nan, 1.0]}
    writer = LogWriter(tmp_path / "run", info())
    writer.values([(step, 1.0 + step, name, "saturated_share", v) for (name, step), v in rows.items()])
    writer.close()
    frame = Run(tmp_path / "run").unit_means("saturated_share")
    got = {(row.tensor, row.step): row.value for row in frame.itertuples()}
    assert got.keys() == rows.keys()
    for key, values in rows.items():
        np.testing.assert_equal(got[key], np.mean(values))
    assert Run(tmp_path / "run").unit_means("dead_share").empty
