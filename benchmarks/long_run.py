"""Reading, compacting and keeping long logs: how fast, how much memory, how large.

    python benchmarks/long_run.py [--captures 2000] [--long 100000] [--folder DIR]

The rows are made, not measured: 1,000 tensors with 65 buckets each, counts and sums drawn at random, so that
they compress worse than real ones (benchmarks/log_size.py has those). Everything else is the code that a
training runs. For the long run (one kind, keep="rollup") the rows of the level of 16 captures are made, and
the newest 2,048 captures in full: making 100 million full rows would take hours. Coarser levels are rolled up
from them.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from layerwatch.monitor import Run
from layerwatch.monitor.bins import KEPT, roll_up_run, thin_out
from layerwatch.monitor.compact import never
from layerwatch.monitor.description import write_json
from layerwatch.monitor.parts import PartWriter
from layerwatch.monitor.schema import FACTORS, ROLLUP, SCHEMA_VERSION, SCHEMAS, TABLES, rollup_table
from layerwatch.monitor.spans import Span
from layerwatch.monitor.tiers import merge_parts

KINDS = ("gradient", "update", "weight")
BUCKETS = 65
#: Captures in a write-ahead file of 32 MB with 1,000 rows each, about, and bins that are rolled up at once.
PER_FILE, BINS_PER_FILE = 100, 128
PERIOD = 0.5  # seconds from step to step


def tensors(count: int) -> list[str]:
    return sorted(f"transformer.h.{i // 8}.mlp.c_proj.part{i % 8}.weight" for i in range(count))


def made(names: list[str], kind: str, first: int, number: int, factor: int = 1) -> pa.Table:
    """Sorted rows of `number` captures, or bins of `factor` captures, of each tensor."""
    rng = np.random.default_rng([first, KINDS.index(kind), factor])
    rows, schema = len(names) * number, ROLLUP if factor > 1 else TABLES["stats"]
    half = np.sort(np.random.default_rng(0).choice(np.arange(380, 500), BUCKETS // 2 + 1, replace=False))
    buckets = np.concatenate([-half[: BUCKETS // 2][::-1], half]).astype(np.int16)
    shares = np.random.default_rng(1).dirichlet(np.full(BUCKETS, 3.0), len(names)) * 1e5 * factor
    noise = 1 + 0.02 * rng.standard_normal((len(names), number, BUCKETS), np.float32)
    counts = np.maximum(1, shares[:, None] * noise).astype(np.int64).reshape(rows, BUCKETS)
    places = pa.array(np.arange(rows + 1, dtype=np.int32) * BUCKETS)
    capture = np.tile(np.arange(first, first + number, dtype=np.int64) * factor, len(names))
    drawn = {n: rng.standard_normal(rows) ** 2 for n in ("sum_sq", "ref_sum_sq", "sum_sq_min", "sum_sq_max")}
    columns = {
        **drawn, "sum": rng.standard_normal(rows), "dot": rng.standard_normal(rows),
        "min": -drawn["sum_sq"], "max": drawn["ref_sum_sq"], "ratio_sq_max": drawn["sum_sq_max"],
        "tensor": np.repeat(np.array(names, object), number), "kind": np.full(rows, kind, object),
        "state": np.full(rows, "trainable", object), "skipped": np.zeros(rows, np.bool_),
        "step": capture * 10, "last_step": (capture + factor - 1) * 10, "time": 1.7e9 + capture * 10 * PERIOD,
        "capture": capture, "captures": np.full(rows, factor), "count": counts.sum(1),
        "buckets": pa.ListArray.from_arrays(places, pa.array(np.tile(buckets, rows))),
        "counts": pa.ListArray.from_arrays(places, pa.array(counts.ravel())),
    }  # fmt: skip
    if kind != "update":
        columns = {n: c for n, c in columns.items() if n not in ("ref_sum_sq", "dot", "ratio_sq_max")}
    zeros = pa.array(np.zeros(rows, np.int64))
    missing = {f.name: pa.nulls(rows, f.type) if f.nullable else zeros for f in schema}
    return pa.table({name: {**missing, **columns}[name] for name in schema.names}, schema=schema)


def write_parts(run: Path, names: list[str], kinds: list[str], first: int, captures: int) -> None:
    """Parts of full rows, as the finished write-ahead files of a training leave them."""
    for table in TABLES:
        (run / table).mkdir(parents=True, exist_ok=True)
    per_file = max(1, PER_FILE // len(kinds))
    for number, start in enumerate(range(0, captures, per_file), first // per_file + 1):
        span = Span("r0", number, number)
        size = min(per_file, captures - start)
        for table in TABLES:
            with PartWriter(run / table / f"{span.stem}.parquet", table) as part:
                for kind in kinds if table == "stats" else []:
                    part.write(made(names, kind, first + start, size))
    write_info(run, names)


def write_info(run: Path, names: list[str]) -> None:
    described = [
        {"tensor": t, "names": [t], "role": "matrix", "shape": [300, 333], "elements": 99_900,
         "dtype": "float32", "module": t.rpartition(".")[0], "module_type": "Linear", "trainable": True,
         "state": "trainable"}
        for t in names
    ]  # fmt: skip
    info = {
        "schema_version": SCHEMA_VERSION,
        "name": run.name,
        "created": 1.7e9,
        "closed": True,
        "host": "made",
    }
    write_json(run / "run.json", {**info, "keep": "full", "tensors": described, "modules": [], "notes": []})


COMPACT = """
import resource, sys, time
from pathlib import Path
from layerwatch.monitor import compact
start = time.perf_counter()
compact(Path(sys.argv[1]))
used = resource.getrusage(resource.RUSAGE_SELF)
(peak,) = [l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")]
print(time.perf_counter() - start, used.ru_utime + used.ru_stime, int(peak) / 1024)
"""


def in_child(run: Path) -> list[float]:
    """Compaction in a process of its own: seconds, CPU seconds, MB of memory at most (Linux only)."""
    command = [sys.executable, "-c", COMPACT, str(run)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(number) for number in done.stdout.split()]


def timed(query: Callable[[], object], repeats: int = 9) -> str:
    """Milliseconds after a first time: the median, and the least, which other work on the machine disturbs
    less."""
    query()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        query()
        taken.append((time.perf_counter() - start) * 1e3)
    return f"{statistics.median(taken):.0f} ms ({min(taken):.0f})"


def line(what: str, tool: str, value: str, target: str = "") -> None:
    print(f"{what:58} {tool:22} {value:>20} {target}", flush=True)


def read_back(run: Path, names: list[str], captures: int) -> None:
    """One tensor's history, and one step of all tensors, from compacted parts."""
    import duckdb
    import pandas as pd

    (part,) = (run / "stats").glob("*.parquet")
    meta = pq.read_metadata(part)
    print(f"{part.name}: {meta.num_rows:,} rows, {part.stat().st_size / meta.num_rows:.0f} bytes a row, "
          f"{meta.num_row_groups} row groups, footer {meta.serialized_size / 1e6:.2f} MB")  # fmt: skip
    tensor, kind, step = names[len(names) // 2 + 1], KINDS[0], captures // 2 * 10
    one = [("tensor", "=", tensor), ("kind", "=", kind)]
    narrow = ["step", "tensor", "kind", "sum_sq", "captures", "count", "nans"]
    where = f"FROM '{part}' WHERE kind = '{kind}' AND"
    chosen = ", ".join(narrow)
    database = duckdb.connect()
    assert pq.read_table(part, filters=one).num_rows == captures
    history: list[tuple[str, Callable[[], object], str]] = [
        ("pyarrow", lambda: pq.read_table(part, filters=one), "< 50"),
        ("pandas", lambda: pd.read_parquet(part, filters=one), "< 50"),
        ("DuckDB", lambda: database.sql(f"SELECT * {where} tensor = '{tensor}'").to_arrow_table(), "< 100"),
        ("Run.stats, opened", lambda: Run(run).stats(kind, tensor=tensor), ""),
    ]
    for tool, query, target in history:
        line(f"one tensor, {captures:,} captures, all columns", tool, timed(query), target)
    opened = Run(run)
    others = cycle(names)
    line("", "Run.stats, another one", timed(lambda: opened.stats(kind, tensor=next(others))))
    every: list[tuple[str, Callable[[], object], str]] = [
        ("DuckDB", lambda: database.sql(f"SELECT {chosen} {where} step = {step}").to_arrow_table(), "< 100"),
        (
            "pyarrow",
            lambda: pq.read_table(part, columns=narrow, filters=[("step", "=", step), one[1]]),
            "< 100",
        ),
        ("pyarrow, dictionaries", lambda: coded_step(part, narrow, kind, step), "< 100"),
        ("Run.stats, opened", lambda: Run(run).stats(kind, columns=["norm"], steps=(step, step)), "< 100"),
    ]
    for tool, query, target in every:
        line(f"one step of {len(names):,} tensors, {len(narrow)} columns", tool, timed(query), target)
    steps = cycle(range(0, 10 * captures, 10))
    another = partial(opened.stats, kind, columns=["norm"])
    line("", "Run.stats, another one", timed(lambda: another(steps=(s := next(steps), s))), "< 100")


def coded_step(part: Path, columns: list[str], kind: str, step: int) -> pa.Table:
    """pyarrow with strings as dictionaries: they are not copied for every row."""
    import pyarrow.dataset as ds

    options = ds.ParquetReadOptions(dictionary_columns=["tensor", "kind"])
    table = ds.dataset(part, format=ds.ParquetFileFormat(read_options=options))
    return table.to_table(columns=columns, filter=(ds.field("kind") == kind) & (ds.field("step") == step))


def fine(folder: Path, names: list[str], captures: int, kinds: list[str]) -> None:
    run = folder / f"kinds-{len(kinds)}"
    print(f"\n{len(names):,} tensors x {captures:,} captures, {len(kinds)} kind{'s' * (len(kinds) > 1)}")
    write_parts(run, names, kinds, 0, captures)
    files = len(list((run / "stats").iterdir()))
    seconds, cpu, peak = in_child(run)
    line(f"compaction of {files} parts, with roll-ups", "time", f"{seconds:.0f} s, CPU {cpu:.0f} s")
    line("", "peak memory", f"{peak:.0f} MB", "< 300")
    read_back(run, names, captures)


def long(folder: Path, names: list[str], captures: int) -> None:
    """A run of so many captures whose old rows are kept as roll-ups."""
    run, kind = folder / "long", "weight"
    print(f'\n{len(names):,} tensors x {captures:,} captures, one kind, keep="rollup"')
    newest = captures - KEPT // FACTORS[0] * FACTORS[0]
    write_parts(run, names, [kind], newest, captures - newest)
    level = run / rollup_table(FACTORS[0])
    level.mkdir()
    start = time.process_time()
    making = 0.0
    bins = captures // FACTORS[0]
    for first in range(0, bins, BINS_PER_FILE):
        span = Span("r0-s0", first, min(first + BINS_PER_FILE, bins) - 1)
        began = time.process_time()
        rows = made(names, kind, first, span.last - first + 1, FACTORS[0])
        making += time.process_time() - began
        with PartWriter(level / f"{span.stem}.parquet", level.name) as part:
            part.write(rows)
        advance_levels(run, (span.last + 1) * FACTORS[0])
    advance_levels(run, captures, over=True)
    used = time.process_time() - start - making
    for table in TABLES:
        merge_parts(run, table, "r0", whole=True, stop=never)
    line("writing, rolling up, merging, removing", "CPU", f"{used:.0f} s")
    total = 0
    for table in SCHEMAS:
        sizes = [p.stat().st_size for p in (run / table).glob("*.parquet")]
        total += sum(sizes)
        rows = sum(pq.read_metadata(p).num_rows for p in (run / table).glob("*.parquet"))
        if rows:
            line(f"size of {table}", f"{len(sizes)} files", f"{sum(sizes) / 1e6:,.0f} MB", f"{rows:,} rows")
    full = captures * len(names)
    line("size in all", "", f"{total / 1e6:,.0f} MB", f'keep="full" would have {full:,} rows besides')
    overview(run, kind)


def advance_levels(run: Path, complete: int, *, over: bool = False) -> None:
    """What `compact.advance` does after the write-ahead files became parts."""
    roll_up_run(run, "r0", {0: complete}, over=over, keep="rollup", stop=never)
    for factor in FACTORS:
        merge_parts(run, rollup_table(factor), "r0-s0", stop=never)
    thin_out(run, "r0")


def overview(run: Path, kind: str) -> None:
    """The whole run at a glance."""
    folder = run / rollup_table(FACTORS[1])
    columns = ["step", "last_step", "tensor", "sum_sq", "captures", "sum_sq_max"]
    plain = timed(lambda: pq.read_table(folder, columns=columns, filters=[("kind", "=", kind)]))
    line("overview of all tensors: the level of 256 captures", "pyarrow", plain, "< 100")
    steps, *_, values, _ = Run(run).overview(kind)
    opening = timed(lambda: Run(run).overview(kind))
    line(
        f"overview of {values.shape[0]:,} tensors x {len(steps)} points",
        "Run.overview, opened",
        opening,
    )
    opened = Run(run)

    def again() -> None:
        opened._answers.clear()  # what was answered before would be given again
        opened.overview(kind)

    line("", "Run.overview, footers known", timed(again), "< 100")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tensors", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--captures", type=int, default=2000, help="kept in full (default: %(default)s)")
    parser.add_argument("--long", type=int, default=100_000, help="of the long run (default: %(default)s)")
    parser.add_argument("--kinds", type=int, nargs="*", default=[1, 3], help="kinds of rows (default: 1 3)")
    parser.add_argument("--folder", type=Path, help="where the logs are written and left (default: removed)")
    options = parser.parse_args()
    pa.set_cpu_count(2)
    names = tensors(options.tensors)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for kinds in options.kinds:
            fine(folder, names, options.captures, list(KINDS[:kinds]))
        if options.long:
            long(folder, names, options.long)


if __name__ == "__main__":
    main()
