"""Every code block of the README runs, in the order of the page, in one folder."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from layerwatch.cli import build_parser, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)


def _commands(language: str) -> list[str]:
    lines = [line for kind, text in BLOCKS if kind == language for line in text.splitlines()]
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the blocks ran, with what each printed in <number>.out."""
    place = tmp_path_factory.mktemp("readme")
    (settings,) = [text for language, text in BLOCKS if language == "toml"]
    (place / "layerwatch.toml").write_text(settings)
    for number, (language, text) in enumerate(BLOCKS):
        if language == "python":
            command = [sys.executable, "-W", "error", "-c", text]
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, f"block {number}:\n{text}\n{done.stderr}"
            (place / f"{number}.out").write_text(done.stdout)
    return place


def test_only_known_languages() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "bash", "toml"}


def test_the_setup_is_two_make_targets_that_exist() -> None:
    makes = [c for c in _commands("bash") if c.startswith("make")]
    assert makes == ["make demo", "make test"]
    for command in makes:
        done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_attaching_takes_five_lines() -> None:
    first = next(text for language, text in BLOCKS if language == "python")
    lines = [line for line in first.splitlines() if re.search(r"layerwatch|watch\(|watcher\.", line)]
    assert len([line for line in lines if "val_loss" not in line]) <= 5


def test_python_blocks_print_what_they_promise(folder: Path) -> None:
    numbers = [i for i, (language, _) in enumerate(BLOCKS) if language == "python"]
    attach, tuned, pandas, duckdb, linear = ((folder / f"{i}.out").read_text() for i in numbers)
    assert attach == ""
    assert all(word in tuned for word in ("relative_l2", "4.bias"))
    for words, output in ((("norm", "0.weight", "low"), pandas), (("mean", "298"), duckdb)):
        assert all(word in output for word in words), output
    assert linear.startswith("step  0: weight")
    assert linear.endswith("at the end: weight 3.000, bias 2.000\n")


def test_the_healthy_example_has_no_alarm(folder: Path) -> None:
    from layerwatch import Run

    assert [f for f in Run(folder / "runs" / "exp1").findings() if f.severity != "info"] == []


def test_commands_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [c for c in _commands("bash") if c.startswith("layerwatch")]
    assert {c.split()[1] for c in commands} == {
        "alerts", "check", "compare", "dashboard", "drift", "explain", "export", "label", "lineage",
        "precision", "runs", "scan", "verify",
    }  # fmt: skip
    shutil.copytree(folder / "runs" / "exp1", folder / "runs" / "exp2")
    monkeypatch.chdir(folder)
    for command in commands:
        words = shlex.split(command)[1:]
        if words[0] != "dashboard":  # serves until it is ended: the browser tests do that
            assert main(words) == 0, f"{command}\n{capsys.readouterr().err}"
        else:
            build_parser().parse_args(words)
    assert (folder / "exp1.parquet").is_file()
    assert (folder / "runs" / "layerwatch-scan.parquet").is_file()
    assert (folder / "report.xml").is_file()


def test_links_point_at_files() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
