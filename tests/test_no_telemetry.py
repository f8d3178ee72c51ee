"""Nothing is sent anywhere: a training, a check, a scan and the dashboard with a guard on all sockets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Python imports this by itself when it starts, in every process that has its folder on the path: connections
#: to other machines are recorded and fail, and so do questions for names.
GUARD = """
import os, sys

def local(host):
    host = host.decode() if isinstance(host, bytes) else host
    return host in (None, "", "localhost", "::1", "0.0.0.0") or str(host).startswith("127.")

def guard(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1] if len(args) > 1 else None
        host = address[0] if isinstance(address, tuple) else None  # else a socket of this machine
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = args[0]
    else:
        return
    with open(os.environ["GUARD_SEEN"], "a") as file:
        file.write(f"{'local' if local(host) else 'outside'} {event} {host}\\n")
    if not local(host):
        raise OSError(f"the guard does not let {event} reach {host}")

sys.addaudithook(guard)
"""

PROGRAM = """
import re, threading, urllib.request
import torch
from torch import nn
from layerwatch import watch
from layerwatch.cli import main
from layerwatch.dashboard import create_app
from layerwatch.dashboard.serving import listen, over

PAGES = ["/", "/fleet", "/problems", *(f"/run/a/{page}" for page in ("overview", "layer", "drift", "alerts"))]

def train():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(net.parameters())
    with watch(net, optimizer, run="runs/a", every=1) as watcher:
        for step in range(12):
            loss = net(torch.randn(16, 4)).square().mean()
            loss.backward(); optimizer.step(); optimizer.zero_grad()
            watcher.log(train_loss=loss, val_loss=loss)

def read():
    for arguments in (["check", "runs/a", "--junit", "report.xml"], ["runs"], ["scan", "runs"],
                      ["scan", "runs", "--engine", "processes", "--workers", "1", "--out", "other.parquet"]):
        assert main(arguments) == 0, arguments

def serve():
    listener, app = listen("127.0.0.1", 0), create_app("runs")
    threading.Thread(target=over(listener, app).run, daemon=True).start()
    for page in [*PAGES, "/_dash-layout", "/_dash-dependencies", "/healthz"]:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}{page}"
        with urllib.request.urlopen(address, timeout=60) as answer:
            html = answer.read().decode(errors="replace")
        for link in re.findall(r'(?:src|href)="([^"]+)"', html):
            assert not re.match(r"(?:https?:)?//", link), (page, link)
    app.server.extensions["layerwatch"].judgement("a", wait=60)  # detectors, in a process of their own

if __name__ == "__main__":
    train()
    read()
    serve()
    print("done")
"""


def guarded(program: str, tmp_path: Path, checkout: Path) -> tuple[subprocess.CompletedProcess[str], str]:
    """Runs a program under the guard; what the guard has seen."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    (tmp_path / "program.py").write_text(program)
    seen = tmp_path / "seen"
    paths = os.pathsep.join([str(tmp_path / "guard"), str(checkout)])
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": paths, "GUARD_SEEN": str(seen)},
    )  # fmt: skip
    return done, seen.read_text() if seen.exists() else ""


def test_no_other_machine_is_asked_for_or_told_anything(tmp_path: Path, checkout: Path) -> None:
    done, seen = guarded(PROGRAM, tmp_path, checkout)
    assert "outside" not in seen, seen
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")
    assert "local socket.connect 127.0.0.1" in seen  # our own pages: the guard was there


@pytest.mark.parametrize("where", ["http://192.0.2.1/", "http://example.invalid/"])
@pytest.mark.parametrize("process", ["here", "a child"])
def test_the_guard_sees_and_stops_what_goes_outside(
    tmp_path: Path, checkout: Path, where: str, process: str
) -> None:
    ask = f"import urllib.request; urllib.request.urlopen({where!r}, timeout=5)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ask!r}], check=True)"
    done, seen = guarded(ask if process == "here" else child, tmp_path, checkout)
    assert done.returncode == 1
    assert "the guard does not let" in done.stderr
    assert seen.startswith("outside ")
