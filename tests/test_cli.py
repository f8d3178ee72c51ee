"""The command line: what it prints, its exit codes, and one clear line for everything that can be wrong."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.tensorboard.writer import SummaryWriter

from layerwatch import Run, watch
from layerwatch.cli import build_parser, main
from layerwatch.monitor.description import write_json
from layerwatch.monitor.problems import SECTIONS, problems

COMMANDS = (
    "demo", "dashboard", "check", "compare", "explain", "calibrate", "drift", "run", "runs", "export",
    "compact", "upload", "import-tensorboard", "precision", "label",
)  # fmt: skip
FINDING = {"run", "problem", "severity", "layers", "first_step", "last_step", "summary", "evidence", "advice"}


def test_explain_prints_the_page_of_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "vanishing_gradients"]) == 0
    printed = capsys.readouterr().out
    for heading in ("Vanishing gradients", *SECTIONS):
        assert heading in printed
    assert re.search(r"gradients\.VANISHING +│? *1e-3", printed)
    assert ".md" not in printed


def test_explain_alone_lists_every_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0
    printed = capsys.readouterr().out
    for code, page in problems().items():
        assert f" {code} " in printed
        assert " ".join(page.rule.split()[:5]) in printed


def test_explain_names_the_closest_of_an_unknown_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "vanishing_gradient"]) == 2
    assert "did you mean vanishing_gradients?" in capsys.readouterr().err


def train(path: Path, *, broken: bool = False, steps: int = 30, close: bool = True) -> Path:
    """A small real run; a broken one has a NaN in a weight from its tenth step on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    truth = torch.randn(8, 1)
    watcher = watch(model, optimizer, run=path, every=1)
    for step in range(steps):
        x = torch.randn(64, 8)
        loss = (model(x) - x @ truth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watcher.log(train_loss=loss)
        if broken and step == 9:
            with torch.no_grad():
                model.get_parameter("2.weight")[0, 0] = float("nan")
    if close:
        watcher.close()
    else:  # as if it had been killed: another process is named as the writer
        watcher._detach()
        watcher._open = False
        info = json.loads((path / "run.json").read_text())
        del info["checksum"]
        write_json(path / "run.json", {**info, "pid": 2**22 + 1})
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a healthy and a broken run."""
    root = tmp_path_factory.mktemp("runs")
    train(root / "healthy")
    train(root / "broken", broken=True)
    return root


Result = tuple[int, str, str]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs a command in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> Result:
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def layerwatch(
    *arguments: object, cwd: Path, checkout: Path, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "layerwatch", *map(str, arguments)], cwd=cwd, text=True, check=False,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(checkout)}, **more,
    )  # fmt: skip


# Help -------------------------------------------------------------------------------------------------------


def test_help_names_every_command(call: Callable[..., Result]) -> None:
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    for name in COMMANDS:
        assert re.search(rf"^ +{name}\b", out, re.MULTILINE), name


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_an_example_that_parses(call: Callable[..., Result], name: str) -> None:
    code, out, _ = call(name, "--help")
    assert code == 0
    example = re.search(r"example: layerwatch (.+)", " ".join(out.split()))
    assert example, out
    assert build_parser().parse_args(example[1].split()).command == name


# Wrong input ------------------------------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path: Path, runs: Path) -> Path:
    """Everything that is not quite a run."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    watch(nn.Linear(2, 2), run=tmp_path / "empty").close()
    half = tmp_path / "half"
    half.mkdir()
    (half / "run.json").write_bytes((runs / "healthy" / "run.json").read_bytes()[:100])
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "run.json").write_text('{"schema_version": 99}')
    return tmp_path


NO_RUN = {
    "missing": "does not exist: check the path",
    "folder": "has none: give the folder passed to watch",
    "file": "expected a run folder",
    "empty": "is empty: nothing is captured yet",
    "half": "is damaged",
    "newer": "upgrade layerwatch",
}


@pytest.mark.parametrize("path", NO_RUN)
@pytest.mark.parametrize("command", ["check", "export", "compact"])
def test_a_path_that_is_no_run(call: Callable[..., Result], odd: Path, command: str, path: str) -> None:
    more = ["out.csv"] if command == "export" else []
    code, out, err = call(command, odd / path, *more)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"layerwatch {command}: ")
    assert NO_RUN[path] in err
    assert path in err


@pytest.mark.parametrize("path", ["missing", "folder", "empty"])
def test_a_baseline_that_is_no_run(call: Callable[..., Result], odd: Path, runs: Path, path: str) -> None:
    code, out, err = call("check", runs / "healthy", "--baseline", odd / path)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert NO_RUN[path] in err


WRONG = {
    "no command": [],
    "unknown command": ["frobnicate"],
    "unknown option": ["check", "healthy", "--loud"],
    "no run": ["check"],
    "bad choice": ["check", "healthy", "--format", "xml"],
    "info never fails": ["check", "healthy", "--fail-on", "info"],
    "unknown suffix": ["export", "healthy", "out.xlsx"],
    "no output": ["export", "healthy"],
    "missing output folder": ["export", "healthy", "gone/out.csv"],
    "no number": ["dashboard", "--port", "many"],
    "port too high": ["dashboard", ".", "--port", "70000"],
    "dashboard on nothing": ["dashboard", "gone"],
    "a token that can be guessed": ["dashboard", ".", "--port", "0", "--token", "secret"],
    "a prefix that is none": ["dashboard", ".", "--port", "0", "--prefix", "https://x/"],
    "a prefix of our own": ["dashboard", ".", "--port", "0", "--prefix", "/run/"],
    "dashboard on a file": ["dashboard", "healthy/run.json"],
    "unknown kind": ["export", "healthy", "out.csv", "--kind", "wieght"],
    "no steps": ["export", "healthy", "out.csv", "--steps", "a:b"],
    "steps that are not there": ["export", "healthy", "out.csv", "--steps", "1000:"],
    "no regex": ["export", "healthy", "out.csv", "--tensor", "["],
    "two tables": ["export", "healthy", "out.csv", "--scalars", "--histograms"],
    "runs of nothing": ["runs", "gone"],
    "import of nothing": ["import-tensorboard", "gone", "new"],
    "import over a run": ["import-tensorboard", "healthy", "broken"],
    "import without events": ["import-tensorboard", "healthy", "new"],
    "a rule without meaning": ["import-tensorboard", "gone", "new", "--scalar", "loss"],
    "a rule of an unknown kind": ["import-tensorboard", "gone", "new", "--histogram", "x=wieght"],
    "nothing to run": ["run"],
    "an option of the script too early": ["run", "--lr", "0.1", "train.py"],
    "no step is captured": ["run", "--every", "0", "train.py"],
    "run over a run": ["run", "--run", "healthy", "train.py"],
    "a reference that is not there": ["run", "--reference", "gone.pt", "train.py"],
    "a pattern that is none": ["run", "--include", "[", "train.py"],
    "a rule that is no regex": ["import-tensorboard", "gone", "new", "--scalar", "(=loss"],
}


@pytest.mark.parametrize("case", WRONG)
def test_every_mistake_is_one_line_and_exit_code_2(
    call: Callable[..., Result], runs: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(runs)
    code, out, err = call(*WRONG[case])
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert err.startswith("layerwatch")
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["dashboard", "demo"])
def test_a_port_in_use(call: Callable[..., Result], runs: Path, tmp_path: Path, command: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        folder = [runs] if command == "dashboard" else ["--dir", tmp_path / "demo"]
        code, out, err = call(command, *folder, "--port", port)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"127.0.0.1:{port} cannot be used" in err
    assert "choose another --port" in err
    assert not (tmp_path / "demo").exists()  # it says so before it trains


def test_a_damaged_part_is_named_and_the_rest_judged(call: Callable[..., Result], tmp_path: Path) -> None:
    run = train(tmp_path / "run")
    (part,) = (run / "values").glob("*.parquet")
    part.write_bytes(b"PAR1" + bytes(50))
    (part,) = (run / "stats").glob("*.parquet")
    part.write_bytes(part.read_bytes()[:-30])
    code, out, err = call("check", run, "--format", "json")
    assert (code, err) == (0, "")
    assert any(part.name in note for note in json.loads(out)["notes"])


# check ------------------------------------------------------------------------------------------------------


def read_json(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_check_as_json_is_as_the_contract_says(call: Callable[..., Result], runs: Path) -> None:
    code, out, err = call("check", runs / "broken", "--format", "json")
    assert (code, err) == (0, "")
    document = read_json(out)
    assert set(document) == {"version", "runs", "findings", "notes"}
    assert (document["version"], document["runs"]) == (1, ["broken"])
    assert all(isinstance(note, str) for note in document["notes"])
    problems = [f["problem"] for f in document["findings"]]
    assert len(problems) == len(set(problems))  # one finding per problem and run
    known = set(Run(runs / "broken").tensors()["tensor"]) | set(Run(runs / "broken").modules()["module"])
    for finding in document["findings"]:
        assert set(finding) >= FINDING
        assert finding["run"] == "broken"
        assert finding["severity"] in ("info", "warning", "critical")
        assert set(finding["layers"]) <= known
        assert 0 <= finding["first_step"] <= finding["last_step"] <= 29
        assert finding["summary"]
        assert finding["advice"]
        assert finding["evidence"]
    root = document["findings"][0]
    assert (root["problem"], root["severity"]) == ("nonfinite", "critical")
    assert root["first_step"] == 10
    assert root["layers"][0] in ("2", "2.weight")


def test_findings_are_those_of_the_library(call: Callable[..., Result], runs: Path) -> None:
    found = read_json(call("check", runs / "broken", "--format", "json")[1])["findings"]
    assert found == [json.loads(json.dumps(f.to_dict())) for f in Run(runs / "broken").findings()]


def test_several_runs_and_baselines(call: Callable[..., Result], runs: Path) -> None:
    code, out, _ = call(
        "check",
        runs / "broken",
        runs / "healthy",
        "--baseline",
        runs / "healthy",
        runs / "healthy",
        "--format",
        "json",
    )
    document = read_json(out)
    assert code == 0
    assert document["runs"] == ["broken", "healthy"]
    assert {f["run"] for f in document["findings"]} >= {"broken"}


@pytest.mark.parametrize(
    ("run", "fail_on", "code"),
    [("broken", None, 0), ("broken", "critical", 1), ("broken", "warning", 1), ("healthy", "critical", 0)],
)
@pytest.mark.parametrize("form", ["text", "json"])
def test_the_exit_code_fails_only_when_asked(
    call: Callable[..., Result], runs: Path, run: str, fail_on: str | None, code: int, form: str
) -> None:
    more = ["--fail-on", fail_on] if fail_on else []
    got, out, err = call("check", runs / run, "--format", form, *more)
    assert (got, err) == (code, "")
    assert out


def test_check_as_text_says_what_where_since_when_and_what_to_do(
    call: Callable[..., Result], runs: Path
) -> None:
    code, out, _ = call("check", runs / "broken")
    text = " ".join(out.split())
    assert code == 0
    finding = Run(runs / "broken").findings()[0]
    for part in ("broken", "30 steps", finding.problem, finding.severity, finding.layers[0], "10-29"):
        assert part in text, part
    assert "alarm" in text
    assert "\x1b[" not in out  # no colours into a pipe
    healthy = call("check", runs / "healthy")[1]
    assert "healthy" in healthy


# The other commands -----------------------------------------------------------------------------------------


def test_runs_lists_every_run_by_its_name(call: Callable[..., Result], tmp_path: Path) -> None:
    train(tmp_path / "sub" / "plain", steps=3)
    train(tmp_path / "odd [bold] name", steps=3)
    train(tmp_path / "killed", steps=3, close=False)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.json").write_text("{")
    code, out, err = call("runs", tmp_path)
    assert code == 0
    lines = {
        name: line
        for line in out.splitlines()
        for name in ("sub/plain", "odd [bold] name", "killed")
        if name in line
    }
    assert set(lines) == {"sub/plain", "odd [bold] name", "killed"}
    assert "closed" in lines["sub/plain"]
    assert "interrupted" in lines["killed"]
    assert re.search(r"\b2\b", lines["killed"])
    assert len(err.splitlines()) == 1
    assert "half" in err


def test_runs_of_an_empty_folder(call: Callable[..., Result], tmp_path: Path) -> None:
    code, out, err = call("runs", tmp_path)
    assert (code, err) == (0, "")
    assert out.startswith("No runs below")


def test_export_writes_the_table(call: Callable[..., Result], runs: Path, tmp_path: Path) -> None:
    code, out, err = call("export", runs / "healthy", tmp_path / "a.csv")
    frame = pd.read_csv(tmp_path / "a.csv")
    assert (code, err) == (0, "")
    assert out.strip() == f"{tmp_path / 'a.csv'}: {len(frame)} rows"
    assert not frame.duplicated(["step", "tensor", "kind"]).any()
    assert call("export", runs / "healthy", tmp_path / "a.parquet")[0] == 0
    assert len(pd.read_parquet(tmp_path / "a.parquet")) == len(frame)


def test_export_of_a_part(call: Callable[..., Result], runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.csv"

    def exported(*options: str) -> pd.DataFrame:
        assert call("export", runs / "healthy", out, *options)[0] == 0
        return pd.read_csv(out)

    frame = exported("--steps", "5:7", "--kind", "gradient", "--kind", "weight", "--tensor", r"^0\.")
    assert sorted(frame["step"].unique()) == [5, 6, 7]
    assert set(frame["kind"]) == {"gradient", "weight"}
    assert set(frame["tensor"]) == {"0.weight", "0.bias"}
    assert len(frame) == 3 * 2 * 2
    assert exported("--steps", "28:", "--kind", "weight")["step"].unique().tolist() == [28, 29]
    assert exported("--steps", ":1", "--kind", "weight")["step"].unique().tolist() == [0, 1]
    assert exported("--steps", "4", "--kind", "weight")["step"].unique().tolist() == [4]
    assert exported("--scalars", "--tensor", "train_loss")["step"].tolist() == list(range(30))
    frame = exported("--histograms", "--kind", "weight", "--steps", "3")
    assert frame["count"].sum() == 8 * 16 + 16 + 16 + 1


def test_import_tensorboard(call: Callable[..., Result], tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "logs")) as writer:
        for step in range(3):
            writer.add_histogram("fc.weight", torch.ones(4), step)
            writer.add_histogram("noise", torch.ones(4), step)
            writer.add_scalar("ce_dev", 1.0 + step, step)
    run = tmp_path / "run"
    rules = ["--histogram", "noise=skip", "--scalar", r"(\w+)_dev=val_loss"]
    code, out, err = call("import-tensorboard", tmp_path / "logs", run, *rules)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{run}: 3 scalars, 3 histograms"
    assert "quantiles are approximate" in lines[1]
    assert Run(run).scalars("val_loss")["value"].tolist() == [1.0, 2.0, 3.0]
    assert Run(run).tensors()["tensor"].tolist() == ["fc.weight"]
    code, out, err = call("check", run)
    assert (code, err) == (0, "")
    assert "run · 3 steps" in out


def test_compact_of_a_killed_run(call: Callable[..., Result], tmp_path: Path) -> None:
    path = train(tmp_path / "run", close=False)
    before = Run(path).stats("weight")
    assert list((path / "wal").iterdir())
    code, out, err = call("compact", path)
    assert (code, err) == (0, "")
    assert "1 files replaced" in out
    assert not list((path / "wal").iterdir())
    pd.testing.assert_frame_equal(Run(path).stats("weight"), before)
    assert call("compact", path)[0] == 0


def test_a_running_training_is_not_compacted(call: Callable[..., Result], tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with watch(model, run=tmp_path / "run") as watcher:
        watcher.log(train_loss=1.0)
        code, _, err = call("compact", tmp_path / "run")
    assert code == 2
    assert "still being written" in err


# In a process of its own ------------------------------------------------------------------------------------


def test_as_a_program(runs: Path, checkout: Path) -> None:
    done = layerwatch(
        "check", "broken", "--format", "json", "--fail-on", "critical", cwd=runs, checkout=checkout
    )
    assert done.returncode == 1
    assert done.stderr == ""
    assert read_json(done.stdout)["findings"]
    wrong = layerwatch("check", "gone", cwd=runs, checkout=checkout)
    assert (wrong.returncode, wrong.stdout, len(wrong.stderr.splitlines())) == (2, "", 1)


def test_a_reader_of_the_output_that_goes_away(runs: Path, checkout: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "layerwatch", "check", "broken", "--format", "json"], cwd=runs,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(checkout)},
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == 0


def test_looking_at_runs_needs_no_torch(runs: Path, checkout: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\nfrom layerwatch.cli import main\n"
        "raise SystemExit(main(['check', 'broken']) or main(['runs', '.']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=runs, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "nonfinite" in done.stdout
