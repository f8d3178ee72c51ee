"""examples/ci: the workflows are what they say, and their commands run, in order, in a fresh folder."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as xml

import pytest
import yaml

from tests.test_cli import train
from tests.test_cli_check import faults


@pytest.fixture
def project(checkout: Path, tmp_path: Path) -> Path:
    """A project with the training of the example, made shorter."""
    project = tmp_path / "project"
    project.mkdir()
    script = (checkout / "examples" / "ci" / "train.py").read_text(encoding="utf-8")
    (project / "train.py").write_text(script.replace("default=300", "default=100"))
    return project


@pytest.fixture
def environment(checkout: Path, tmp_path: Path) -> dict[str, str]:
    """One in which `python` and `layerwatch` are ours, as after the installation."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, more in (("python", ""), ("layerwatch", "-m layerwatch ")):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {more}"$@"\n')
        (programs / name).chmod(0o755)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "PRE_COMMIT_HOME": str(tmp_path / "pre-commit"),
    }


def parsed(checkout: Path, name: str) -> Any:
    return yaml.safe_load((checkout / "examples" / "ci" / name).read_text(encoding="utf-8"))


def steps(checkout: Path) -> list[dict[str, Any]]:
    return parsed(checkout, "github-actions.yml")["jobs"]["training"]["steps"]


def run(step: dict[str, Any], project: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A step as GitHub's runner starts it."""
    script = project.parent / "step.sh"
    script.write_text(step["run"])
    return subprocess.run(
        ["bash", "-e", str(script)], cwd=project, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.soak
def test_the_workflow_of_github(checkout: Path, project: Path, environment: dict[str, str]) -> None:
    shutil.copytree(project, project.parent / "base")
    shutil.move(project.parent / "base", project / "base")  # what the second checkout does
    done = [step["name"] for step in steps(checkout) if "run" in step]
    assert done == ["Install", "Train", "Check", "Train the base with three seeds", "Compare"]
    for step in steps(checkout):
        if "run" in step and step["name"] != "Install":
            result = run(step, project, environment)
            assert result.returncode == 0, result.stderr
    root = xml.parse(project / "report.xml").getroot()
    assert list(faults(root)) == []
    assert root.find("testsuite[@failures='0']") is not None
    summary = Path(environment["GITHUB_STEP_SUMMARY"]).read_text()
    checked, compared = summary.split("### ")[1:]
    assert checked.startswith("layerwatch check: 1 passed\n")
    assert compared.startswith("`new` against `base-0`\n")
    assert "Every logged result ended the same." in compared  # same code, same seed
    kept = steps(checkout)[-1]["with"]["path"].split()
    assert all((project / path).exists() for path in kept)


def test_a_sick_training_fails_the_step(checkout: Path, project: Path, environment: dict[str, str]) -> None:
    train(project / "runs" / "new", broken=True)
    (check,) = [step for step in steps(checkout) if step.get("name") == "Check"]
    result = run(check, project, environment)
    assert result.returncode == 1
    assert result.stdout.startswith("::error title=nonfinite in runs/new::")
    assert xml.parse(project / "report.xml").find(".//testcase[@name='nonfinite']/failure") is not None
    assert "nonfinite" in Path(environment["GITHUB_STEP_SUMMARY"]).read_text()


def test_what_the_workflow_uses(checkout: Path) -> None:
    workflow = parsed(checkout, "github-actions.yml")
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow[True] == "pull_request"  # YAML 1.1 reads `on` so; GitHub does not
    used = [step["uses"].split("@")[0] for step in steps(checkout) if "uses" in step]
    assert used == [f"actions/{name}" for name in ("checkout", "checkout", "setup-python", "upload-artifact")]
    always = [step["name"] for step in steps(checkout) if step.get("if") == "${{ !cancelled() }}"]
    assert always == ["Check", "Keep the logs"]


def test_the_job_of_gitlab_does_the_same(checkout: Path) -> None:
    job = parsed(checkout, "gitlab-ci.yml")["training"]
    training, check = [step["run"] for step in steps(checkout) if step.get("name") in ("Train", "Check")]
    assert job["script"] == [training, check.replace(" --format github", "")]
    assert job["artifacts"]["reports"]["junit"] == "report.xml"
    assert job["artifacts"]["when"] == "always"


def test_pre_commit_lets_a_healthy_training_pass_and_stops_a_sick_one(
    checkout: Path, project: Path, environment: dict[str, str]
) -> None:
    def program(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            arguments, cwd=project, env=environment, capture_output=True, text=True, check=False
        )

    def commit(message: str) -> None:
        program("git", "add", ".")
        done = program("git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-m", message)
        assert done.returncode == 0, done.stdout + done.stderr

    # A training that was done before, so that the test need not wait for it.
    for name in ("healthy", "broken"):
        train(project.parent / name, broken=name == "broken")
    script = project / "train.py"
    script.write_text("import shutil, sys\nshutil.copytree('../healthy', sys.argv[-1])\n")
    shutil.copy(checkout / "examples" / "ci" / ".pre-commit-config.yaml", project)
    (project / ".gitignore").write_text("/runs/\n")
    program("git", "init", "-b", "main")
    program("git", "init", "--bare", "-b", "main", "../remote")
    program("git", "remote", "add", "origin", "../remote")
    assert program("python", "-m", "pre_commit", "install").returncode == 0
    commit("healthy")
    pushed = program("git", "push", "origin", "main")
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    assert "a short training is healthy" in pushed.stdout + pushed.stderr

    script.write_text(script.read_text().replace("healthy", "broken"))
    commit("sick")
    stopped = program("git", "push", "origin", "main")
    assert stopped.returncode == 1
    assert "nonfinite" in stopped.stdout + stopped.stderr
    (project / "notes.txt").write_text("no training")
    program("git", "reset", "--soft", "HEAD~1")
    program("git", "restore", "--staged", "--worktree", "train.py")
    commit("no training")
    skipped = program("git", "push", "origin", "main")
    assert skipped.returncode == 0
    assert "no files to check" in skipped.stdout + skipped.stderr
