"""How large the machine for a group must be: memory of the scan and of the dashboard, and the scan's time.

    python benchmarks/operations.py [--runs 300] [--workers 2] [--repeats 3] [--folder DIR]

The runs are those of benchmarks/scan.py, 215 kB each. Each command is a fresh process with one thread for
numpy; its peak is that of the process itself and of the largest of its workers. Times are those of the whole
command, as processor time, too, since the machine may have other things to do. The dashboard is `layerwatch
dashboard` over the folder, without a table and with one: its resident memory when it answers, and after its
pages have been asked for; and of the process that runs its detectors, where there is one. Medians.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil
import scan

PEAK = """
import json, os, resource, sys, time
from layerwatch.cli import main
began = time.perf_counter()
code = main(sys.argv[1:])
(peak,) = [l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")]
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
cpu = sum(one.ru_utime + one.ru_stime for one in used)
took = time.perf_counter() - began
print(json.dumps([took, cpu, int(peak) * 1.024e-3, used[1].ru_maxrss * 1.024e-3]), file=sys.stderr)
sys.exit(code)
"""
#: How long a dashboard is looked at, in seconds: it reads the runs meanwhile.
LOOK_SECONDS = 60.0


def measured(*arguments: str) -> list[float]:
    """Wall and processor seconds of a command; peak MB of its process, and of its largest worker."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], check=True, capture_output=True, text=True,
        env=scan.ENVIRONMENT,
    )  # fmt: skip
    return json.loads(done.stderr.splitlines()[-1])


def scans(root: Path, out: Path, workers: int, repeats: int) -> None:
    """From nothing, by one process and by several, and once more with nothing changed."""
    count = sum(1 for _ in root.rglob("run.json"))
    ways = {"serial": ["--engine", "serial"]}
    ways[f"processes, {workers}"] = ["--engine", "processes", "--workers", str(workers)]
    for name, options in ways.items():
        rounds = []
        for number in range(repeats):
            table = out / f"{number}-{name}.parquet"
            rounds.append(measured("scan", str(root), "--out", str(table), *options))
        again = measured("scan", str(root), "--out", str(table))
        wall, cpu, peak, worker = (statistics.median(numbers) for numbers in zip(*rounds, strict=True))
        workers_peak = f", {worker:.0f} MB a worker" if worker else ""
        print(f"scan, {name}: {wall:.1f} s, {count / wall:.1f} runs/s, {count / cpu:.1f} a second of a "
              f"processor; peak {peak:.0f} MB{workers_peak}; nothing changed: {again[0]:.1f} s, "
              f"{again[2]:.0f} MB", flush=True)  # fmt: skip


def dashboard(root: Path, what: str) -> None:
    """Resident memory of the dashboard, and of the processes that it starts."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    cache = tempfile.TemporaryDirectory()
    server = subprocess.Popen(
        [sys.executable, "-m", "layerwatch", "dashboard", str(root), "--port", str(port)],
        env={**scan.ENVIRONMENT, "LAYERWATCH_CACHE": cache.name},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        process, began = psutil.Process(server.pid), time.monotonic()
        while not answers(port, "/healthz"):
            if server.poll() is not None or time.monotonic() - began > LOOK_SECONDS:
                raise RuntimeError("the dashboard does not start")
            time.sleep(0.2)
        first, most, helper = resident(process), 0.0, 0.0
        began = time.monotonic()
        while time.monotonic() - began < LOOK_SECONDS:
            for page in ("/", "/fleet", "/_dash-layout", "/_dash-dependencies"):
                answers(port, page)
            most = max(most, resident(process))
            helper = max([helper, *map(resident, process.children(recursive=True))])
            time.sleep(1.0)
    finally:
        server.terminate()
        server.wait()
        cache.cleanup()
    print(f"dashboard, {what}: {first:.0f} MB when it answers, {most:.0f} MB at most in "
          f"{LOOK_SECONDS:.0f} s; its largest child {helper:.0f} MB", flush=True)  # fmt: skip


def answers(port: int, page: str) -> bool:
    """Whether it does."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=60) as answer:
            return bool(answer.read())
    except OSError:
        return False


def resident(process: psutil.Process) -> float:
    """MB; 0 of one that has ended."""
    try:
        return process.memory_info().rss / 1e6
    except psutil.NoSuchProcess:
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the runs are made, and found again")
    options = parser.parse_args()
    os.environ["no_proxy"] = "*"
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
        root = scan.make_runs(folder, options.runs)
        table = root / "layerwatch-scan.parquet"
        table.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as out:
            scans(root, Path(out), options.workers, options.repeats)
        dashboard(root, "without a table")
        measured("scan", str(root))
        dashboard(root, "with a table")
        table.unlink()


if __name__ == "__main__":
    main()
