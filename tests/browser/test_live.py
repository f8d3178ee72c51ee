"""A training that is under way grows on screen, without a reload and without losing the reader's place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, Request, expect

from layerwatch.dashboard.figures.base import packed
from layerwatch.dashboard.figures.cells import cells
from layerwatch.dashboard.figures.diff import difference
from tests.browser.conftest import CHECKOUT, start, stop
from tests.browser.reading import traces, until

Open = Callable[..., Page]


@pytest.fixture
def training(runs_root: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A process that trains until the test ends; the run's name."""
    name = request.node.name
    process = start(str(CHECKOUT / "tests" / "dashboard" / "tiny.py"), str(runs_root / name))
    try:
        until((runs_root / name / "run.json").is_file, "the first row of the live run", 120)
        yield name
    finally:
        stop(process)


def test_a_live_run_grows_on_screen(open_page: Open, training: str) -> None:
    time.sleep(1)
    page = open_page(f"/run/{training}/overview")
    page.evaluate("window.sameDocument = true")
    expect(page.locator(".badge.live")).to_be_visible()

    def last_step() -> int:
        return max(traces(page, "loss-plot")[0]["x"])

    before, shown = last_step(), page.locator(".kpi-value").first.inner_text()
    until(lambda: last_step() > before + 5, "more steps in the plot")
    middle = last_step()
    until(lambda: last_step() > middle, "the plot to go on growing")
    assert page.locator(".kpi-value").first.inner_text() != shown
    assert page.evaluate("window.sameDocument") is True
    expect(page.locator("#live-button")).to_have_text("Live")

    page.locator("#live-button").click()
    expect(page.locator("#live-button")).to_have_text("Paused")
    page.wait_for_timeout(1500)
    paused = last_step()
    page.wait_for_timeout(2500)
    assert last_step() == paused


SLOW = """
import pathlib, sys, time, flask, waitress
from layerwatch.dashboard import create_app
app = create_app(pathlib.Path(sys.argv[1]))
@app.server.before_request
def slowly():
    if flask.request.path == "/api/live":
        time.sleep(1.5)
server = waitress.create_server(app.server, port=0, host="127.0.0.1")
print("dashboard at", f"http://127.0.0.1:{server.effective_port}/", flush=True)
server.run()
"""


@contextmanager
def served(code: str, root: Path) -> Iterator[str]:
    process = start("-c", code, str(root))
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[2].rstrip("/")
    finally:
        stop(process)


def test_a_slow_server_never_builds_a_queue(browser: Browser, runs_root: Path, training: str) -> None:
    with served(SLOW, runs_root) as address:
        page = browser.new_context().new_page()
        flying: set[object] = set()
        asked, most = 0, 0

        def up(request: Request) -> None:
            nonlocal asked, most
            if "/api/live" in request.url:
                flying.add(request)
                asked, most = asked + 1, max(most, len(flying))

        page.on("request", up)
        page.on("requestfinished", lambda request: flying.discard(request))
        page.goto(f"{address}/run/{training}/gradient-flow")
        before = len(traces(page, "flow-map")[0]["x"])
        began = time.monotonic()
        until(lambda: len(traces(page, "flow-map")[0]["x"]) > before, "more columns in the map")
        until(lambda: page.wait_for_timeout(100) or asked >= 2, "another question")
        assert most == 1
        assert asked <= 1 + (time.monotonic() - began) / 1.5
        page.context.close()


def figure(values: np.ndarray, early: bool) -> dict[str, Any]:
    """Something with a part of every kind that a patch can change."""
    curve = {"x": values[0, 3:].tolist(), "v": packed(values[0])}
    layout = {"range": [0, values.shape[1]], "same": [1, {"a": None}], **({"early": 1} if early else {})}
    return {"data": [cells(values, log=False, what="x"), curve], "layout": layout}


def test_the_browser_applies_patches_as_they_are_meant(open_page: Open) -> None:
    rng = np.random.default_rng(0)
    cases: list[tuple[object, object, object]] = []
    for _ in range(40):
        rows, columns, more = rng.integers(1, 6), rng.integers(3, 40), rng.integers(0, 4)
        values = rng.uniform(1, 2, (rows, columns + more))
        values[0, :2] = 1, 2
        if rng.random() < 0.3:
            values[rng.integers(rows), 2] += 0.5
        old, new = (figure(values[:, :n], n == columns) for n in (columns, columns + more))
        cases.append((old, difference(old, new), new))
    assert any("columns" in str(patch) for _, patch, _ in cases)
    page = open_page("/")
    until(lambda: page.evaluate("!!window.layerwatch?.applied"), "the code")
    made = page.evaluate("cases => cases.map(([old, patch]) => layerwatch.applied(old, patch))", cases)
    assert made == [new for *_, new in cases]
