"""The wheel holds what the checkout holds, and a user's own hooks/ or monitor.py never stands in for ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOMS = ("dashboard", "hooks", "monitor")


@pytest.fixture(scope="session")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout, because setuptools leaves files behind where it builds."""
    copy = tmp_path_factory.mktemp("wheel") / "copy"
    wanted = ("layerwatch", *ROOMS, "docs", "pyproject.toml", "README.md", "LICENSE")
    copy.mkdir()
    for name in wanted:
        source = checkout / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(copy.parent), str(copy)], check=True, capture_output=True)
    (built,) = copy.parent.glob("layerwatch-*.whl")
    return built


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_a_relative_link_inside_the_package(checkout: Path, room: str) -> None:
    assert os.readlink(checkout / "layerwatch" / room) == f"../{room}"


def test_the_wheel_contains_every_module_once(checkout: Path, wheel: Path) -> None:
    """A new subfolder that is missing here must be added to `packages` in pyproject.toml."""
    own = [
        path
        for path in (checkout / "layerwatch").rglob("*.py")
        if path.relative_to(checkout).parts[1] not in ROOMS
    ]
    rooms = [path for room in ROOMS for path in (checkout / room).rglob("*.py")]
    expected = {str(path.relative_to(checkout)) for path in own}
    expected |= {str("layerwatch" / path.relative_to(checkout)) for path in rooms}

    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert {name for name in names if name.endswith(".py")} == expected


def test_the_wheel_contains_the_type_marker_and_the_assets(checkout: Path, wheel: Path) -> None:
    assets = [path for path in (checkout / "dashboard" / "assets").rglob("*") if path.is_file()]
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "layerwatch/py.typed" in names
    assert {str("layerwatch" / path.relative_to(checkout)) for path in assets} <= names


def test_the_pages_of_problems_are_a_link_in_the_checkout_and_files_in_the_wheel(
    checkout: Path, wheel: Path, tmp_path: Path
) -> None:
    assert os.readlink(checkout / "layerwatch" / "problems") == "../docs/problems"
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert read_pages(tmp_path, tmp_path) == sorted(p.stem for p in (checkout / "docs/problems").glob("*.md"))


def test_an_editable_install_finds_the_pages(checkout: Path, tmp_path: Path) -> None:
    """Built from a copy, because setuptools leaves files behind where it builds; installed in a venv."""
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("layerwatch", *ROOMS, "docs"):
        shutil.copytree(checkout / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(checkout / name, copy / name)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    site = tmp_path / "site"
    subprocess.run([*command, "--target", str(site), "-e", str(copy)], check=True, capture_output=True)
    assert "exploding_gradients" in read_pages(site, tmp_path, f"import site; site.addsitedir({str(site)!r})")


def read_pages(path: Path, folder: Path, before: str = "") -> list[str]:
    """The codes that an interpreter in `folder` finds, which has `path` first on its path."""
    code = (
        f"{before}\nimport layerwatch\nassert layerwatch.__file__.startswith({str(folder)!r})\n"
        "from layerwatch.monitor.problems import problems\nprint(*problems())"
    )
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_modules_of_the_user_shadow_nothing(wheel: Path, tmp_path: Path) -> None:
    site, project = tmp_path / "site", tmp_path / "project"
    zipfile.ZipFile(wheel).extractall(site)
    project.mkdir()
    for room in ROOMS:
        (project / f"{room}.py").write_text("OWNER = 'user'\n")
    code = (
        "import importlib, pathlib, sys\n"
        "for room in ('monitor', 'hooks', 'dashboard'):\n"
        "    ours = importlib.import_module(f'layerwatch.{room}')\n"
        "    theirs = importlib.import_module(room)\n"
        "    print(pathlib.Path(ours.__file__).relative_to(sys.argv[1]), theirs.OWNER)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [
        f"layerwatch/{room}/__init__.py user" for room in ("monitor", "hooks", "dashboard")
    ], done.stderr
