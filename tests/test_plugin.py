"""Detectors of other distributions: really installed, then asked by `layerwatch check`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwatch import watch

PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trainings of the same small network: on one noisy sample at a time, and on 256 clean ones."""
    root = tmp_path_factory.mktemp("runs")
    for name, samples, noise in (("noisy", 1, 1.0), ("calm", 256, 0.05)):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        with watch(model, optimizer, run=root / name, every=10) as watcher:
            for _ in range(200):
                x = torch.randn(samples, 4)
                y = x.sum(1, keepdim=True) + noise * torch.randn(samples, 1)
                loss = (model(x) - y).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                watcher.log(train_loss=loss)
    return root


def install(source: Path, folder: Path) -> Path:
    """Install a distribution into a folder, from a copy, because setuptools leaves files behind."""
    copy, site = folder / "source", folder / "site"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    subprocess.run([*PIP, "--target", str(site), str(copy)], check=True, capture_output=True)
    return site


def check(checkout: Path, site: Path, *runs: Path) -> dict[str, Any]:
    """What `layerwatch check --format json` prints when the folder is installed beside layerwatch."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (site, checkout)))}
    done = subprocess.run(
        [sys.executable, "-m", "layerwatch", "check", *map(str, runs), "--format", "json"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_example_plug_in_is_found_when_it_is_installed(
    checkout: Path, runs: Path, tmp_path: Path
) -> None:
    site = install(checkout / "examples" / "custom_detector", tmp_path)
    said = check(checkout, site, runs / "noisy", runs / "calm")
    (finding,) = [f for f in said["findings"] if f["problem"] == "noisy_loss"]
    assert (finding["run"], finding["severity"], finding["first_step"]) == ("noisy", "warning", 150)
    assert finding["evidence"]["noise_over_level"] > finding["evidence"]["threshold"] == 0.5
    assert "larger batches" in finding["advice"]
    without = check(checkout, tmp_path / "nothing", runs / "noisy")
    assert "noisy_loss" not in {f["problem"] for f in without["findings"]}


BROKEN = """
from layerwatch.monitor.detectors import detector

@detector("raises")
def raises(history):
    return 1 / 0

@detector("answers_nonsense")
def answers_nonsense(history):
    return {"problem": "a dict is no Finding"}

@detector("cries_wolf")
def cries_wolf(history):
    return history.finding("cries_wolf", "catastrophic", "Wolf.", first=0)
"""


def distribution(site: Path, name: str, module: str, source: str) -> None:
    """What pip leaves of an installed distribution: its module and its entry points."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[layerwatch.detectors]\n{name} = {module}\n")
    if source:
        (site / f"{module}.py").write_text(source)


def test_broken_plug_ins_become_notes_and_take_nothing_away(
    checkout: Path, runs: Path, tmp_path: Path
) -> None:
    distribution(tmp_path, "missing", "no_such_module", "")
    distribution(tmp_path, "stumbles", "stumbles", "raise RuntimeError('no licence')\n")
    distribution(tmp_path, "broken", "broken", BROKEN)
    said = check(checkout, tmp_path, runs / "noisy")
    plain = check(checkout, tmp_path / "nothing", runs / "noisy")
    assert said["findings"] == plain["findings"]
    notes = " ".join(said["notes"])
    assert "no_such_module" in notes
    assert "no licence" in notes
    assert "ZeroDivisionError" in notes
    assert "answers_nonsense failed" in notes
    assert "cries_wolf failed" in notes
