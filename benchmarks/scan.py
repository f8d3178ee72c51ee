"""What scanning many runs costs: by engine, by number of workers, by size of a run.

    python benchmarks/scan.py [--runs 40 1000] [--workers 1 2] [--folder DIR] [--only PART ...]

The runs are made, not trained, by the writer that a training uses (see benchmarks/detectors.py): eight runs
of 24 tensors and 8 modules in 40 captures, weights, gradients, updates, drift and activations with histograms
and 200 losses; the others are copies with another name, identity and date. Times are those of the whole
command in a fresh process, start of Python included; with one run they are the cost of starting.
`sizes` reads one run of each size in a fresh process, and tells its peak memory. `store` scans 40 runs, and
the largest one, on an S3 server of this machine (moto), and counts requests. Files come from the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import detectors

from layerwatch.monitor.description import write_json

ROOT = Path(__file__).resolve().parents[1]
KINDS, TENSORS, MODULES, CAPTURES = 8, 24, 8, 40
SIZES = [(24, 40), (100, 200), (300, 300), (1000, 1000)]
LIVE = SIZES[:3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
READ = """
import json, sys, time
from layerwatch.monitor.fleet import scan_run
scan_run(sys.argv[2])
began, used = time.perf_counter(), time.process_time()
row = scan_run(sys.argv[1]).to_pylist()[0]
took, used = time.perf_counter() - began, time.process_time() - used
(peak,) = [l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")]
print(json.dumps([took, used, int(peak) / 1024, row["bytes"], row["health"], row["error"]]))
"""


def make_runs(folder: Path, count: int) -> Path:
    """So many runs below a folder."""
    place = folder / f"runs-{count}"
    if place.exists():
        return place
    part = folder / f"runs-{count}.part"
    shutil.rmtree(part, ignore_errors=True)
    kinds = [folder / f"kind-{number}" for number in range(KINDS)]
    for kind in kinds:
        if not kind.exists():
            detectors.make(kind, TENSORS, CAPTURES, MODULES, every=5, live=False)
    for number in range(count):
        run = part / f"sweep-{number // 100:02}" / f"run-{number:05}"
        shutil.copytree(kinds[number % KINDS], run)
        info = json.loads((run / "run.json").read_text())
        info.pop("checksum")
        write_json(
            run / "run.json", {**info, "name": run.name, "id": f"{number:032x}", "created": 1.79e9 + number}
        )
    part.rename(place)
    return place


def command(root: str, out: Path, *more: str) -> float:
    """Seconds of a scan in a fresh process."""
    began = time.perf_counter()
    arguments = [sys.executable, "-m", "layerwatch", "scan", root, "--out", str(out), *more]
    subprocess.run(
        arguments, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return time.perf_counter() - began


def ways(workers: list[int]) -> dict[str, list[str]]:
    """The engines as they are compared."""
    found = {"serial": ["--engine", "serial"]}
    for engine in ("processes", "dask"):
        for count in workers:
            found[f"{engine}, {count}"] = ["--engine", engine, "--workers", str(count)]
    return found


def engines(folder: Path, counts: list[int], workers: list[int], repeats: int) -> None:
    """All engines on the same runs, one after the other in each round."""
    for count in [1, *counts]:
        root = make_runs(folder, count)
        size = sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) / max(count, 1)
        rounds = repeats if count <= 100 else 1
        times: dict[str, list[float]] = {name: [] for name in ways(workers)}
        for _ in range(rounds):
            for name, options in ways(workers).items():
                with tempfile.TemporaryDirectory() as out:
                    times[name].append(command(str(root), Path(out) / "t.parquet", *options))
        serial = statistics.median(times["serial"])
        print(f"\n{count:,} runs, {size / 1e3:,.0f} kB each; {rounds} rounds")
        for name, seconds in times.items():
            middle = statistics.median(seconds)
            spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
            print(f"  {name:14} {middle:8.2f} s  ({spread})  {count / middle:7.2f} runs/s  "
                  f"{serial / middle:5.2f} x serial", flush=True)  # fmt: skip
        with tempfile.TemporaryDirectory() as out:
            table = Path(out) / "t.parquet"
            command(str(root), table, "--engine", "processes")
            again = command(str(root), table)
            row = table.stat().st_size / count
            print(f"  nothing changed {again:7.2f} s; the table has {row:,.0f} bytes a run", flush=True)


def sizes(folder: Path) -> None:
    """One run of each size."""
    warm = make_runs(folder, 1)
    print("\none run: tensors x captures (5 kinds of rows), reading and judging it, in a fresh process")
    print("live: a part of it in write-ahead files; in brackets seconds of a processor")
    for (tensors, captures), live in [(size, False) for size in SIZES] + [(size, True) for size in LIVE]:
        run = folder / f"size-{tensors}-{captures}{'-live' * live}"
        if not run.exists():
            part = run.with_name(f"{run.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            detectors.make(part, tensors, captures, tensors // 5, live=live)
            part.rename(run)
        first = next(warm.rglob("run.json")).parent
        done = subprocess.run(
            [sys.executable, "-c", READ, str(run), str(first)], check=True, capture_output=True, text=True,
            env=ENVIRONMENT,
        )  # fmt: skip
        seconds, used, peak, size, health, error = json.loads(done.stdout)
        print(f"  {tensors:5,} x {captures:5,} {'live' * live:4} {seconds:8.2f} s  ({used:.2f})  "
              f"{peak:7,.0f} MB at most  "
              f"{size / 1e6:8.1f} MB of log  {health}{error or ''}", flush=True)  # fmt: skip


def store(folder: Path, workers: list[int]) -> None:
    """The runs on an S3 server."""
    from pyarrow import fs

    sys.path.insert(0, str(ROOT))
    from tests.object_server import CREDENTIALS, ObjectServer

    root = make_runs(folder, 40)
    os.environ.update(CREDENTIALS)
    with ObjectServer() as server:
        ENVIRONMENT.update({**CREDENTIALS, "AWS_ENDPOINT_URL": server.endpoint})
        os.environ["AWS_ENDPOINT_URL"] = server.endpoint
        server.make_bucket()
        fs.copy_files(str(root), "bucket/runs", destination_filesystem=server.files())
        print("\n40 runs on an S3 server of this machine")
        for name, options in ways(workers).items():
            with tempfile.TemporaryDirectory() as out:
                before, table = server.requests(), Path(out) / "t.parquet"
                seconds = command("s3://bucket/runs", table, *options)
                asked = server.requests() - before
                again = command("s3://bucket/runs", table, *options)
                few = server.requests() - before - asked
            print(f"  {name:14} {seconds:8.2f} s  {asked.total() / 40:5.1f} requests a run; nothing changed: "
                  f"{again:5.2f} s, {few.total()} requests in all", flush=True)  # fmt: skip

        if (run := folder / f"size-{SIZES[-1][0]}-{SIZES[-1][1]}").exists():
            fs.copy_files(str(run), "bucket/large/run", destination_filesystem=server.files())
            with tempfile.TemporaryDirectory() as out:
                before = server.requests()
                seconds = command("s3://bucket/large", Path(out) / "t.parquet")
                asked = server.requests() - before
            print(f"  {run.name}: {seconds:.2f} s, {asked['GET']} GET requests of at most 1 MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[40, 1000], help="(default: 40 1000)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--repeats", type=int, default=3, help="of up to 100 runs (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the runs are made, and found again")
    parser.add_argument("--only", nargs="+", choices=("engines", "sizes", "store"), help="(default: all)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        load: Any = os.getloadavg()
        print(f"{os.cpu_count()} cores, load {load[0]:.1f} at the start")
        wanted = options.only or ("engines", "sizes", "store")
        if "engines" in wanted:
            engines(folder, options.runs, options.workers, options.repeats)
        if "sizes" in wanted:
            sizes(folder)
        if "store" in wanted:
            store(folder, options.workers)


if __name__ == "__main__":
    main()
