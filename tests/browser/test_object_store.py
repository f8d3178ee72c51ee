"""The dashboard over a bucket shows what it shows over a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from layerwatch import Run
from layerwatch.monitor.description import write_json
from layerwatch.monitor.mirror import Mirror
from tests.browser.conftest import answering
from tests.browser.reading import array, traces, until
from tests.object_server import ObjectServer


@pytest.fixture
def server(object_server: ObjectServer, runs_root: Path) -> Iterator[str]:
    bucket = object_server.make_bucket()
    Mirror(runs_root / "healthy", f"{bucket}/group/healthy").send()
    with answering("-m", "layerwatch", "dashboard", f"{bucket}/", "--port", "0") as address:
        yield address.rstrip("/")


def test_runs_of_a_bucket(
    open_page: Callable[..., Page], healthy: Run, object_server: ObjectServer, tmp_path: Path
) -> None:
    page = open_page("/")
    expect(page.locator(".subtitle")).to_have_text("1 run in s3://bucket")
    page.get_by_role("link", name="group/healthy", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("group/healthy")
    until(lambda: traces(page, "loss-plot"), "the losses")
    assert len(array(traces(page, "loss-plot")[0]["y"])) == len(healthy.scalars("train_loss"))
    page.get_by_role("link", name="Gradient flow", exact=True).click()
    until(lambda: traces(page, "flow-map"), "the map")

    # The training goes on, on another machine: its heartbeat is young.
    content = json.loads((healthy.path / "run.json").read_text())
    del content["checksum"]
    write_json(tmp_path / "run.json", {**content, "closed": False, "host": "far"})
    files = object_server.files()
    for name, written in (("alive", b""), ("run.json", (tmp_path / "run.json").read_bytes())):
        with files.open_output_stream(f"bucket/group/healthy/{name}") as stream:
            stream.write(written)
    # Every 10 s the bucket is asked, every 15 s the page asks.
    expect(page.locator(".badge.live")).to_be_visible(timeout=120_000)
