"""The page as plain HTML, before Dash has started: what is in it, and when there is none."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from dash import dcc, html
from werkzeug.test import Client

from layerwatch.dashboard import create_app, first
from layerwatch.dashboard.queries import Library
from layerwatch.monitor.fleet import ScanTable, write_table
from tests.dashboard.test_fleet import NOW, ROWS, made

HOSTILE = "</script><script>alert(1)</script>\"'&"
FIRST = '<div id="first" class="first">'
DATA = '<script type="application/json" id="first-data">'
PHONE = {"layerwatch_theme": "light", "layerwatch_narrow": "1"}


@pytest.fixture
def lab(tmp_path: Path) -> Client:
    """The dashboard over a scan table that has been read; one of the runs has a name that bites."""
    rows = [*ROWS, made(HOSTILE, note=HOSTILE, created=NOW)]
    write_table(ScanTable("/elsewhere", rows, NOW, NOW - 3600), tmp_path / "all.parquet")
    app = create_app(tmp_path / "all.parquet")
    library: Library = app.server.extensions["layerwatch"]
    library.runs()
    return app.server.test_client()


def painted(client: Client, path: str, **cookies: str) -> tuple[str, dict[str, Any]]:
    """What is on screen at first, and the data that its rows are drawn from."""
    for name, value in cookies.items():
        client.set_cookie(name, value)
    page = client.get(path).get_data(as_text=True)
    found = re.search(f"{FIRST}(.*)</div>{DATA}(.*?)</script>", page, re.DOTALL)
    return (found[1], json.loads(found[2])) if found else ("", {})


def test_the_first_rows_come_with_the_page(lab: Client) -> None:
    shown, data = painted(lab, "/")
    assert "<h1>Runs</h1>" in shown
    assert 'href="/fleet"' in shown
    assert data["runs-grid"]["rows"][0]["run"] == HOSTILE  # the newest
    assert {column.get("field") for column in data["runs-grid"]["columns"]} >= {"run", "rank", "val"}
    assert not any(column.get("hide") for column in data["runs-grid"]["columns"])
    assert data["runs-fit"] == {"runs": None, "wrong": ""}
    shown, data = painted(lab, "/fleet?filter=owner:ana")
    assert "<h1>Fleet</h1>" in shown
    assert [row["run"] for row in data["fleet-data"]["rows"]] == ["a", "b"]
    assert "owner:ana" in shown


def test_a_filter_of_the_link_holds_at_once(lab: Client) -> None:
    assert painted(lab, "/?filter=owner:ana")[1]["runs-fit"]["runs"] == ["a", "b"]


def test_a_phone_gets_its_own_columns(lab: Client) -> None:
    _, data = painted(lab, "/", **PHONE)
    assert [c["field"] for c in data["runs-grid"]["columns"] if "field" in c] == ["run", "rank", "val"]


def test_no_name_becomes_markup_or_a_script(lab: Client) -> None:
    """The page is the same as of harmless names, but for the text."""
    page = lab.get("/fleet").get_data(as_text=True)
    assert page.count("<script") == page.count("</script>")
    assert "<script>alert" not in page
    assert HOSTILE in json.dumps(painted(lab, "/fleet")[1], ensure_ascii=False).replace('\\"', '"')
    assert HOSTILE in unescape(painted(lab, f"/?filter={HOSTILE.replace('&', '%26')}")[0])


def test_controls_wait_and_links_do_not(lab: Client) -> None:
    shown, _ = painted(lab, "/")
    buttons = re.findall("<button[^>]*>", shown)
    assert buttons
    assert all("disabled" in button for button in buttons)
    assert not re.findall("<a (?![^>]*href=)", shown)
    assert not re.findall("<(input|select|textarea)", shown)


@pytest.mark.parametrize(
    "path", ["/?sort=step:asc", "/?where=%7B%7D", "/?pins=a", "/run/a/overview", "/problems"]
)
def test_what_the_browser_alone_can_order_is_not_shown_in_another_order(lab: Client, path: str) -> None:
    assert painted(lab, path) == ("", {})


def test_nobody_waits_for_runs_that_are_still_looked_for(runs_root: Path) -> None:
    app = create_app(runs_root)
    client = app.server.test_client()
    assert painted(client, "/")[0] == ""
    app.server.extensions["layerwatch"].runs()
    assert {row["run"] for row in painted(client, "/")[1]["runs-grid"]["rows"]} >= {"healthy", "vanishing"}


def test_a_fault_of_ours_leaves_the_page_itself(lab: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first, "frame", lambda *parts: 1 / 0)
    page = lab.get("/fleet")
    assert page.status_code == 200
    text = page.get_data(as_text=True)
    assert 'id="first"' not in text
    assert "react-entry-point" in text


def test_a_layout_is_written_as_html() -> None:
    data: dict[str, Any] = {}
    part = html.Div(
        [
            html.A("a & b", href="/x?a=1&b=2", className="one two", title='"'),
            html.Div(id={"state": "x"}, style={"width": 12, "height": None, "color": "red"}),
            html.B([None, "text", 3]),  # pyright: ignore[reportArgumentType]
            dcc.Store(id="secret", data=1),
            html.Details([html.Summary("?", **{"aria-label": "how"})]),  # pyright: ignore[reportArgumentType]
        ],
        id="box",
    )
    assert first._markup(part, data) == (
        '<div id="box"><a class="one two" href="/x?a=1&amp;b=2" title="&quot;">a &amp; b</a>'
        '<div style="width:12px;color:red"></div><b>text3</b>'
        '<details><summary aria-label="how">?</summary></details></div>'
    )
    assert data == {}
