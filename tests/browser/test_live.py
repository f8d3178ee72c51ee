"""A training that is under way grows on screen, without a reload and without losing the reader's place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import CHECKOUT, start, stop
from tests.browser.reading import traces, until

Open = Callable[..., Page]


@pytest.fixture
def training(runs_root: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A process that trains until the test ends; the run's name."""
    name = request.node.name
    process = start(str(CHECKOUT / "tests" / "dashboard" / "tiny.py"), str(runs_root / name))
    until((runs_root / name / "run.json").is_file, "the first row of the live run")
    yield name
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


def test_only_one_question_is_asked_at_a_time(open_page: Open, training: str) -> None:
    page = open_page(f"/run/{training}/gradient-flow")
    flying, most = 0, 0

    def up(request: object) -> None:
        nonlocal flying, most
        if "/api/live" in request.url:  # pyright: ignore[reportAttributeAccessIssue]
            flying += 1
            most = max(most, flying)

    def down(request: object) -> None:
        nonlocal flying
        if "/api/live" in request.url:  # pyright: ignore[reportAttributeAccessIssue]
            flying -= 1

    page.on("request", up)
    page.on("requestfinished", down)
    before = len(traces(page, "flow-map")[0]["x"])
    until(lambda: len(traces(page, "flow-map")[0]["x"]) > before, "more columns in the map")
    page.wait_for_timeout(2000)
    assert most == 1
