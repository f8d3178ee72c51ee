"""One direction of flow: monitor knows nobody, hooks and dashboard know monitor, only the CLI knows all."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FRAMEWORKS = {"accelerate", "keras", "lightning", "pytorch_lightning", "tensorflow", "transformers"}
DASH = {"dash", "dash_ag_grid", "dash_mantine_components", "flask", "plotly", "waitress"}
FORBIDDEN = {
    "monitor": {
        "torch",
        "layerwatch.hooks",
        "layerwatch.dashboard",
        "layerwatch.cli",
        "layerwatch.commands",
        *DASH,
        *FRAMEWORKS,
    },
    "hooks": {"layerwatch.dashboard", "layerwatch.cli", "layerwatch.commands", *DASH},
    "dashboard": {"torch", "layerwatch.hooks", "layerwatch.cli", "layerwatch.commands", *FRAMEWORKS},
}


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that `source` imports, at the top or inside a function."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=target, names=names, level=level):
                base = package[: len(package) - level + 1] if level else []
                prefix = ".".join([*base, *([target] if target else [])])
                yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__" | "find_spec")
                | ast.Attribute(attr="import_module" | "find_spec"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def violations(room: str) -> list[str]:
    found = []
    for path in sorted((ROOT / room).rglob("*.py")):
        parts = ("layerwatch", *path.relative_to(ROOT).with_suffix("").parts)
        module = ".".join(parts).removesuffix(".__init__")
        for line, name in imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"):
            if any(name == bad or name.startswith(bad + ".") for bad in FORBIDDEN[room]):
                found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    assert violations(room) == []


def test_the_import_reader_sees_lazy_relative_and_dynamic_imports() -> None:
    source = (
        "from . import a\n"
        "from ..hooks import watch\n"
        "def f():\n"
        "    import torch.nn\n"
        "    importlib.import_module('dash')\n"
    )
    names = {name for _, name in imports(source, "layerwatch.monitor.run", is_package=False)}
    assert names == {"layerwatch.monitor.a", "layerwatch.hooks.watch", "torch.nn", "dash"}
    assert {name for _, name in imports("from . import a", "layerwatch.monitor", is_package=True)} == {
        "layerwatch.monitor.a"
    }


def test_the_tour_of_the_house_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for room in FORBIDDEN:
        start = page.index(f"**`{room}/`")
        named = set(re.findall(r"`(\w+)/?`", page[start : page.index("\n\n**`", start + 1)]))
        there = {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__"}
        assert there - named == set(), f"docs/architecture.md does not say what these modules of {room}/ own"


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""


def test_importing_all_of_monitor_loads_neither_torch_nor_dash() -> None:
    loaded = set(python(IMPORT_ALL.format(package="layerwatch.monitor")).stdout.split())
    assert "pandas" in loaded  # the subprocess did import the room
    assert loaded & ({"torch"} | DASH | FRAMEWORKS) == set()


def test_importing_all_of_dashboard_loads_no_torch() -> None:
    loaded = set(python(IMPORT_ALL.format(package="layerwatch.dashboard")).stdout.split())
    assert loaded & ({"torch"} | FRAMEWORKS) == set()


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import layerwatch", {"torch", "dash", "pandas", "numpy", "numba", "pyarrow"}),
        ("import layerwatch.cli", {"torch", "dash", "pandas", "numba", "pyarrow"}),
        ("import layerwatch.hooks", DASH | FRAMEWORKS),
    ],
)
def test_a_front_door_stays_light(statement: str, unwanted: set[str]) -> None:
    loaded = set(python(f"{statement}\nimport sys\nprint(*sys.modules)").stdout.split())
    assert loaded & unwanted == set()


def test_import_takes_under_100_ms() -> None:
    def milliseconds() -> float:
        # -X importtime leaves out the interpreter's own start; its last line is the outermost import
        last = python("import layerwatch", "-X", "importtime").stderr.strip().splitlines()[-1]
        _, cumulative, name = last.split("|")
        assert name.strip() == "layerwatch"
        return int(cumulative) / 1000

    assert statistics.median(milliseconds() for _ in range(5)) < 100
