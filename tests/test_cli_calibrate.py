"""`layerwatch calibrate`, and `check --baseline` with what it wrote: what they print, what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from layerwatch import watch
from layerwatch.cli import main

Answer = tuple[int, str, str]
STEPS = 60


def train(path: Path, seed: int, *, width: int = 8, late: float = 1.0, broken: bool = False) -> Path:
    """A regression; the rate of its first layer is multiplied by `late` from the middle on."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 1))
    first, second = list(model[0].parameters()), list(model[2].parameters())
    optimizer = torch.optim.SGD([{"params": first}, {"params": second}], 0.05)
    truth = torch.linspace(-1, 1, 6)[:, None]
    watcher = watch(model, optimizer, run=path, every=1)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.05 * (late if step >= STEPS // 2 else 1.0)
        x = torch.randn(64, 6)
        loss = (model(x) - x @ truth).square().mean() * (float("nan") if broken and step > 30 else 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watcher.log(train_loss=loss)
    watcher.close()
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for seed in range(4):
        train(root / "good" / f"seed{seed}", seed)
    train(root / "broken", 8, broken=True)
    train(root / "wider", 9, width=12)
    train(root / "fast", 10, late=8.0)
    return root


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    def run(*arguments: object) -> Answer:
        code = main([str(a) for a in arguments])
        out, error = capsys.readouterr()
        return code, out, error

    return run


@pytest.fixture
def normal(call: Callable[..., Answer], runs: Path, tmp_path: Path) -> Path:
    assert call("calibrate", runs / "good", "--out", tmp_path / "normal.json")[0] == 0
    return tmp_path / "normal.json"


def found(answer: Answer) -> list[dict]:
    return [f for f in json.loads(answer[1])["findings"] if f["problem"] == "regression"]


def test_calibrate_says_what_it_used_and_what_it_left_out(
    call: Callable[..., Answer], runs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "normal.json"
    code, said, error = call("calibrate", runs / "good", runs / "broken", runs / "wider", "--out", out)
    assert (code, error) == (0, "")
    assert json.loads(out.read_text())["runs"] == ["seed0", "seed1", "seed2", "seed3"]
    assert "normal by 4 runs: seed0, seed1, seed2, seed3" in said
    assert "update ratio" in said
    assert "train_loss" in said
    assert "broken: it has alarms: nonfinite" in said
    assert "wider: another model than seed3" in said


def test_a_file_finds_what_its_runs_find(call: Callable[..., Answer], runs: Path, normal: Path) -> None:
    good = sorted((runs / "good").iterdir())
    by_file = found(call("check", runs / "fast", "--format", "json", "--baseline", normal))
    by_runs = found(call("check", runs / "fast", "--format", "json", "--baseline", *good))
    assert by_file[0]["layers"][0] == "0.weight"
    assert abs(by_file[0]["first_step"] - STEPS // 2) <= 3
    assert "lr (step 30)" in by_file[0]["evidence"]["scalars"]
    assert (by_file[0]["layers"], by_file[0]["summary"]) == (by_runs[0]["layers"], by_runs[0]["summary"])
    assert found(call("check", good[0], "--format", "json", "--baseline", normal)) == []
    assert found(call("check", good[0], "--format", "json", "--baseline", *good[1:])) == []


def test_another_model_is_said_in_a_note(call: Callable[..., Answer], runs: Path, normal: Path) -> None:
    code, said, _ = call("check", runs / "wider", "--baseline", normal)
    assert code == 0
    assert "have another shape of 0.weight" in " ".join(said.split())


def test_one_baseline_is_weak_and_says_so(call: Callable[..., Answer], runs: Path) -> None:
    _, said, _ = call("check", runs / "fast", "--baseline", runs / "good" / "seed0")
    assert "1 earlier run only" in " ".join(said.split())


def refused(answer: Answer) -> str:
    code, out, error = answer
    assert code == 2
    assert out == ""
    assert error.count("\n") == 1
    return error


def test_what_cannot_be_calibrated(call: Callable[..., Answer], runs: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    out = ("--out", tmp_path / "x.json")
    assert "expected healthy runs, found none" in refused(call("calibrate", tmp_path / "none", *out))
    assert "nonfinite" in refused(call("calibrate", runs / "broken", *out))
    assert "one run tells no spread" in refused(call("calibrate", runs / "wider", *out))
    assert "expected a folder" in refused(call("calibrate", tmp_path / "missing", *out))
    assert "is a folder" in refused(call("calibrate", runs / "good", "--out", tmp_path))
    assert not (tmp_path / "x.json").exists()


def test_what_is_no_baseline(call: Callable[..., Answer], runs: Path, normal: Path, tmp_path: Path) -> None:
    check = ("check", runs / "fast", "--baseline")
    assert "a file stands for its runs" in refused(call(*check, normal, runs / "good" / "seed0"))
    assert "a file stands for its runs" in refused(call(*check, normal, normal))
    odd = tmp_path / "odd.json"
    odd.write_text("{")
    assert "is no JSON" in refused(call(*check, odd))
    odd.write_text(json.dumps({**json.loads(normal.read_text()), "version": 99}))
    assert "update layerwatch" in refused(call(*check, odd))
    assert "fast" not in refused(call(*check, tmp_path / "missing"))
