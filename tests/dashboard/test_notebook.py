"""`layerwatch.show`: a server in this process, in a frame that only this machine's notebooks may hold."""

from __future__ import annotations

import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest

import layerwatch
from layerwatch.dashboard import notebook
from layerwatch.monitor import Run


@pytest.fixture(autouse=True)
def _no_server_stays() -> Iterator[None]:
    yield
    for shown in list(notebook._served.values()):
        shown.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "layerwatch-dashboard"]


def get(url: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), dict(error.headers)


def test_a_run_is_shown_in_a_frame(runs_root: Path) -> None:
    shown = layerwatch.show(Run(runs_root / "healthy"), height=500)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/run/healthy/overview", shown.url)
    frame = shown._repr_html_()
    source = re.search(r'<iframe src="([^"]+)"', frame)
    assert source
    assert unescape(source[1]) == shown.url
    assert 'height="500"' in frame
    status, text, headers = get(shown.url)
    assert status == 200
    assert "layerwatch" in text
    assert "X-Frame-Options" not in headers
    assert (
        "frame-ancestors 'self' http://localhost:* http://127.0.0.1:*" in headers["Content-Security-Policy"]
    )
    assert get(shown.url, Host="evil.example")[0] == 400
    shown.close()
    with pytest.raises(urllib.error.URLError):
        get(shown.url)


def test_a_folder_is_served_once(runs_root: Path) -> None:
    first = layerwatch.show(runs_root)
    assert first.url.endswith("/")
    again = layerwatch.show(str(runs_root), height=300)
    assert again is first
    assert 'height="300"' in again._repr_html_()
    other = layerwatch.show(runs_root / "vanishing")
    assert other.url.partition("/run")[0] != first.url.rstrip("/")
    judges = first._library._judges
    assert judges.ask(str(runs_root / "healthy")).result(150)
    assert judges.pid
    first.close()
    assert judges.pid is None
    assert layerwatch.show(runs_root) is not first


def test_in_a_hub_the_proxy_s_path_and_a_token(runs_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/ana@x/")
    shown = layerwatch.show(runs_root)
    found = re.fullmatch(r"/user/ana@x/proxy/(\d+)/\?token=(\S{32})", shown.url)
    assert found
    here = f"http://127.0.0.1:{found[1]}"  # the proxy takes the path away and keeps the name of the hub
    assert get(f"{here}/", Host="hub.example")[0] == 401
    status, text, _ = get(f"{here}/", Host="hub.example", Authorization=f"Bearer {found[2]}")
    assert status == 200
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)""", text)
    assert addresses
    assert all(address.startswith(f"/user/ana@x/proxy/{found[1]}/") for address in addresses)


def test_what_cannot_be_shown(runs_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a folder of runs"):
        layerwatch.show(tmp_path / "gone")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        layerwatch.show(runs_root, port=taken.getsockname()[1])
    assert notebook._served == {}
