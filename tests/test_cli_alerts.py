"""`layerwatch alerts`, and `scan --alerts` with a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerwatch.cli import main
from layerwatch.monitor import LogWriter
from tests.alert_servers import SECRET, HttpServer

TEXT = """
[alerts]
repeat = "6h"
[alerts.quiet]
hours = "00:00-23:59"
[alerts.channels.team]
type = "webhook"
url_env = "HOOK_URL"
[alerts.channels.screen]
type = "command"
command = ["true", "some-secret"]
[[alerts.routes]]
channels = "team"
problems = ["nonfinite", "silent"]
runs = "prod-*"
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    monkeypatch.setenv("no_proxy", "*")
    with HttpServer() as server:
        monkeypatch.setenv("HOOK_URL", server.url)
        yield server


def test_show_says_who_is_told_of_what(
    server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("layerwatch.toml").write_text(TEXT)
    assert main(["alerts", "show"]) == 0
    out = capsys.readouterr().out
    for words in (
        "webhook (json), URL in HOOK_URL", "command true with 1 argument", "yes",
        "problem nonfinite or silent, run prod-*", "no route leads to screen",
        "what lasts is told again after 6 h", "silent after 30 min", "layerwatch.toml",
    ):  # fmt: skip
        assert words in out
    monkeypatch.delenv("HOOK_URL")
    assert main(["alerts", "show", str(tmp_path)]) == 0
    out += capsys.readouterr().out
    assert "no: set HOOK_URL" in out
    assert SECRET not in out
    assert "some-secret" not in out


def test_a_test_reaches_every_channel_whatever_routes_and_quiet_hours_say(
    server: HttpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("other.toml")
    path.write_text(TEXT)
    assert main(["alerts", "test", "--config", "other.toml"]) == 0
    out = capsys.readouterr().out
    assert "team: sent in" in out
    assert "screen: sent in" in out
    [message] = server.got
    assert message["title"] == "info: a test of layerwatch's alerts"
    server.answers = [500]
    assert main(["alerts", "test", "--config", "other.toml", "--channel", "team"]) == 1
    out, err = capsys.readouterr()
    assert out == "team: NOT sent: the server answered 500\n"
    assert SECRET not in out + err


def test_what_is_wrong_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["alerts", "show"]) == 2
    assert (
        "expected a layerwatch.toml in runs, above it or in the working directory" in capsys.readouterr().err
    )
    Path("layerwatch.toml").write_text(TEXT)
    assert main(["alerts", "test", "--channel", "tem"]) == 2
    assert 'got "tem": did you mean "team"?' in capsys.readouterr().err
    Path("layerwatch.toml").write_text(TEXT.replace("url_env", "url"))
    assert main(["alerts", "test"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "layerwatch.toml: [alerts.channels.team] holds a secret, url" in err
    assert main(["run", "--alerts", "missing.toml", "train.py"]) == 2
    assert "expected a settings file, but missing.toml does not exist" in capsys.readouterr().err


def test_the_watchman_of_scan_tells_and_says_so(
    server: HttpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN in the log of a run that another machine writes."""
    Path("runs").mkdir()
    Path("runs/layerwatch.toml").write_text(
        '[alerts.channels.team]\ntype = "webhook"\nurl_env = "HOOK_URL"\n'
    )
    log = LogWriter(
        Path("runs/exp1"), {"name": "exp1", "host": "elsewhere", "pid": 1, "tensors": [], "modules": []}
    )
    for step in range(20):
        log.scalars(step, 1.7e9 + step, {"train_loss": 1.0 if step < 10 else float("nan")})
    assert main(["scan", "runs", "--alerts"]) == 0
    out = capsys.readouterr().out
    assert server.alerts == [("exp1", "critical", "nonfinite")]
    assert "alert sent to team: critical nonfinite of exp1" in out
    assert main(["scan", "runs", "--alerts", "runs/layerwatch.toml"]) == 0
    assert len(server.alerts) == 1
    state = json.loads(Path("runs/layerwatch-alerts.json").read_text())
    assert [record["text"] for record in state["records"]] == ["sent to team: critical nonfinite of exp1"]
    written = b"".join(p.read_bytes() for p in Path("runs").rglob("*") if p.is_file())
    assert SECRET.encode() not in written
    log.close()
