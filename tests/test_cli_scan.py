"""`layerwatch scan`: what is printed, what is kept, again and again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from layerwatch.cli import main
from layerwatch.monitor.fleet import read_table
from layerwatch.scan_command import Progress
from tests.monitor.made_fleets import make_fleet, make_sick
from tests.monitor.made_logs import make_run


def test_counts_reasons_and_what_became_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_fleet(tmp_path)
    assert main(["scan", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 runs: 1 critical, 1 unreadable, 2 healthy"
    assert lines[1].startswith("the first scan")
    assert lines[3].startswith("  torn: torn/run.json is damaged")
    assert "restore the run from a copy" in lines[3]
    assert lines[-1] == f"table: {tmp_path / 'layerwatch-scan.parquet'}"
    make_sick(tmp_path / "worse")
    assert main(["scan", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "5 runs: 2 critical, 1 unreadable, 2 healthy"
    assert lines[1].startswith("worse since 2")
    assert lines[1].endswith(": 1")
    assert lines[2] == "  worse: new -> critical: nonfinite since step 4"
    assert main(["scan", str(tmp_path), "--since", "1h"]) == 0
    assert "  sick: critical: nonfinite since step 4" in capsys.readouterr().out.splitlines()
    assert main(["scan", str(tmp_path), "--where", "owner:ana"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "1 run: 1 healthy"
    assert len(read_table(tmp_path / "layerwatch-scan.parquet").rows) == 5


def test_a_name_cannot_steer_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a")
    main(["scan", str(tmp_path)])
    make_sick(tmp_path / "bad\x1b]0;title\x07")
    assert main(["scan", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "bad\ufffd]0;title" in said
    assert not set(said) & {"\x1b", "\x07"}


def test_json_is_whole_and_has_no_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_fleet(tmp_path / "runs")
    out = tmp_path / "here" / "t.parquet"
    assert main(["scan", str(tmp_path / "runs"), "--out", str(out), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["health"] == {"healthy": 2, "critical": 1, "unreadable": 1}
    rows = {row["run"]: row for row in found["runs"]}
    assert rows["sick"]["train_loss"] is None
    assert rows["good"]["config"] == {"optimizer.lr": 0.1}
    assert {row["run"] for row in read_table(out).rows} == set(rows)
    assert not (tmp_path / "runs" / "layerwatch-scan.parquet").exists()


def test_a_table_that_cannot_be_written_is_an_error_after_the_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "runs" / "a")
    (tmp_path / "file").write_text("")
    assert main(["scan", str(tmp_path / "runs"), "--out", str(tmp_path / "file" / "t.parquet")]) == 2
    said = capsys.readouterr()
    assert said.out.startswith("1 run: 1 healthy")
    assert len(said.err.splitlines()) == 1
    assert "--out" in said.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--since", "soon"],
        ["--every", "soon"],
        ["--every", "0s"],
        ["--workers", "2"],
        ["--scheduler", "tcp://x:1"],
        ["--where", "lr>"],
        ["--every", "1s", "--workers", "2"],
    ],
)
def test_wrong_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    make_run(tmp_path / "a")
    assert main(["scan", str(tmp_path), *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_people_are_told_once_of_what_is_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, told = tmp_path / "runs", tmp_path / "told"
    make_sick(runs / "known")
    teller = "import sys, pathlib; pathlib.Path(sys.argv[1]).open('a').write(sys.stdin.read() + chr(10))"
    command = json.dumps([sys.executable, "-c", teller, str(told)])
    (runs / "layerwatch.toml").write_text(f'[alerts.channels.log]\ntype = "command"\ncommand = {command}\n')
    assert main(["scan", str(runs), "--alerts"]) == 0  # what has ended before is no news
    make_sick(runs / "new")
    assert main(["scan", str(runs), "--alerts"]) == 0
    assert main(["scan", str(runs), "--alerts", str(runs / "layerwatch.toml")]) == 0
    assert capsys.readouterr().out.splitlines().count("alert sent to log: critical nonfinite of new") == 1
    (line,) = told.read_text().splitlines()
    assert [(alert["run"], alert["problem"]) for alert in json.loads(line)["alerts"]] == [
        ("new", "nonfinite")
    ]
    (runs / "layerwatch.toml").unlink()
    assert main(["scan", str(runs), "--alerts"]) == 2
    assert "expected a layerwatch.toml" in capsys.readouterr().err


def test_it_goes_on_until_it_is_stopped(tmp_path: Path, checkout: Path) -> None:
    make_run(tmp_path / "runs" / "a")
    command = [sys.executable, "-m", "layerwatch", "scan", "runs", "--every", "0.5s"]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout
    assert process.stderr
    try:
        until = time.monotonic() + 150
        assert process.stdout.readline() == "1 run: 1 healthy\n"
        make_sick(tmp_path / "b").rename(tmp_path / "runs" / "b")  # at once, or half of it would be scanned
        while process.stdout.readline() != "  b: new -> critical: nonfinite since step 4\n":
            assert time.monotonic() < until
        (tmp_path / "runs").rename(tmp_path / "away")  # a share that is gone for a while
        while "check the path" not in process.stderr.readline():
            assert time.monotonic() < until
        (tmp_path / "away").rename(tmp_path / "runs")
        while "worse since" not in process.stdout.readline():
            assert time.monotonic() < until
        errors = "it goes on"
        for _ in range(5):  # Python drops an interrupt that comes in a destructor: one presses the keys again
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, errors = process.communicate(timeout=30)
                break
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, errors


class Pipe:
    """A stream that is no terminal."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


class Terminal(Pipe):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError


def test_progress_is_a_bar_or_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, terminal = Pipe(), Terminal()
    now = [0.0]
    monkeypatch.setattr("layerwatch.scan_command.time.monotonic", lambda: now[0])
    with Progress(pipe) as lines:
        for done in range(1, 101):
            now[0] += 0.25
            lines.at(done, 200)
    assert pipe.text.splitlines() == [
        "41 of 200 runs, 4 a second, 40 s left", "82 of 200 runs, 4 a second, 30 s left"
    ]  # fmt: skip
    monkeypatch.undo()
    monkeypatch.setenv("TERM", "xterm")
    with Progress(terminal) as bar:
        bar.at(50, 200)
        bar.at(51, 200)
    assert "51/200" in terminal.text
    assert "a second" in terminal.text
