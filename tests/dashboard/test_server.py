"""The server: headers, hosts, the live route, files from the package only."""

from __future__ import annotations

import gzip
import re
import socket
from pathlib import Path

import pytest
from dash import Dash
from werkzeug.test import Client

from layerwatch.dashboard import serve
from layerwatch.dashboard.queries import Library
from layerwatch.dashboard.security import host_allowed, policy
from layerwatch.monitor import RunError

NAMES = {"localhost", "127.0.0.1"}


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8050", "127.0.0.1:8050", "[::1]:8050", "192.168.0.7:80"]
)
def test_this_machine_answers(host: str) -> None:
    assert host_allowed(host, NAMES)


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:8050", "", "127.0.0.1.evil.example", "[::1"]
)
def test_foreign_names_are_refused(host: str) -> None:
    assert not host_allowed(host, NAMES)


def test_a_rebound_name_gets_400_everywhere(client: Client) -> None:
    for path in ("/", "/api/live", "/_dash-layout"):
        assert client.get(path, headers={"Host": "evil.example"}).status_code == 400


def test_pages_carry_the_security_headers(client: Client) -> None:
    answer = client.get("/run/healthy/overview", headers={"Host": "localhost:8050"})
    assert answer.status_code == 200
    content = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in content
    assert "frame-ancestors 'none'" in content
    assert not re.search(r"https?:|\*|script-src[^;]*'unsafe-inline'", content)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"


def test_every_inline_script_is_in_the_policy(client: Client) -> None:
    answer = client.get("/", headers={"Host": "localhost"})
    inline = re.findall(r"<script(?![^>]*src=)[^>]*>(.*?)</script>", answer.text, re.DOTALL)
    assert inline
    hashes = re.findall(r"'sha256-[^']+'", answer.headers["Content-Security-Policy"])
    assert len(hashes) == len(inline)
    assert policy("<script>1</script>") != policy("<script>2</script>")


def test_the_page_names_no_other_host(client: Client) -> None:
    html = client.get("/", headers={"Host": "localhost"}).text
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)""", html)
    assert addresses
    assert all(address.startswith("/") and not address.startswith("//") for address in addresses)


def test_scripts_are_compressed_once_and_cached(client: Client) -> None:
    html = client.get("/", headers={"Host": "localhost"}).text
    style = next(path for path in re.findall(r'href="([^"]+)"', html) if "style.css" in path)
    answer = client.get(style, headers={"Host": "localhost", "Accept-Encoding": "gzip"}, buffered=True)
    assert answer.headers["Content-Encoding"] == "gzip"
    assert "max-age=31536000" in answer.headers["Cache-Control"]
    assert b"--accent" in gzip.decompress(answer.data)
    plain = client.get(style, headers={"Host": "localhost"}, buffered=True)
    assert b"--accent" in plain.data


@pytest.mark.parametrize("path", ["/assets/../app.py", "/assets/..%2fapp.py", "/assets/%2e%2e/app.py"])
def test_assets_do_not_lead_out_of_their_folder(client: Client, path: str) -> None:
    answer = client.get(path, headers={"Host": "localhost"}, buffered=True)
    assert b"def create_app" not in answer.data


def test_a_new_run_appears_without_a_restart(tmp_path: Path, runs_root: Path) -> None:
    library = Library(tmp_path)
    with pytest.raises(RunError, match="no run named 'late'"):
        library.run("late")
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "run.json").write_text((runs_root / "healthy" / "run.json").read_text())
    assert library.run("late").name == "late"


def test_answers_are_remembered_until_the_run_grows(library: Library) -> None:
    calls = []
    run = library.run("healthy")
    for _ in range(3):
        assert library.memo(run, "probe", lambda: calls.append(1) or 42) == 42
    assert len(calls) == 1


def test_serve_refuses_a_taken_port_before_it_says_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        serve(tmp_path, port=taken.getsockname()[1])
    assert capsys.readouterr().out == ""


def test_the_plot_library_may_not_upload(app: Dash) -> None:
    from layerwatch.dashboard.components import GRAPH_CONFIG

    assert GRAPH_CONFIG["showSendToCloud"] is False
    assert GRAPH_CONFIG["plotlyServerURL"] == ""
    assert app.config.suppress_callback_exceptions
