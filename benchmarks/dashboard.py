"""The dashboard in a real Chromium: pages, clicks, bytes and memory, beside TensorBoard.

    python benchmarks/dashboard.py [--folder DIR] [--long RUN] [--repeats 5] [--only PART ...]

The runs are made, not measured (see benchmarks/long_run.py), with fewer buckets a histogram than real ones,
and written by the code that a training runs: 200 layers x 2,000 captured steps of weights, gradients,
updates, activations and drift; 1,000 x 100,000 with keep="rollup"; 500 small runs; a scan table of 5,000; a
run that is written to while it is looked at. `--folder` keeps them for the next time, `--long` takes a run
of long_run.py --folder.

Times are taken in the page, from the click (the change of a control's value, as the browser reports it) to
the last frame that Plotly drew because of it; of a page, from the start of the navigation until every plot is
drawn; on the Layer page every one in view, the others follow. Medians, and the range, of `--repeats`.
A first visit has an empty cache; a warm page is one that was
open before, as after a reload: files cached, scripts compiled (a browser keeps that from the second visit on,
in a profile on disk), and the log read. Bytes are those on the wire. TensorBoard serves the same layers'
weight histograms of every tenth step and the same losses; its page is done when nothing moves any more.
Chromium draws in software: a machine with a graphics card is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
from playwright.sync_api import Browser, BrowserContext, Page, Playwright, sync_playwright

sys.path.insert(0, str(Path(__file__).parent))
import long_run

from layerwatch.monitor import LogWriter
from layerwatch.monitor.description import write_json
from layerwatch.monitor.fleet import COLUMNS, ScanTable, write_table
from layerwatch.monitor.parts import PartWriter
from layerwatch.monitor.schema import GIVEN, TABLES
from layerwatch.monitor.spans import Span
from layerwatch.monitor.summary import bucket_edges

FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
ROOT = Path(__file__).resolve().parents[1]
SERVE = "import sys, pathlib, layerwatch.dashboard as d; d.serve(pathlib.Path(sys.argv[1]), port=0)"
BUCKETS = 17
#: Resolves when every plot is drawn, of those that wait to be seen every one in view, to the milliseconds
#: since the navigation began.
OPENED = """() => new Promise((done) => {
  const drawn = (frame) => {
    const plot = frame.querySelector(".js-plotly-plot");
    return frame.matches(".empty, .failed") || (plot?.data?.length && plot.calcdata?.length);
  };
  const seen = (frame) => frame.getBoundingClientRect().top < innerHeight;
  const look = () => {
    const frames = [...document.querySelectorAll(".plot-frame")].filter((f) => f.offsetParent && seen(f));
    const late = performance.now() > 60000;
    if (late || (frames.length && frames.every((f) => !f.matches(".waiting") && drawn(f))))
      return requestAnimationFrame(() => done(performance.now()));
    requestAnimationFrame(look);
  };
  look();
})"""
#: Does something, then waits until no plot has been drawn and no answer is due for 250 ms.
AFTER = r"""([what, id, value]) => new Promise((done) => {
  let last = 0, seen = new WeakSet(), pending = 0, began;
  const plain = window.fetch;
  window.fetch = (...all) => {
    if (!/_dash-update|api\/plots/.test(String(all[0].url ?? all[0]))) return plain(...all);
    pending += 1;
    return plain(...all).finally(() => { pending -= 1; last = Math.max(last, performance.now()); });
  };
  const follow = () => {
    for (const plot of document.querySelectorAll(".js-plotly-plot")) {
      if (seen.has(plot) || !plot.on) continue;
      seen.add(plot);
      plot.on("plotly_afterplot", () => requestAnimationFrame(() => (last = performance.now())));
    }
    const late = performance.now() - began > 60000;
    if (late || (last && !pending && performance.now() - last > 250)) {
      window.fetch = plain;
      return done(late ? 60000 : last - began);
    }
    setTimeout(follow, 20);
  };
  began = performance.now();
  follow();
  last = 0;
  if (what === "go") window.layerwatch.go(id);
  else window.dash_clientside.set_props(id, { value });
})"""
#: Resolves when rows of a table of runs are on screen, and when the page answers: milliseconds of both.
ROWS = """() => new Promise((done) => {
  const tables = ".first-table, .ag-row, .fleet-table";
  const rows = () => document.querySelector(`:is(${tables}) .run-link`);
  const stands = () => rows() && !document.getElementById("first");
  let first = null;
  const look = () => {
    if (first === null && rows()) return requestAnimationFrame(() => { first = performance.now(); look(); });
    if (first !== null && stands()) return requestAnimationFrame(() => done([first, performance.now()]));
    requestAnimationFrame(look);
  };
  look();
})"""


FLEET = 5000
PROBLEMS = ["nonfinite", "dead_units", "vanishing_gradients", "overfitting", "exploding_gradients"]
#: Sets the filter of the Fleet page; resolves when another table is drawn.
NARROWED = """(text) => new Promise((done) => {
  const old = document.querySelector(".fleet-table"), began = performance.now();
  window.dash_clientside.set_props({ state: "filter" }, { value: text });
  const look = () => document.querySelector(".fleet-table") !== old
    ? requestAnimationFrame(() => done(performance.now() - began)) : requestAnimationFrame(look);
  look();
})"""


class Report:
    """The lines of the result."""

    def __init__(self, repeats: int) -> None:
        self.repeats, self.failed = repeats, 0

    def title(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    def line(self, what: str, values: list[float], unit: str = "ms", target: float | None = None) -> float:
        middle = statistics.median(values)
        spread = f"({min(values):,.4g} to {max(values):,.4g})" if len(values) > 1 else ""
        verdict = "" if target is None else f"<= {target:,.4g}  {'ok' if middle <= target else 'MISSED'}"
        self.failed += target is not None and middle > target
        print(f"  {what:44} {middle:>9,.4g} {unit:3} {spread:24} {verdict}", flush=True)
        return middle


# Runs -------------------------------------------------------------------------------------------------------


def rows(names: list[str], kind: str, first: int, number: int) -> pa.Table:
    """Made rows of any kind."""
    like = "update" if kind in ("update", "drift") else "gradient" if kind == "gradient" else "weight"
    table = long_run.made(names, like, first, number)
    table = table.set_column(table.schema.get_field_index("kind"), "kind", pa.array([kind] * len(table)))
    return table.cast(TABLES["stats"])


def write_run(run: Path, layers: int, captures: int) -> None:
    """One part of each table, as compaction leaves them."""
    names, modules = long_run.tensors(layers), [f"transformer.h.{i}.act" for i in range(layers // 8)]
    kinds = {"activation": modules, "drift": names, "gradient": names, "update": names, "weight": names}
    span = Span("r0", 1, captures // 100)
    for table in TABLES:
        (run / table).mkdir(parents=True, exist_ok=True)
        with PartWriter(run / table / f"{span.stem}.parquet", table) as part:
            if table == "scalars":
                part.write(losses(captures))
            for kind, of in kinds.items() if table == "stats" else ():
                for i in range(0, len(of), 25):
                    part.write(rows(of[i : i + 25], kind, 0, captures))
    long_run.write_info(run, names)
    describe(run, modules=[{"module": m, "type": "GELU"} for m in modules], reference="start")


def losses(number: int) -> pa.Table:
    """Training and validation loss at each captured step."""
    steps = np.repeat(np.arange(number) * 10, 2)
    noise = np.random.default_rng(0).normal(0, 0.02, 2 * number)
    table = {
        "step": steps,
        "time": 1.7e9 + steps * long_run.PERIOD,
        "name": ["train_loss", "val_loss"] * number,
        "value": 2 / np.sqrt(1 + steps / 500) + noise,
        "session": np.zeros(2 * number, np.int32),
    }
    return pa.table(table).cast(TABLES["scalars"]).sort_by([("name", "ascending"), ("step", "ascending")])


def describe(run: Path, **more: Any) -> None:
    info = json.loads((run / "run.json").read_text())
    info.pop("checksum", None)
    write_json(run / "run.json", {**info, **more})


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A run, made unless it is there."""
    if not folder.exists():
        began, part = time.perf_counter(), folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(folder)
        print(f"made {folder.name} in {time.perf_counter() - began:.0f} s", flush=True)
    return folder


def make_long(folder: Path) -> None:
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        long_run.long(folder, long_run.tensors(1000), 100_000)


def make_many(folder: Path) -> None:
    for number in range(500):
        run = folder / f"sweep-{number:03}"
        writer = LogWriter(run, {"name": run.name, "host": "made", "tensors": [], "modules": [], "notes": []})
        for step in range(20):
            writer.scalars(
                step, 1.7e9 + number + step, {"train_loss": 2 / (1 + step), "val_loss": 2.1 / (1 + step)}
            )
        writer.close()


@contextlib.contextmanager
def growing(folder: Path, names: list[str]) -> Iterator[list[int]]:
    """A run that gets a capture of every layer every second; yields the list of their steps."""
    shutil.rmtree(folder, ignore_errors=True)
    writer, stop, written = (
        LogWriter(folder, {"host": os.uname().nodename, "pid": os.getpid()}),
        threading.Event(),
        [],
    )
    with tempfile.TemporaryDirectory() as described:
        long_run.write_info(Path(described), names)
        info = json.loads((Path(described) / "run.json").read_text())
    writer.update_info(tensors=info["tensors"], modules=[], notes=[])

    def capture(number: int) -> None:
        for kind in ("weight", "gradient", "update"):
            table = rows(names, kind, number, 1).select(GIVEN["stats"].names).cast(GIVEN["stats"])
            writer.stats(table.combine_chunks().to_batches()[0])
        writer.scalars(number * 10, time.time(), {"train_loss": 2 / (1 + number)})
        written.append(number * 10)

    def write() -> None:
        while not stop.wait(1.0):
            capture(len(written))

    for number in range(100):
        capture(number)
    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield written
    finally:
        stop.set()
        thread.join()
        writer.close()


# Servers and pages ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(command: list[str], address: str = "") -> Iterator[tuple[str, int]]:
    """A server in its own process: its address, its process id."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": tempfile.mkdtemp()}
    quiet = subprocess.DEVNULL if address else None
    process = subprocess.Popen(
        command, env=environment, stdout=quiet or subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        if not address:
            assert process.stdout is not None
            address = process.stdout.readline().split()[2].rstrip("/")
        else:
            for _ in range(300):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(address, timeout=2)
                    break
                time.sleep(0.2)
        yield address, process.pid
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(environment["XDG_CACHE_HOME"], ignore_errors=True)


def dashboard(root: Path) -> contextlib.AbstractContextManager[tuple[str, int]]:
    return served([sys.executable, "-c", SERVE, str(root)])


def memory(pid: int) -> tuple[float, float]:
    """Resident memory of a process now, and at most, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {
        name: int(line.split()[1]) / 1024
        for line in lines
        if (name := line.split(":")[0]) in ("VmRSS", "VmHWM")
    }
    return found["VmRSS"], found["VmHWM"]


class Wire:
    """Counts the bytes of a page's answers."""

    def __init__(self, page: Page) -> None:
        self.bytes, self._urls, self._sizes = 0.0, {}, {}
        session = page.context.new_cdp_session(page)
        session.send("Network.enable")
        session.on(
            "Network.requestWillBeSent", lambda e: self._urls.update({e["requestId"]: e["request"]["url"]})
        )
        session.on("Network.loadingFinished", self._finished)

    def _finished(self, event: dict[str, Any]) -> None:
        url, size = self._urls.get(event["requestId"], ""), event["encodedDataLength"]
        self.bytes += size
        self._sizes.setdefault(url.split("?")[0], []).append(size)

    def of(self, part: str) -> list[float]:
        """The sizes of the answers whose address contains `part`."""
        return [size for url, sizes in self._sizes.items() if part in url for size in sizes]


def program() -> str | None:
    """Chromium, as in the tests."""
    named = os.environ.get("LAYERWATCH_CHROMIUM")
    return named or shutil.which("chromium") or shutil.which("chromium-browser")


def opened(context: BrowserContext, url: str, until: str = OPENED) -> tuple[Page, Any, Wire]:
    page = context.new_page()
    page.set_default_timeout(60_000)
    wire = Wire(page)
    page.goto(url, wait_until="commit")
    return page, page.evaluate(until), wire


def cold(browser: Browser, url: str, report: Report, until: str = OPENED) -> tuple[list[Any], list[float]]:
    """First visits: milliseconds and megabytes."""
    taken, sent = [], []
    for _ in range(min(report.repeats, 3)):
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        page, spent, wire = opened(context, url, until)
        page.wait_for_timeout(500)
        taken.append(spent)
        sent.append(wire.bytes / 1e6)
        context.close()
    return taken, sent


@contextlib.contextmanager
def profile(playwright: Playwright, url: str, until: str = OPENED) -> Iterator[BrowserContext]:
    """A browser that has been here before: with what it keeps on disk, compiled scripts among it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as kept:
        context = playwright.chromium.launch_persistent_context(
            kept,
            executable_path=program(),
            args=[*FLAGS.split(), "--enable-precise-memory-info"],
            viewport={"width": 1440, "height": 900},
        )
        for _ in range(3):
            opened(context, url, until)[0].close()
        yield context
        context.close()


def pages(
    context: BrowserContext, address: str, report: Report, run: str, slugs: list[str], target: float
) -> None:
    """Every page of a run, warm."""
    for slug in slugs:
        taken, sent, first = [], [], 0.0
        for number in range(report.repeats + 1):
            page, spent, wire = opened(context, f"{address}/run/{run}/{slug}")
            page.close()
            if number:
                taken.append(spent)
                sent.append(wire.bytes / 1e6)
            else:
                first = spent
        report.line(f"page {slug}, warm", taken, "ms", target)
        report.line("    on the wire", sent, "MB")
        report.line("    when the log was not read yet", [first], "ms")


def clicks(
    page: Page, report: Report, what: str, changes: list[tuple[Any, Any]], target: float | None
) -> float:
    """Changes of a control, one after the other; the first values are read and not counted."""
    taken = [page.evaluate(AFTER, ["set", id, value]) for id, value in changes]
    return report.line(what, taken, "ms", target)


def state(key: str) -> dict[str, str]:
    return {"state": key}


def flow_clicks(
    page: Page, report: Report, metrics: list[str], last: int, goal: float, switch: float
) -> None:
    """What can be done to the map."""
    n = report.repeats
    for metric in [*metrics, metrics[0]]:  # read once
        page.evaluate(AFTER, ["set", state("metric"), metric])
    clicks(
        page,
        report,
        "metric switch",
        [(state("metric"), metrics[i % len(metrics)]) for i in range(1, n + 1)],
        switch,
    )
    clicks(page, report, "filter", [(state("filter"), f"part{i % 8}") for i in range(n)], goal)
    page.evaluate(AFTER, ["set", state("filter"), ""])
    clicks(page, report, "order", [(state("order"), ["badness", "depth"][i % 2]) for i in range(n)], goal)
    clicks(page, report, "colours", [(state("colors"), ["layer", "robust"][i % 2]) for i in range(n)], goal)
    clicks(
        page, report, "profile at a step", [(state("at"), str(last * (i + 1) // 9)) for i in range(n)], goal
    )
    ranges = [f"{last * i // 20}:{last * (i + 1) // 20}" for i in range(n)]
    clicks(page, report, "zoom, reads again", [(state("range"), r) for r in ranges], goal)
    page.evaluate(AFTER, ["set", state("range"), ""])


def big(playwright: Playwright, browser: Browser, folder: Path, report: Report) -> float:
    """200 layers x 2,000 steps."""
    root = folder / "big"
    one = once(root / "one", lambda run: write_run(run, 200, 2000))
    once(root / "two", lambda run: shutil.copytree(one, run))
    report.title("200 layers x 2,000 captured steps of weights, gradients, updates, activations, drift")
    names = long_run.tensors(200)
    with dashboard(root) as (address, pid):
        url = f"{address}/run/one/gradient-flow"
        taken, sent = cold(browser, url, report)
        report.line("first visit of the server", taken[:1])
        report.line("first visit of a browser", taken[1:], "ms", 2500)
        report.line("", sent, "MB", 4.0)
        with profile(playwright, url) as context:
            pages(
                context,
                address,
                report,
                "one",
                ["gradient-flow", "layer", "drift", "overview", "overfitting"],
                1000,
            )
            page, *_ = opened(context, url)
            page.wait_for_timeout(500)
            flow_clicks(page, report, ["gradient_norm", "update_ratio", "weight_norm"], 19990, 500, 200)
            runs = [f"/run/{run}/gradient-flow" for run in ("two", "one") * report.repeats]
            page.evaluate(AFTER, ["go", runs[0], ""])
            report.line(
                "run switch", [page.evaluate(AFTER, ["go", run, ""]) for run in runs[1 : report.repeats + 1]]
            )
            page.evaluate(AFTER, ["go", f"/run/one/layer?tensor={names[0]}", ""])
            page.evaluate(AFTER, ["set", state("tensor"), names[1]])
            chosen = [(state("tensor"), name) for name in names[2 : 2 + report.repeats]]
            clicks(page, report, "layer select, new", chosen, None)
            clicks(page, report, "layer select, seen", chosen, 250)
            heap = page.evaluate("performance.memory.usedJSHeapSize") / 1e6
            report.line("JS heap", [heap], "MB")
            now, most = memory(pid)
            report.line("server memory", [now], "MB")
            report.line("    at most", [most], "MB", 500)
        warm = statistics.median(taken[1:] or taken)
    with growing(root / "live", names) as written, dashboard(root) as (address, _):
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        page, _, wire = opened(context, f"{address}/run/live/gradient-flow")
        page.wait_for_timeout(3000)
        before, captures = sum(wire.of("/api/live")) + sum(wire.of("_dash-update")), len(written)
        page.wait_for_timeout(12_000)
        spent = sum(wire.of("/api/live")) + sum(wire.of("_dash-update")) - before
        report.line(
            "live tick (one capture of 200 layers)", [spent / 1e3 / max(len(written) - captures, 1)], "kB", 5
        )
        context.close()
    shutil.rmtree(root / "live", ignore_errors=True)
    return warm


def long(playwright: Playwright, folder: Path, given: Path | None, report: Report) -> None:
    """1,000 layers x 100,000 steps."""
    run = given or once(folder / "long-1000", make_long) / "long"
    report.title('1,000 layers x 100,000 captured steps, one kind, keep="rollup"')
    names = long_run.tensors(1000)
    with dashboard(run.parent) as (address, pid):
        url = f"{address}/run/{run.name}/gradient-flow?metric=weight_norm"
        with profile(playwright, url) as context:
            taken = []
            for _ in range(report.repeats):
                page, spent, _ = opened(context, url)
                taken.append(spent)
                page.close()
            report.line("page gradient-flow, warm", taken, "ms", 1000)
            page, *_ = opened(context, url)
            page.wait_for_timeout(500)
            flow_clicks(page, report, ["weight_norm", "weight_rms"], 999_990, 500, 500)
            page.evaluate(AFTER, ["go", f"/run/{run.name}/layer?tensor={names[0]}", ""])
            chosen = [(state("tensor"), name) for name in names[2 : 2 + report.repeats]]
            clicks(page, report, "layer select, new", chosen, 500)
            report.line("JS heap", [page.evaluate("performance.memory.usedJSHeapSize") / 1e6], "MB")
        now, most = memory(pid)
        report.line("server memory", [now], "MB", 500)
        report.line("    at most", [most], "MB")


def tables(playwright: Playwright, browser: Browser, url: str, report: Report) -> None:
    """First rows of a table of runs, and when its page answers."""
    new = cold(browser, url, report, ROWS)[0]
    report.line(f"first rows of {urlsplit(url).path or '/'}, a new server and browser", [new[0][0]])
    report.line("    a new browser", [first for first, _ in new[1:]] or [new[0][0]])
    with profile(playwright, url, ROWS) as context:
        warm = [opened(context, url, ROWS)[1] for _ in range(report.repeats)]
    report.line("    warm", [first for first, _ in warm], "ms", 500)
    report.line("    the page answers, a new browser", [answers for _, answers in new[1:]] or [new[0][1]])
    report.line("    the page answers, warm", [answers for _, answers in warm])


def many(playwright: Playwright, browser: Browser, folder: Path, report: Report) -> None:
    """500 runs in the table."""
    root = once(folder / "many", make_many)
    report.title("500 small runs in the table")
    with dashboard(root) as (address, pid):
        tables(playwright, browser, address, report)
        report.line("server memory", [memory(pid)[0]], "MB")


def make_table(folder: Path) -> None:
    """A scan table of runs that do not exist: rows as `layerwatch scan` makes them, of five thousand runs."""
    rng, now, rows = np.random.default_rng(0), time.time(), []
    empty = {field.name: [] if pa.types.is_list(field.type) else None for field in COLUMNS}
    layers = [f"encoder.layer.{i}.output.weight" for i in range(8)]
    for number in range(FLEET):
        health = str(rng.choice(["critical", "warning", "healthy"], p=[0.1, 0.2, 0.7]))
        found = [] if health == "healthy" else list(rng.choice(PROBLEMS, rng.integers(1, 4), replace=False))
        config = {"optimizer.lr": 0.1 / 2 ** (number % 9), "seed": number, "depth": 24, "data": "made"}
        rows.append(
            empty
            | {
                "run": f"sweep-{number // 100:02}/run-{number:05}", "url": f"/made/{number}",
                "key": str(number), "id": f"{number:032x}", "created": now - 3600 * number,
                "ended": now - 3600 * number + 1800, "wrote": now - 3600 * number, "closed": True,
                "live": False, "steps": 10_000, "tensors": 160,
                "owner": str(rng.choice(["ana", "bo", "chen"])),
                "tags": ["baseline"] if number % 7 == 0 else [],
                "model": str(rng.choice(["ResNet", "ViT", "GPT2LMHeadModel"])), "config": json.dumps(config),
                "health": health, "health_before": "healthy", "alarms": len(found), "scanned": now,
                "worse": now if number % 50 == 0 else None, "train_loss": 1.0,
                "val_loss": float(rng.random()), "gap": 0.1, "drift": 0.5, "drift_layer": layers[0],
                "bytes": 10**7,
                "findings": [
                    {
                        "problem": str(problem), "severity": health, "first_step": 100, "last_step": 9999,
                        "layers": layers, "summary": "made, not measured " * 5, "advice": "nothing " * 10,
                        "noticed": now - 86400.0,
                    }
                    for problem in found
                ],
                "scalars": [{"name": f"metric_{i}", "last": 1.0, "best": 0.5,
                "best_step": 9} for i in range(10)],
                "blocks": [{"block": f"layer.{i}", "relative_l2": 0.1, "tensors": 12} for i in range(12)],
            }
        )  # fmt: skip
    folder.mkdir()
    write_table(ScanTable("/made", rows, now, now - 86400.0), folder / "scan.parquet")


def fleet(playwright: Playwright, browser: Browser, folder: Path, report: Report) -> None:
    """5,000 runs of a scan table."""
    table = once(folder / "fleet", make_table) / "scan.parquet"
    report.title(f"{FLEET:,} runs of a scan table; the load of the machine was {os.getloadavg()[0]:.1f}")
    with dashboard(table) as (address, pid):
        for path in ("/", "/fleet"):
            tables(playwright, browser, address + path, report)
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        page, *_ = opened(context, f"{address}/fleet", ROWS)
        taken = [
            page.evaluate(NARROWED, text) for text in ("owner:ana", "lr>0.01", "tag:baseline health:critical")
        ]
        report.line("a filter of the Fleet page", taken, "ms", 500)
        context.close()
        report.line("server memory", [memory(pid)[0]], "MB")


def tensorboard(browser: Browser, folder: Path, report: Report, ours: float) -> None:
    """The same layers' weight histograms of every tenth step, and the losses."""
    root = once(folder / "tensorboard", make_tensorboard)
    report.title("TensorBoard: 200 weight histograms of 200 steps, the losses of 2,000")
    address = "http://127.0.0.1:6107"
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(root),
        "--port",
        "6107",
        "--bind_all",
    ]
    done = """() => new Promise((done) => {
      let last = performance.now();
      const moved = new MutationObserver(() => (last = performance.now()));
      moved.observe(document, { subtree: true, childList: true });
      const look = () => performance.now() - last > 2000 ? done(last) : setTimeout(look, 50);
      look();
    })"""
    with served(command[:-1], address) as (_, pid):
        time.sleep(8)  # it loads the log
        taken, sent = cold(browser, f"{address}/#timeseries", report, done)
        theirs = report.line("first visit of a browser, time series", taken)
        report.line("", sent, "MB")
        taken, sent = cold(browser, f"{address}/#histograms", report, done)
        report.line("first visit of a browser, histograms", taken)
        report.line("", sent, "MB")
        report.line("server memory", [memory(pid)[0]], "MB")
    if ours:
        report.line("its time series page against our first visit", [theirs / ours], "x")


def make_tensorboard(folder: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.compat.proto.summary_pb2 import (  # pyright: ignore[reportAttributeAccessIssue]
        HistogramProto,  # pyright: ignore[reportAttributeAccessIssue]
        Summary,  # pyright: ignore[reportAttributeAccessIssue]
    )
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    names, writer = long_run.tensors(200), EventFileWriter(str(folder))
    for number in range(2000):
        values: list[Any] = [Summary.Value(tag="train_loss", simple_value=2 / (1 + number / 50))]
        if number % 10 == 0:
            for row in rows(names, "weight", number, 1).to_pylist():
                low, high = bucket_edges(np.array(row["buckets"]))
                histogram = HistogramProto(
                    min=row["min"], max=row["max"], num=row["count"], sum=row["sum"],
                    sum_squares=row["sum_sq"],
                    bucket_limit=np.maximum(low, high).tolist(), bucket=[float(n) for n in row["counts"]],
                )  # fmt: skip
                values.append(Summary.Value(tag=f"weight/{row['tensor']}", histo=histogram))
        writer.add_event(Event(wall_time=1.7e9 + number, step=number * 10, summary=Summary(value=values)))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where the runs are made and left (default: removed)")
    parser.add_argument("--long", type=Path, help="a run of long_run.py --folder (default: made)")
    parser.add_argument("--repeats", type=int, default=5)
    parts = ("big", "long", "many", "fleet", "tensorboard")
    parser.add_argument("--only", nargs="*", choices=parts, default=parts)
    options = parser.parse_args()
    long_run.BUCKETS = BUCKETS
    report, ours = Report(options.repeats), 0.0
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        browser = playwright.chromium.launch(executable_path=program(), args=FLAGS.split())
        if "big" in options.only:
            ours = big(playwright, browser, folder, report)
        if "long" in options.only:
            long(playwright, folder, options.long, report)
        if "many" in options.only:
            many(playwright, browser, folder, report)
        if "fleet" in options.only:
            fleet(playwright, browser, folder, report)
        if "tensorboard" in options.only:
            tensorboard(browser, folder, report, ours)
        browser.close()
    print(f"\n{report.failed} targets missed" if report.failed else "\nevery target met")


if __name__ == "__main__":
    main()
