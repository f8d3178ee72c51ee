"""`layerwatch check --follow` beside a real training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from layerwatch import Run
from layerwatch.cli import main

TRAINING = """
import sys, torch
from torch import nn
from layerwatch import watch
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
optimizer = torch.optim.SGD(net.parameters(), 0.1)
steps, broken, end = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
watcher = watch(net, optimizer, run=sys.argv[1], every=2, live=False)
for step in range(steps):
    x = torch.randn(32, 6)
    loss = nn.functional.cross_entropy(net(x), x[:, :3].argmax(1)) * (float("nan") if step == broken else 1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    watcher.log(train_loss=loss)
if end == "told":
    print("trained", flush=True)
    sys.stdin.readline()
if end == "killed":
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
watcher.close()
"""


@pytest.fixture
def start(tmp_path: Path, checkout: Path) -> Any:
    """Starts a program in the folder of the runs."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        # Shells let what they start in the background ignore interrupts, and children inherit that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=tmp_path, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        signal.signal(signal.SIGINT, before)
        started.append(process)
        return process

    yield begin
    for process in started:
        with process:
            process.kill()


def follow(start: Any, *arguments: str) -> Any:
    """The command as a process with pipes."""
    return start("-m", "layerwatch", "check", "run", "--follow", "--interval", "0.2", *arguments)


def test_it_waits_tells_and_ends_with_the_training(tmp_path: Path, start: Any) -> None:
    watching = follow(start, "--fail-on", "warning")
    assert "waiting" in watching.stderr.readline()  # there is no run yet
    training = start("-c", TRAINING, "run", "150", "40", "told")
    first = watching.stdout.readline()
    assert training.poll() is None  # told while it trains
    assert first.startswith("run, step ")
    assert "critical: nonfinite since step 40" in first
    training.communicate("\n")
    assert training.returncode == 0
    rest, errors = watching.communicate()
    assert watching.returncode == 1
    assert errors == ""
    assert "nonfinite" not in rest  # once
    assert Run(tmp_path / "run").info["closed"]


def test_one_object_a_line(tmp_path: Path, start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("-c", TRAINING, "run", "60", "20", "closed").wait() == 0
    code = main(["check", str(tmp_path / "run"), "--follow", "--format", "json"])
    assert code == 0  # whatever it finds, without --fail-on
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [f.to_dict() for f in Run(tmp_path / "run").findings()]
    assert [{k: v for k, v in t.items() if k != "noticed"} for t in told] == json.loads(json.dumps(expected))
    assert {t["noticed"] for t in told} == {59}
    assert any(t["problem"] == "nonfinite" for t in told)


def test_a_training_that_was_killed_ends_it_too(start: Any) -> None:
    start("-c", TRAINING, "run", "40", "-1", "killed").wait()
    watching = follow(start, "--fail-on", "warning")
    out, errors = watching.communicate()
    assert (watching.returncode, out) == (0, "")
    assert "ended without closing its log" in errors


def test_ctrl_c_ends_it_with_the_verdict_so_far(start: Any) -> None:
    training = start("-c", TRAINING, "run", "20", "10", "told")
    assert training.stdout.readline() == "trained\n"
    # Python drops an interrupt that comes in a destructor, and none that comes while it sleeps.
    watching = follow(start, "--fail-on", "critical", "--interval", "3600")
    while "nonfinite" not in watching.stdout.readline():
        assert watching.poll() is None
    watching.send_signal(signal.SIGINT)
    _, errors = watching.communicate()
    assert watching.returncode == 1
    assert "Traceback" not in errors


def test_seconds_between_two_looks_are_above_zero(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("0", "-1", "nan", "soon"):
        with pytest.raises(SystemExit) as ended:
            main(["check", "run", "--follow", "--interval", wrong])
        assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 4
