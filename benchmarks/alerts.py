"""What alerts cost a training: a channel that answers at once and one that hangs against none, as ratios.

    python benchmarks/alerts.py [--rounds 15] [--steps 150]

The worst case: a training that is sick from its tenth step, judged five times a second, and told again at
every look. Each round trains the same network under each kind once, in random order, and takes the wall
clock and the processor time of its steps; a ratio is to "none" of the same round, "none again" shows the
noise. The servers are processes of their own. What the end waits for is measured apart.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import socket
import statistics
import tempfile
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwatch import watch
from layerwatch.hooks import live

KINDS = ("none", "none again", "fast", "hanging")


def serve(kind: str, told: Connection) -> None:
    """A server that answers at once, or takes what is posted and never answers."""
    if kind == "hanging":
        with socket.create_server(("127.0.0.1", 0)) as listening:
            told.send(listening.getsockname()[1])
            kept = []
            while True:
                kept.append(listening.accept())

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    told.send(server.server_address[1])
    server.serve_forever()


def started(kind: str) -> tuple[Any, str]:
    """A server's process and its URL."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(kind, theirs), daemon=True)
    process.start()
    return process, f"http://127.0.0.1:{ours.recv()}/hook"


def train(kind: str, folder: Path, steps: int) -> dict[str, float]:
    """Seconds of all steps, of the process in them, and of the end; how many messages are on record."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *[m for _ in range(6) for m in (nn.Linear(256, 256), nn.ReLU())], nn.Linear(256, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(256, 256), torch.randint(0, 10, (256,))
    variable = f"BENCHMARK_{kind.upper()}_URL"
    settings = {
        "channels": {"c": {"type": "webhook", "url_env": variable}}, "repeat": "0s", "digest": "0s",
    }  # fmt: skip
    alerts: Any = False if kind.startswith("none") else settings
    watcher = watch(model, optimizer, run=folder, every=5, alerts=alerts, on_finding=lambda finding: None)
    began = cpu = 0.0
    for step in range(steps + 10):
        if step == 10:
            began, cpu = time.perf_counter(), time.process_time()
        loss = nn.functional.cross_entropy(model(x), y) * (float("nan") if step >= 10 else 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watcher.log(train_loss=loss)
    wall, used, end = time.perf_counter() - began, time.process_time() - cpu, time.perf_counter()
    watcher.close()
    closed = time.perf_counter() - end
    from layerwatch import Run

    told = (Run(folder).events()["event"] == "alert").sum()
    return {"wall": wall, "cpu": used, "end": closed, "records": float(told)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("layerwatch").setLevel(logging.CRITICAL)
    live.CHECK_SECONDS, live.CHECK_SHARE = 0.2, 1e9
    os.environ["no_proxy"] = "*"
    servers = []
    for kind in ("fast", "hanging"):
        server, os.environ[f"BENCHMARK_{kind.upper()}_URL"] = started(kind)
        servers.append(server)
    taken: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    try:
        with tempfile.TemporaryDirectory() as folder:
            train("none", Path(folder) / "warm-up", options.steps)
            for round_ in range(options.rounds):
                for kind in random.Random(round_).sample(KINDS, len(KINDS)):
                    taken[kind].append(train(kind, Path(folder) / f"{kind}-{round_}", options.steps))
    finally:
        for server in servers:
            server.kill()
    report(taken, options.steps)


def report(taken: dict[str, list[dict[str, float]]], steps: int) -> None:
    base = taken["none"]
    step = 1e3 * statistics.median(t["wall"] for t in base) / steps
    print(f"none: {step:.2f} ms a step; load {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")
    print(f"{'kind':12s} {'wall clock':>24s} {'processor time':>24s} {'end, s':>8s} {'records':>8s}")
    for kind, rounds in taken.items():
        cells = []
        for what in ("wall", "cpu"):
            ratios = [t[what] / b[what] for t, b in zip(rounds, base, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        end = statistics.median(t["end"] for t in rounds)
        records = statistics.median(t["records"] for t in rounds)
        print(f"{kind:12s} {cells[0]:>24s} {cells[1]:>24s} {end:8.2f} {records:8.0f}")


if __name__ == "__main__":
    main()
