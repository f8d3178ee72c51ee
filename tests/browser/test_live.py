"""A training that is under way grows on screen, without a reload and without losing the reader's place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, Request, expect

from layerwatch import Run
from layerwatch.dashboard.figures.base import packed
from layerwatch.dashboard.figures.cells import cells
from layerwatch.dashboard.figures.diff import difference
from tests.browser.conftest import CHECKOUT, serving, start, stop
from tests.browser.reading import settled, traces, until

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the runs that these tests train: other tests count the runs of theirs."""
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[str]:
    with serving(root) as address:
        yield address


@pytest.fixture
def training(root: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A process that trains until the test ends; the run's name."""
    name = request.node.name
    process = start(str(CHECKOUT / "tests" / "dashboard" / "tiny.py"), str(root / name))
    try:
        until((root / name / "run.json").is_file, "the live run", 120)
        until(lambda: Run(root / name).last_step > 5, "its first steps", 120)
        yield name
    finally:
        stop(process)


def test_a_live_run_grows_on_screen(open_page: Open, training: str) -> None:
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
    settled(page, "loss-plot")  # the last answer is in
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


PATIENT = """
import pathlib, sys
import layerwatch.dashboard as d
import layerwatch.dashboard.queries as q
q.REFRESH_SECONDS = 0.02
d.serve(pathlib.Path(sys.argv[1]), port=0)
"""


def test_a_slow_server_never_builds_a_queue(browser: Browser, root: Path, training: str) -> None:
    with serving(root, SLOW) as address:
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
        began = time.monotonic()
        page.goto(f"{address}/run/{training}/gradient-flow")
        before = len(traces(page, "flow-map")[0]["x"])
        until(lambda: len(traces(page, "flow-map")[0]["x"]) > before, "more columns in the map")
        until(lambda: page.wait_for_timeout(100) or asked >= 2, "another question")
        assert most == 1
        assert asked <= 1 + (time.monotonic() - began) / 1.5
        page.context.close()


READER = """() => ({
  scroll: scrollY, focus: document.activeElement.value,
  cursor: [document.activeElement.selectionStart, document.activeElement.selectionEnd],
  heights: document.querySelector("#history-plot .js-plotly-plot")._fullLayout.yaxis.range,
  steps: document.querySelector("#bias-plot .js-plotly-plot")._fullLayout.xaxis.range,
  same: [document.querySelector("#history-plot").mark, document.querySelector(".tree-drawer").mark],
})"""


def test_a_live_update_leaves_the_reader_alone(open_page: Open, training: str) -> None:
    page = open_page(f"/run/{training}/layer?tensor=2.weight&range=2:12", height=500)
    page.locator("#live-button").click()  # a plot that is drawn again during a drag forgets the drag
    expect(page.locator("#live-button")).to_have_text("Paused")
    settled(page, "history-plot")
    plot = page.locator("#history-plot .nsewdrag").first
    plot.scroll_into_view_if_needed()
    settled(page, "history-plot")
    box = plot.bounding_box()
    assert box
    x = box["x"] + box["width"] / 2
    page.mouse.move(x, box["y"] + box["height"] * 0.2)  # straight down: a zoom of the values only
    page.mouse.down()
    page.mouse.move(x + 1, box["y"] + box["height"] * 0.8, steps=5)
    page.mouse.up()
    page.locator("#live-button").click()
    page.evaluate(
        "for (const one of ['#history-plot', '.tree-drawer']) document.querySelector(one).mark = one"
    )
    box = page.get_by_role("textbox", name="layer", exact=True)
    box.evaluate("box => { box.focus({ preventScroll: true }); box.setSelectionRange(2, 5); }")
    page.evaluate("scrollTo(0, 300)")
    until(lambda: page.evaluate(READER)["steps"] == [2, 12], "both plots zoomed")
    page.wait_for_timeout(300)
    before = page.evaluate(READER)
    pulse = "() => window.dash_component_api.getLayout('pulse').props.data"
    first = page.evaluate(pulse)
    until(lambda: page.evaluate(pulse) != first, "a live update")
    second = page.evaluate(pulse)
    until(lambda: page.evaluate(pulse) != second, "another one")
    page.wait_for_timeout(500)
    assert page.evaluate(READER) == before
    assert before["scroll"] == 300
    assert before["cursor"] == [2, 5]


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


@pytest.mark.soak
def test_an_hour_of_live_updates_leaves_no_memory_behind(browser: Browser, root: Path, training: str) -> None:
    """3,600 ticks, up to 20 a second instead of one: the pace of assets/live.js and of the server's looks at
    the log are shortened, all else is as always. The heap after each tenth, garbage collected, stays."""
    with serving(root, PATIENT) as address:
        page = browser.new_context().new_page()
        page.add_init_script("window.layerwatch = { pace: 40 }")
        page.goto(f"{address}/run/{training}/layer?tensor=2.weight")
        traces(page, "history-plot")
        session = page.context.new_cdp_session(page)
        ticks = 0

        def answered(request: Request) -> None:
            nonlocal ticks
            ticks += "/api/live" in request.url

        def heap() -> float:
            for _ in range(3):
                session.send("HeapProfiler.collectGarbage")
            return session.send("Runtime.getHeapUsage")["usedSize"] / 1e6

        page.on("requestfinished", answered)
        sizes = []
        for part in range(1, 11):
            until(lambda part=part: page.wait_for_timeout(200) or ticks >= 360 * part, "ticks", 900)
            sizes.append(heap())
        assert sizes[-1] < sizes[1] + 5, f"MB after each tenth: {[round(size, 1) for size in sizes]}"
        page.context.close()
