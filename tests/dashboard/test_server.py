"""The server: headers, hosts, the live route, files from the package only."""

from __future__ import annotations

import gzip
import re
import socket
import time
from pathlib import Path

import pytest
from dash import Dash
from werkzeug.test import Client

from layerwatch.cli import main
from layerwatch.dashboard import Access, serve, serving
from layerwatch.dashboard.queries import Library
from layerwatch.monitor import RunError


def test_scripts_are_compressed_once_and_cached(client: Client) -> None:
    html = client.get("/", headers={"Host": "localhost"}).text
    style = next(path for path in re.findall(r'href="([^"]+)"', html) if "all.css" in path)
    answer = client.get(style, headers={"Host": "localhost", "Accept-Encoding": "gzip"}, buffered=True)
    assert answer.headers["Content-Encoding"] == "gzip"
    assert "max-age=31536000" in answer.headers["Cache-Control"]
    assert b"--accent" in gzip.decompress(answer.data)
    plain = client.get(style, headers={"Host": "localhost"}, buffered=True)
    assert b"--accent" in plain.data


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


class Fake:
    """A server that has nothing to do."""

    def run(self) -> None: ...


def test_the_address_with_the_token_is_printed_once_and_opened(
    runs_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(serving, "over", lambda *_: Fake())
    monkeypatch.setattr("webbrowser.open", opened.append)
    serve(runs_root, "0.0.0.0", 0, prefix="x", open_browser=True)
    out = capsys.readouterr().out
    (line,) = out.splitlines()
    found = re.search(r"http://\S+:\d+/x/\?token=(\S+)", line)
    assert found
    assert len(found[1]) >= 32
    assert socket.gethostname() in line
    deadline = time.monotonic() + 30
    while not opened and time.monotonic() < deadline:
        time.sleep(0.01)
    assert opened == [found[0]]
    serve(runs_root, "0.0.0.0", 0)
    assert found[1] not in capsys.readouterr().out  # a new one each time


def test_this_machine_needs_no_token_but_may_have_one(
    runs_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "over", lambda *_: Fake())
    serve(runs_root, port=0)
    assert "token" not in capsys.readouterr().out
    serve(runs_root, port=0, token="a-token-of-my-own")
    assert "/?token=a-token-of-my-own " in capsys.readouterr().out


def test_a_token_from_a_file_is_not_printed(
    runs_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[str] = []
    monkeypatch.setattr(serving, "over", lambda *_: Fake())
    monkeypatch.setattr(
        serving, "Access", lambda host, token, names: served.append(token) or Access(host, token)
    )
    file = tmp_path / "token"
    file.write_text("a-token-of-my-own\nmore\n")
    assert main(["dashboard", str(runs_root), "--port", "0", "--token-file", str(file)]) == 0
    assert served == ["a-token-of-my-own"]
    assert "a-token-of-my-own" not in capsys.readouterr().out
    for content, words in (("\n", "but it is empty"), ("short", "at least 16 characters")):
        file.write_text(content)
        assert main(["dashboard", str(runs_root), "--port", "0", "--token-file", str(file)]) == 2
        assert words in capsys.readouterr().err
    assert main(["dashboard", str(runs_root), "--port", "0", "--token-file", str(tmp_path / "gone")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_plot_library_may_not_upload(app: Dash) -> None:
    from layerwatch.dashboard.components import GRAPH_CONFIG

    assert GRAPH_CONFIG["showSendToCloud"] is False
    assert GRAPH_CONFIG["plotlyServerURL"] == ""
    assert app.config.suppress_callback_exceptions
