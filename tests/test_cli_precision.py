"""`layerwatch precision`: what it prints of files and runs, and what it says of wrong input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from layerwatch import watch
from layerwatch.cli import main


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four captured steps and the file of its last weights, one of them with an outlier."""
    root = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 30))
    with torch.no_grad():
        model.get_parameter("2.weight").normal_(0, 0.1)
        model.get_parameter("2.weight")[7, 3] = 40.0
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with watch(model, optimizer, run=root / "run", every=1, live=False) as watcher:
        for _ in range(4):
            loss = model(torch.randn(8, 20)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watcher.log(train_loss=loss)
    save_file({**model.state_dict(), "ids": torch.arange(9)}, root / "model.safetensors")
    return root


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["precision", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_json_holds_every_tensor_and_format(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(told(capsys, made / "model.safetensors", "--format", "json"))
    assert (document["version"], document["kind"], document["step"]) == (1, "file", None)
    tensors = {t["tensor"]: t for t in document["tensors"]}
    assert set(tensors) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    outlier = tensors["2.weight"]
    assert outlier["outlier_channels"][0]["place"] == 7
    assert outlier["outlier_inputs"][0]["place"] == 3
    formats = {f["label"]: f for f in outlier["formats"]}
    assert formats["int8 per channel"]["snr_db"] > formats["int8 per channel"]["channel_snr_db"]
    assert {f["counts"] for f in formats.values()} == {"exact"} == {f["errors"] for f in formats.values()}
    assert outlier["recommendation"]["format"] == "int8 per channel"
    assert "ids" in document["left_out"]
    assert document["bytes_recommended"] < document["bytes"]


def test_a_run_says_that_it_estimates(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(told(capsys, made / "run", "--format", "json", "--by", "role"))
    assert (document["kind"], document["step"]) == ("run", 3)
    formats = {f["label"]: f for f in document["tensors"][0]["formats"]}
    assert (formats["fp16"]["counts"], formats["fp16"]["errors"]) == ("exact", "estimate")
    assert (formats["int8 per channel"]["counts"], document["tensors"][0]["outlier_channels"]) == (
        "estimate",
        None,
    )
    assert {g["name"] for g in document["groups"]} == {"matrix", "output", "bias"}
    first = json.loads(told(capsys, f"{made / 'run'}@start", "--format", "json"))
    assert first["step"] == "initial"
    assert len(first["tensors"]) == 4
    text = told(capsys, f"{made / 'run'}@1")
    assert "run at step 1 · 4 tensors" in " ".join(text.split())
    assert "the rest are estimates" in " ".join(text.split())


@pytest.mark.parametrize("by", ["layer", "block", "role"])
def test_text_names_what_stands_out(made: Path, capsys: pytest.CaptureFixture[str], by: str) -> None:
    text = told(capsys, made / "model.safetensors", "--by", by)
    heading = {"layer": "tensor", "block": "block", "role": "role"}[by]
    assert re.search(rf"^ ?{heading} .*(int8/ch|/ch ).*advised", text, re.MULTILINE)
    words = " ".join(text.split())
    assert "2.weight:" in words
    assert re.search(r"(row 7|column 3) reaches [\d.]+ times the median one", words)
    assert "left out: ids: its elements are int64" in words
    assert re.search(r"As stored 0\.01 MB, as advised 0\.00 MB", words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.safetensors"], "does not exist"),
        (["model.safetensors", "--least-snr", "-3"], "least_snr in decibels above 0"),
        (["run@nine"], "expected a step of run as a number"),
        (["bad.safetensors"], "damaged or of another format"),
        (["note.txt"], "expected a weight file"),
    ],
)
def test_wrong_input_is_one_line(
    made: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    (made / "bad.safetensors").write_bytes(b"x" * 50)
    (made / "note.txt").write_text("x")
    assert main(["precision", str(made / arguments[0]), *arguments[1:]]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
