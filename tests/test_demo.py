"""The demo trains real networks: each run is what its name says, and its log alone gives the diagnosis."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

import layerwatch.demo
from layerwatch import Run
from layerwatch.cli import main
from layerwatch.demo import run_demo
from layerwatch.demo.trainings import TRAININGS

NAMES = ["healthy-cnn", "vanishing-mlp", "blow-up", "overfit", "finetune-minilm"]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Run], str]:
    """The five runs, a few steps each, and what was printed."""
    printed = io.StringIO()
    folders = run_demo(tmp_path_factory.mktemp("demo"), steps=6, console=Console(file=printed))
    return {folder.name: Run(folder) for folder in folders}, printed.getvalue()


def test_five_runs_in_order_with_a_line_each_without_a_terminal(short: tuple[dict[str, Run], str]) -> None:
    runs, printed = short
    assert list(runs) == NAMES
    assert [line.split()[0] for line in printed.splitlines()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_run_has_rows_scalars_and_its_hyperparameters(short: tuple[dict[str, Run], str], name: str) -> None:
    run = short[0][name]
    assert run.last_step == 5
    assert not run.live
    assert len(run.scalars("train_loss")) == 6
    assert len(run.scalars("val_loss")) >= 1
    assert run.info["config"]["lr"] > 0
    for kind in ("weight", "gradient", "update", "activation"):
        assert len(run.stats(kind)) > 0


def test_finetuning_starts_at_the_pretrained_weights_with_frozen_words(
    short: tuple[dict[str, Run], str],
) -> None:
    run = short[0]["finetune-minilm"]
    states = run.tensors().set_index("tensor")["state"]
    assert states["embeddings.word_embeddings.weight"] == "frozen"
    drift = run.drift().groupby("tensor")["relative_l2"].last()
    assert (
        drift["embeddings.word_embeddings.weight"] < 1e-6
    )  # the reference of a large tensor is kept in bf16
    assert 0 < drift["encoder.layer.5.output.dense.weight"] < 0.01


def test_what_is_in_the_way_and_no_run_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "overfit" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    with pytest.raises(FileExistsError, match="choose another folder"):
        run_demo(tmp_path, steps=1)
    assert precious.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["overfit"]  # and nothing was trained in vain


def test_without_its_packages_the_demo_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(layerwatch.demo.NEEDED, "no_such_module", "no-such-package")
    assert main(["demo", "--no-serve"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("needs no-such-package: pip install 'layerwatch[demo]'")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("healthy-cnn", None),
        ("vanishing-mlp", "vanishing_gradients"),
        ("blow-up", "learning_rate_too_high"),
        ("overfit", "overfitting"),
    ],
)
def test_the_diagnosis_of_a_whole_training(tmp_path: Path, name: str, expected: str | None) -> None:
    training = next(training for training in TRAININGS if training.name == name)
    training.train(tmp_path / name, training.steps, lambda: None)
    alarms = [finding for finding in Run(tmp_path / name).findings() if finding.severity != "info"]
    problems = [finding.problem for finding in alarms]
    assert problems[:1] == ([expected] if expected else []), alarms
