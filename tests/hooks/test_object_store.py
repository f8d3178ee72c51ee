"""`watch(run="s3://...")`: a training whose log goes to an object store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from trainings import mlp, train

from layerwatch import Run, watch
from layerwatch.monitor import RunExistsError
from layerwatch.monitor.spool import send_spool, spooled
from tests.object_server import ObjectServer

URL = "s3://bucket/group/exp1"


@pytest.fixture
def server(object_server: ObjectServer) -> ObjectServer:
    object_server.make_bucket()
    return object_server


def trained(run: str | Path, steps: int = 6, **options: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with watch(model, optimizer, run=run, every=1, **options) as watcher:  # type: ignore[arg-type]
        train(model, optimizer, steps)
        watcher.log(train_loss=1.0)
        assert str(watcher.run) == str(run)
    return model, optimizer


def test_a_run_on_a_store_is_the_run_in_a_folder(tmp_path: Path, server: ObjectServer) -> None:
    trained(tmp_path / "local")
    trained(URL)
    here, there = Run(tmp_path / "local"), Run(URL)
    assert there.name == "exp1"
    assert there.info["closed"]
    assert not there.live
    for kind in here.kinds():
        pd.testing.assert_frame_equal(
            there.stats(kind).drop(columns="time"), here.stats(kind).drop(columns="time")
        )
    assert there.scalars("train_loss")["value"].tolist() == [1.0]
    assert spooled() == []  # nothing is left on this machine


def test_a_run_is_never_overwritten_and_can_be_resumed(tmp_path: Path, server: ObjectServer) -> None:
    model, optimizer = trained(URL)
    with pytest.raises(RunExistsError, match=r"resume=True"):
        trained(URL)
    with watch(model, optimizer, run=URL, every=1, resume=True) as watcher:
        assert watcher.step == 6
        train(model, optimizer, 3)
    assert sorted(set(Run(URL).stats("weight")["step"])) == list(range(9))
    assert Run(URL).sessions()["first_step"].tolist() == [0, 6]


def test_an_outage_of_the_store_is_none_of_the_training(
    server: ObjectServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("layerwatch.monitor.remote.STALLED_SECONDS", 0.5)
    monkeypatch.setattr("layerwatch.monitor.remote.ATTEMPTS", 1)
    monkeypatch.setattr("layerwatch.hooks.watcher.Watcher._send.__defaults__", (2.0,))
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    watcher = watch(model, optimizer, run=URL, every=1)
    server.stop()
    train(model, optimizer, 5)
    watcher.close()
    assert f"`layerwatch upload {URL}` sends them" in caplog.text
    assert spooled() == [URL]
    assert watcher._uploader is not None
    watcher._uploader._thread.join()  # in a real training the process would have ended
    server.start()
    assert send_spool(URL) > 0
    assert sorted(set(Run(URL).stats("weight")["step"])) == list(range(5))
    assert spooled() == []


CHILD = """
import sys, torch
from layerwatch import watch
from layerwatch.hooks import watcher as watching
watching.UPLOAD_GRACE = 100.0  # a slow machine may take long to send a log
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
optimizer = torch.optim.Adam(model.parameters(), 0.01)
watcher = watch(model, optimizer, run=sys.argv[1], every=1)
for step in range(100_000):
    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    print(step, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_training_that_is_ended(server: ObjectServer, checkout: Path, number: int) -> None:
    """SIGTERM sends the rest, as the machine may go with the process; after kill -9 somebody must."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, URL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stderr is not None
        last = 0
        for line in child.stdout:
            last = int(line)
            if last == 20:
                child.send_signal(number)
        said = child.stderr.read()
    assert (child.returncode, said) == (-number, "")
    if number == signal.SIGKILL:
        assert spooled() == [URL]
        assert send_spool(URL) > 0
    assert spooled() == []
    steps = sorted(set(Run(URL).stats("weight")["step"]))
    assert steps[: last + 1] == list(range(last + 1))
    assert len(steps) <= last + 2
