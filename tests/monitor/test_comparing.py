"""Two runs compared in depth, against slow twins; the command and its Markdown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from scipy import stats

from layerwatch import Run, compare, watch
from layerwatch.cli import main
from layerwatch.monitor import LogWriter
from layerwatch.monitor.comparing import Comparison, compare_runs
from layerwatch.monitor.comparison_text import change, markdown
from layerwatch.monitor.results import judge, prediction_interval
from tests.dashboard.made_runs import HOSTILE, LAYERS, STEPS, drift_of, write_runs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("made"))


def logged(root: Path, name: str, scalars: dict[str, list[float]], config: Any = None) -> Run:
    """A run of scalars alone."""
    log = LogWriter(root / name, {"name": name, "tensors": [], "modules": [], "config": config or {}})
    for scalar, values in scalars.items():
        for step, value in enumerate(values):
            log.scalars(step, 1e9 + step, {scalar: value})
    log.close()
    return Run(root / name)


def seeds(root: Path, count: int) -> list[Run]:
    """Runs of one configuration that end at 0.90, 0.91, ... of accuracy, all 0.5 by night."""
    return [
        logged(root, f"seed{i}", {"val_accuracy": [0.1, 0.9 + 0.01 * i], "val_accuracy/night": [0.5]})
        for i in range(count)
    ]


# Seed noise -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 4, 8, 30])
def test_the_interval_is_that_of_the_textbook(count: int) -> None:
    values = np.random.default_rng(count).normal(5, 2, count)
    mean, deviation = (
        sum(values) / count,
        math.sqrt(sum((v - values.mean()) ** 2 for v in values) / (count - 1)),
    )
    reach = float(stats.t.ppf(0.975, count - 1)) * deviation * math.sqrt(1 + 1 / count)
    found = prediction_interval(values.tolist())
    assert found == pytest.approx((mean - reach, mean + reach), rel=1e-3)


def test_a_further_seed_is_outside_in_one_case_of_twenty() -> None:
    rng = np.random.default_rng(0)
    verdicts = [
        judge(a, b, repeats, 1).verdict for a, b, *repeats in rng.normal(0.9, 0.01, (2000, 5)).tolist()
    ]
    outside = sum(verdict != "within" for verdict in verdicts) / len(verdicts)
    assert outside == pytest.approx(0.05, abs=0.015)
    assert verdicts.count("better") == pytest.approx(verdicts.count("worse"), abs=40)


def test_what_cannot_be_judged_is_not() -> None:
    few, enough = [0.5], [0.5, 0.6]
    assert judge(0.4, 9.0, few, 1).verdict == "unknown"  # two runs say nothing
    assert judge(0.4, 9.0, enough, 1).verdict == "better"
    assert judge(0.4, 9.0, enough, -1).verdict == "worse"
    assert judge(0.4, -9.0, enough, 0).verdict == "different"
    assert judge(0.4, 0.4, [], 1).verdict == "same"
    assert judge(0.4, None, enough, 1).verdict == "unknown"
    assert judge(0.4, math.nan, enough, 1).verdict == "unknown"
    assert judge(math.nan, 0.4, [0.5, 0.6, 0.7], 1).verdict == "unknown"
    assert judge(0.4, 0.5, [0.5, math.nan], 1).runs == 2


# Runs -------------------------------------------------------------------------------------------------------


def test_results_are_judged_against_repeats_and_slices_do_not_hide(tmp_path: Path) -> None:
    runs = seeds(tmp_path, 4)
    b = logged(tmp_path, "b", {"val_accuracy": [0.1, 0.92], "val_accuracy/night": [0.3]})
    found = compare_runs(runs[0], b, runs[1:])
    whole, night = found.metrics
    assert (whole.name, night.name, night.slice_of) == ("val_accuracy", "val_accuracy/night", "val_accuracy")
    assert (whole.last.verdict, night.last.verdict) == ("within", "worse")
    assert whole.last.runs == 4
    text = markdown(found)
    assert "> `val_accuracy/night` is worse (0.5 → 0.3) although `val_accuracy` is not." in text
    assert "ended worse in `val_accuracy/night`" in text
    assert found.notes == []


def test_without_repeats_nothing_is_claimed(tmp_path: Path) -> None:
    a, b = seeds(tmp_path, 2)
    text = markdown(compare_runs(a, b))
    assert "cannot be told" in text
    assert "give 2 more with `--repeats`" in text
    assert "better" not in text
    assert "worse" not in text


def test_a_repeat_that_is_none_is_told(tmp_path: Path) -> None:
    one, two = (logged(tmp_path, n, {"val_loss": [1.0]}, {"lr": 1, "seed": n}) for n in "ab")
    other = logged(tmp_path, "c", {"val_loss": [1.0]}, {"lr": 2, "seed": "c"})
    assert compare_runs(one, other, [two]).notes == []  # a seed is meant to differ
    (note,) = compare_runs(one, two, [other]).notes
    assert "c is taken as a repeat of a, but differs in config.lr (1 against 2)" in note
    assert "one of" in compare_runs(one, two, [two]).notes[0]


def test_settings_parting_and_layers(made: Path) -> None:
    found = compare(made / "base", made / "twin")
    assert isinstance(found, Comparison)
    assert found.settings == [("config.lr", "0.1", "0.2")]
    assert (found.parting.step, found.parting.tensor) == (150, LAYERS[1])
    # the twin has moved twice as far from a reference of the same name
    assert {layer.tensor for layer in found.layers} == set(LAYERS)
    for layer in found.layers:
        ends = [drift_of(times * STEPS[-1], layer.tensor) for times in (1, 2)]
        one, two = (math.sqrt(end.sum_sq / float(end.ref_sum_sq or 0)) for end in ends)
        assert (layer.a, layer.b, layer.apart) == pytest.approx((one, two, two - one))


def test_weights_at_the_same_anchor_tell_how_far_layers_are_apart(tmp_path: Path) -> None:
    ends = []
    for rate in (0.01, 0.1):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), rate)
        with watch(model, optimizer, run=tmp_path / str(rate), every=1, anchors=[1, 3]):
            for _ in range(4):
                optimizer.zero_grad()
                model(torch.ones(1, 3)).square().sum().backward()
                optimizer.step()
        ends.append(model.weight.detach().double().numpy())
    found = compare_runs(Run(tmp_path / "0.01"), Run(tmp_path / "0.1"))
    assert found.measure.startswith("distance of the weights at step 3")
    apart = {layer.tensor: layer.apart for layer in found.layers}
    assert apart["weight"] == pytest.approx(
        np.linalg.norm(ends[1] - ends[0]) / np.linalg.norm(ends[0]), rel=1e-5
    )


def test_runs_without_a_common_layer_are_still_compared(made: Path) -> None:
    found = compare_runs(Run(made / "base"), Run(made / "other"))
    assert "cannot be said" in found.sentence
    assert found.layers == []
    assert [one.last.verdict for one in found.metrics] == ["same", "same"]


# Weights ----------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path) -> tuple[str, str]:
    """Two files: a block that moved by a tenth, one that did not, a tensor that only the second has."""
    rng = np.random.default_rng(0)
    before = {f"blocks.{i}.weight": rng.normal(size=(4, 4)).astype(np.float32) for i in range(2)}
    after = {
        **before,
        "blocks.1.weight": before["blocks.1.weight"] * 1.1,
        "new|.weight": np.ones(2, np.float32),
    }
    save_file(before, tmp_path / "a.safetensors")
    save_file(after, tmp_path / "b.safetensors")
    return str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")


def test_weight_files_are_compared_through_drift(
    weights: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *weights, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    moved = {row["tensor"]: row["relative_l2"] for row in found["tensors"]}
    assert moved == {"blocks.0.weight": 0, "blocks.1.weight": pytest.approx(0.1, rel=1e-5)}
    assert main(["compare", *weights, "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    assert "| `blocks.1` | 1 | 10 % | 1 |" in text
    assert "| `new\\|.weight` | only in B |" in text
    assert "2 tensors are in both, 1 of them did not move." in text
    assert main(["compare", *weights]) == 0
    assert "blocks.1" in capsys.readouterr().out


# The command ------------------------------------------------------------------------------------------------


def test_json_is_an_object_without_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = seeds(tmp_path, 3)
    logged(tmp_path, "b", {"val_accuracy": [0.1, math.nan]})
    paths = [str(run.path) for run in runs]
    assert main(["compare", paths[0], str(tmp_path / "b"), "--repeats", *paths[1:], "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    (metric,) = found["metrics"]
    assert (metric["last"]["b"], metric["last"]["verdict"]) == (None, "unknown")
    assert metric["best"]["b"] == 0.1
    assert metric["better"] == "higher"
    assert found["repeats"] == ["seed1", "seed2"]


def test_markdown_is_one_that_github_reads(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(made / "base"), str(made / HOSTILE), "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert tables
    for lines in tables:
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1, lines
    outside_code = "".join(text.split("`")[::2])
    assert "<img" not in outside_code
    assert text.count("<details>") == text.count("</details>") >= 1


def test_text_names_what_differs(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(made / "base"), str(made / "twin")]) == 0
    text = capsys.readouterr().out
    for words in ("config.lr", "They part at step 150", LAYERS[1], "cannot be told"):
        assert words in text


def test_wrong_input_is_one_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(made / "base"), str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    file = tmp_path / "a.safetensors"
    assert main(["compare", str(file), str(file), "--repeats", str(made / "base")]) == 2
    assert "expected two runs beside repeats" in capsys.readouterr().err


def test_a_change_is_signed_and_a_share() -> None:
    assert change(0.5, 0.25) == "−0.25 (−50 %)"
    assert change(-2.0, 1.0) == "+3 (+150 %)"
    assert change(0.0, 1.0) == "+1"
    assert change(1.0, 1.0) == "+0"
    assert change(1.0, math.nan) == "–"
