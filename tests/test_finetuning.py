"""The story of docs/finetuning.md on a short version: what moves, how far, and what is forgotten."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

from layerwatch import Run, drift
from layerwatch.monitor.weights.report import Drift

STEPS = 6

# peft asks transformers for an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Told(NamedTuple):
    run: Run
    encoder: Any
    found: dict[str, float]
    drift: Drift  # of the weights themselves


@pytest.fixture(scope="module")
def example(checkout: Path) -> ModuleType:
    path = (checkout / "examples").joinpath("finetune_minilm.py")
    spec = importlib.util.spec_from_file_location("story", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    texts, rated = module.stories()
    assert len(texts) == 50
    half = texts[::2], rated[::2, ::2]  # half of the time
    vars(module)["stories"] = lambda: half
    return module


@pytest.fixture(scope="module")
def story(example: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    """Fine-tuned fully, with LoRA, and with a learning rate that is 30 times as large."""
    root = tmp_path_factory.mktemp("story")
    told = {}
    for name, how, lr in (("full", "full", 5e-5), ("lora", "lora", 5e-4), ("fast", "full", 1.5e-3)):
        encoder, found = example.finetune(how, lr, root / name, steps=STEPS, batch=8, held_out=10, looks=1)
        moved = drift(example.PRETRAINED / "model.safetensors", encoder)
        told[name] = Told(Run(root / name), encoder, found, moved)
    return told


def blocks(told: Told) -> np.ndarray:
    groups = told.drift.groups("block")
    return np.array([one["relative_l2"] for one in groups if one["block"].startswith("encoder.layer.")])


def test_the_texts_are_what_they_are_said_to_be(example: Any) -> None:
    train, valid = example.tweets()
    assert [sum(label == k for _, label in valid) for k in range(3)] == [100, 100, 100]
    assert not {text for text, _ in train} & {text for text, _ in valid}
    texts, rated = example.stories()
    assert rated.shape == (len(texts), len(texts))
    assert np.array_equal(rated, rated.T)
    assert 0.2 <= rated[np.triu_indices(len(texts), 1)].min() < rated.max() <= 1


def test_a_careful_fine_tuning_moves_all_blocks_a_little(story: dict[str, Told]) -> None:
    moved = blocks(story["full"])
    assert len(moved) == 6
    assert (moved > 0).all()
    assert (moved < 0.01).all()
    assert "excessive_drift" not in {finding.problem for finding in story["full"].run.findings()}


def test_thirty_times_the_rate_moves_ten_times_as_far_and_breaks_the_budget(story: dict[str, Told]) -> None:
    assert (blocks(story["fast"]) > 10 * blocks(story["full"])).all()
    (finding,) = [f for f in story["fast"].run.findings() if f.problem == "excessive_drift"]
    assert finding.evidence["threshold"] == 0.05


def test_what_was_moved_far_is_forgotten(story: dict[str, Told]) -> None:
    full, fast = story["full"].found, story["fast"].found
    assert full["similarity_before"] == fast["similarity_before"] > 0.4
    assert full["similarity"] > full["similarity_before"] - 0.1
    assert fast["similarity"] < full["similarity"] - 0.15
    assert fast["change_low"] < full["change_low"] - 0.1
    assert fast["output_cosine"] < full["output_cosine"] - 0.1


def test_lora_leaves_all_but_its_matrices_where_they_were(story: dict[str, Told]) -> None:
    moved = story["lora"].drift.tensors
    adapted = moved["tensor"].str.contains(r"(?:query|key|value|dense)\.weight$")
    assert (moved.loc[~adapted, "relative_l2"] == 0).all()
    assert (moved.loc[adapted, "relative_l2"] > 0).all()
    assert story["lora"].found["similarity"] > story["fast"].found["similarity"]


def test_the_log_says_the_same_as_the_weights(story: dict[str, Told]) -> None:
    told = story["full"]
    logged = told.run.drift().groupby("tensor")["relative_l2"].last()
    weights = told.drift.tensors.set_index("tensor")
    checked = [name for name in weights.index if f"encoder.{name}" in logged.index]
    assert len(checked) > 90
    ours = logged[[f"encoder.{name}" for name in checked]].to_numpy()
    np.testing.assert_allclose(ours, weights.loc[checked, "relative_l2"], rtol=1e-5, atol=1e-9)


def test_the_interval_holds_the_change_and_is_no_point(story: dict[str, Told]) -> None:
    for told in story.values():
        found = told.found
        change = found["similarity"] - found["similarity_before"]
        assert found["change_low"] - 0.05 < change < found["change_high"] + 0.05
        assert found["change_low"] < found["change_high"]


def test_the_script_prints_what_it_found(
    example: Any, story: dict[str, Told], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = story["full"]
    monkeypatch.setattr(example, "finetune", lambda *_, **__: (told.encoder, told.found))
    monkeypatch.setattr("sys.argv", ["finetune_minilm.py", "--lr", "5e-5"])
    example.main()
    printed = capsys.readouterr().out
    assert (
        f"similarity of stories {told.found['similarity_before']:.3f} to {told.found['similarity']:.3f}"
        in printed
    )
    for number, moved in enumerate(blocks(told)):
        assert f"encoder.layer.{number}  moved by {100 * moved:7.3f} %" in printed
