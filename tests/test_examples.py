"""Every script in examples/ runs as a user would run it, and prints what its first line promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.object_server import ObjectServer

RunExample = Callable[..., str]


@pytest.fixture
def run_example(checkout: Path, tmp_path: Path) -> RunExample:
    def run(name: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", str(checkout / "examples" / name), *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    return run


def test_all_examples_are_tested(checkout: Path) -> None:
    tests = (Path(__file__), checkout / "tests" / "test_finetuning.py")
    source = "".join(path.read_text(encoding="utf-8") for path in tests)
    untested = [path.name for path in (checkout / "examples").glob("*.py") if f'("{path.name}"' not in source]
    assert untested == []


def test_quickstart_learns_and_the_log_can_be_read_without_us(run_example: RunExample) -> None:
    output = run_example("quickstart.py")
    accuracies = [float(value) for value in re.findall(r"^ *\d+ +(0\.\d+|1\.0+)$", output, re.MULTILINE)]
    assert len(accuracies) == 6
    assert accuracies[-1] > 0.9
    assert "4.bias" in output  # its drift
    assert "critical" not in output

    output = run_example("read_log.py", "runs/quickstart")
    for tensor in ("0.weight", "2.weight", "4.weight", "4.bias"):
        assert len(re.findall(rf"^ *{tensor}\b", output, re.MULTILINE)) == 2  # pandas and DuckDB


def test_linear_reads_three_and_two_back_from_the_log(run_example: RunExample) -> None:
    lines = run_example("linear.py").splitlines()
    fits = [tuple(map(float, re.findall(r"-?\d+\.\d+", line))) for line in lines]
    errors = [abs(weight - 3) + abs(bias - 2) for weight, bias in fits]
    assert len(fits) >= 4
    assert errors[0] > 0.5
    assert errors[-1] < 0.01
    assert errors == sorted(errors, reverse=True)


def test_gan_records_both_models_in_one_run_and_counts_a_batch_as_a_step(run_example: RunExample) -> None:
    output = run_example("gan.py")
    assert "steps 0 to 299, losses critic_loss, generator_loss" in output
    assert output.count("weight") == 4
    assert output.count("bias") == 4


def test_the_trainer_of_transformers(run_example: RunExample) -> None:
    output = run_example("transformers_trainer.py")
    for name in ("train_loss", "val_loss"):
        first, last = map(float, re.findall(rf"^{name}: (\S+) to (\S+)$", output, re.MULTILINE)[0])
        assert last < first / 2
    assert "learning rate 0.01, steps 0 to 59" in output
    assert "model.layers.1.self_attn.q_proj.weight" in output


def test_a_tracker_for_accelerate(run_example: RunExample) -> None:
    output = run_example("accelerate_tracker.py")
    first, last = re.findall(r"^160 losses, (\S+) to (\S+)$", output, re.MULTILINE)[0]
    assert float(last) < float(first) / 2
    assert "steps 0 to 159: two batches make one" in output


def test_the_trainer_of_lightning(run_example: RunExample) -> None:
    output = run_example("lightning_callback.py")
    assert "320 steps, width 64" in output
    first, last = re.findall(r"^val_loss (\S+) to (\S+)$", output, re.MULTILINE)[0]
    assert float(last) < float(first) - 0.1
    assert len(re.findall(r"^(?:net\.[02]|head)\.(?:weight|bias) +\d", output, re.MULTILINE)) == 6


def test_a_loop_with_fabric(run_example: RunExample) -> None:
    output = run_example("fabric.py")
    first, last = re.findall(r"^200 steps, loss (\S+) to (\S+)$", output, re.MULTILINE)[0]
    assert float(last) < float(first) / 10
    assert len(re.findall(r"^[02]\.(?:weight|bias) +\d", output, re.MULTILINE)) == 4


def test_keras_on_torch(run_example: RunExample) -> None:
    output = run_example("keras_callback.py")
    first, last = re.findall(r"^130 steps, val_accuracy (\S+) to (\S+)$", output, re.MULTILINE)[0]
    assert float(last) > max(0.9, float(first))
    assert re.search(r"^ *0\.weight +\[32, 2\]", output, re.MULTILINE)


def test_a_run_on_an_object_store_is_read_back(run_example: RunExample, object_server: ObjectServer) -> None:
    bucket = object_server.make_bucket()
    output = run_example("object_store.py", f"{bucket}/exp1")
    first, last = re.findall(rf"^{bucket}/exp1: 200 steps, loss (\S+) to (\S+)$", output, re.MULTILINE)[0]
    assert float(last) < float(first) / 2
    assert output.count("199 ") == 1
    assert "critical" not in output
