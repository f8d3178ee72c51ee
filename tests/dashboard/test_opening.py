"""A page that comes with the layout, and the plots that come with a page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from werkzeug.test import Client

from layerwatch.dashboard import create_app
from layerwatch.dashboard.opening import Opener
from layerwatch.dashboard.queries import Library
from layerwatch.dashboard.sent import Sent
from tests.dashboard.made_runs import write_run

HOST = "http://localhost"
SCREEN = {"theme": "light", "narrow": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_run(folder, "base")
    return folder


@pytest.fixture
def client(root: Path) -> Client:
    return create_app(root).server.test_client()


def parts(node: Any) -> Iterator[dict[str, Any]]:
    """All components of a layout, by their properties."""
    if isinstance(node, dict) and "props" in node:
        yield node["props"]
        yield from parts(node["props"].get("children"))
    elif isinstance(node, list):
        for each in node:
            yield from parts(each)


def layout(client: Client, referer: str = "", prefix: str = "") -> dict[str, dict[str, Any]]:
    """What Dash gets first: component id -> properties."""
    headers = {"Referer": referer} if referer else {}
    answer = client.get(f"{prefix}/_dash-layout", base_url=HOST, headers=headers)
    assert answer.status_code == 200
    return {p["id"]: p for p in parts(json.loads(answer.data)) if isinstance(p.get("id"), str)}


def seen(client: Client, *plots: str, first: bool = True) -> None:
    """A browser asks for the plots in view."""
    state = {"metric": "gradient_norm", "axis": "step"}
    asked = {"page": "gradient-flow", "run": "base", "state": state, "screen": SCREEN, "plots": plots}
    answer = client.post("/api/plots", json=asked | {"first": first}, base_url=HOST)
    assert sorted(json.loads(answer.data)) == sorted(plots)


def test_the_page_of_the_address_comes_with_the_layout(client: Client) -> None:
    found = layout(client, f"{HOST}/run/base/gradient-flow?metric=weight_norm")
    page = found["page"]["data"]
    assert (page["run"], page["page"], page["built"]) == ("base", "gradient-flow", 0)
    assert page["at"] == "/run/base/gradient-flow?metric=weight_norm"
    assert found["url"]["data"]["path"] == "/run/base/gradient-flow"
    assert "flow-map" in found
    assert not found["flow-map"]["figure"]["data"]  # nobody has asked for it before: reading a log takes time


@pytest.mark.parametrize(
    "referer", ["", f"{HOST}/", "http://elsewhere.example/run/base", "not a url", "http://[::1"]
)
def test_without_an_address_of_ours_the_page_is_asked_for_later(client: Client, referer: str) -> None:
    found = layout(client, referer)
    assert found["page"]["data"] == {}
    assert "flow-map" not in found


def test_plots_that_were_in_view_come_with_the_next_visit(client: Client) -> None:
    seen(client, "flow-map")
    found = layout(client, f"{HOST}/run/base/gradient-flow?metric=weight_norm")
    assert found["flow-map-said"]["children"] == ""
    (heat, *_) = found["flow-map"]["figure"]["data"]
    assert heat["name"] == "weight norm"  # of this address, not of the visit before
    assert found["flow-map-frame"]["className"] == "plot-frame"
    values = json.loads(found["flow-map-frame"]["data-drawn"])
    controls = json.loads(found["flow-map-frame"]["data-controls"])
    assert dict(zip(controls, values[:-2], strict=True))["metric"] == "weight_norm"
    assert values[-2:] == ["light", False]


def test_only_first_requests_teach_and_only_their_width_of_screen(client: Client) -> None:
    seen(client, "flow-map", first=False)
    address = f"{HOST}/run/base/gradient-flow"
    assert not layout(client, address)["flow-map"]["figure"]["data"]
    seen(client, "flow-map")
    client.set_cookie("layerwatch_theme", "light")
    client.set_cookie("layerwatch_narrow", "1")
    assert not layout(client, address)["flow-map"]["figure"]["data"]


def test_nothing_is_kept_of_pages_and_runs_that_are_not_there(root: Path) -> None:
    opener = Opener(Library(root), Sent())
    opener.learn("gradient-flow", "no such run", SCREEN, ["flow-map"])
    opener.learn("no such page", "base", SCREEN, [])
    assert (opener._in_view, opener._read) == ({}, set())
    opener.learn("gradient-flow", "base", SCREEN, ["flow-map"])
    assert opener._read == {("base", "gradient-flow")}


def test_a_run_that_is_not_there_is_said_in_the_layout(client: Client) -> None:
    found = layout(client, f"{HOST}/run/nothing")
    assert found["page"]["data"]["run"] == "nothing"
    assert "flow-map" not in found


def test_the_layout_behind_a_prefix(root: Path) -> None:
    client = create_app(root, prefix="/x/").server.test_client()
    found = layout(client, f"{HOST}/x/run/base/gradient-flow", prefix="/x")
    assert found["url"]["data"]["path"] == "/run/base/gradient-flow"
    assert layout(client, f"{HOST}/run/base/gradient-flow", prefix="/x")["page"]["data"] == {}


def test_the_layout_is_loaded_early_when_the_screen_is_known(client: Client) -> None:
    early = '<link rel="preload" as="fetch" href="/_dash-layout" crossorigin="anonymous">'
    assert early not in client.get("/run/base", base_url=HOST).text
    client.set_cookie("layerwatch_theme", "dark")
    client.set_cookie("layerwatch_narrow", "0")
    assert early in client.get("/run/base", base_url=HOST).text
    assert early not in client.get("/run/base?theme=light", base_url=HOST).text


def test_our_scripts_are_one_file_and_our_styles_are_one(client: Client) -> None:
    page = client.get("/run/base", base_url=HOST).text
    assert page.count("/assets/") == 3  # with the icon
    for kind, word in (("js", "IntersectionObserver"), ("css", ".plot-frame")):
        start = page.index(f"/assets/all.{kind}?m=")
        answer = client.get(page[start : page.index('"', start)], base_url=HOST)
        assert word in answer.text
        assert "immutable" in answer.headers["Cache-Control"]
