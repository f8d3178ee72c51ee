"""The real server in its own process, a real Chromium, a page that fails its test on any console error."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Request,
    expect,
    sync_playwright,
)

from layerwatch import Run
from tests.browser.reading import FLYING
from tests.dashboard.tiny import write_runs

expect.set_options(timeout=60_000)  # the machines that run tests are slow and busy

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]
CHECKOUT = Path(__file__).resolve().parents[2]
SERVE = "import sys, pathlib, layerwatch.dashboard as d; d.serve(pathlib.Path(sys.argv[1]), port=0)"


def start(*arguments: str) -> subprocess.Popen[str]:
    """A Python process that sees this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, text=True)


def stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait(timeout=20)
    if process.stdout:
        process.stdout.close()


@contextlib.contextmanager
def answering(*arguments: str) -> Iterator[str]:
    """The address that a Python process prints once it listens."""
    process = start(*arguments)
    watchdog = threading.Timer(120, process.kill)
    try:
        watchdog.start()
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, f"the server said {line!r}"
        watchdog.cancel()
        yield found[0]
    finally:
        watchdog.cancel()
        stop(process)


@contextlib.contextmanager
def serving(root: Path, code: str = SERVE) -> Iterator[str]:
    """The address of a dashboard over a folder, without the slash at the end."""
    with answering("-c", code, str(root)) as address:
        yield address.rstrip("/")


@pytest.fixture(scope="session")
def runs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def server(runs_root: Path) -> Iterator[str]:
    with serving(runs_root) as address:
        yield address


def stands(page: Page) -> None:
    """Wait until what the server has drawn of a page has made room for the page itself."""
    page.locator("#first").wait_for(state="detached")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = (
        os.environ.get("LAYERWATCH_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    )
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Browser, server: str) -> Iterator[Callable[..., Page]]:
    """Open a path in a fresh profile. Console errors and requests to other hosts fail the test at its end."""
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            wrong.append(f"console {message.type}: {message.text}")

    def asked(request: Request) -> None:
        if not request.url.startswith((server + "/", "data:", "blob:")):
            wrong.append(f"request to {request.url}")

    def open_path(path: str, width: int = 1440, height: int = 900, scheme: str = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)  # pyright: ignore[reportArgumentType]
        contexts.append(context)
        context.add_init_script(FLYING)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", heard)
        page.on("pageerror", lambda error: wrong.append(f"page error: {error}"))
        page.on("request", asked)
        page.goto(path if path.startswith("http") else server + path)
        stands(page)
        return page

    yield open_path
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="session")
def healthy(runs_root: Path) -> Run:
    return Run(runs_root / "healthy")
