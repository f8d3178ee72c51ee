"""Runs a program in this process as `python script.py`, `python folder` and `python -m module` run it."""

from __future__ import annotations

import builtins
import importlib.machinery
import io
import os
import runpy
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


def run_program(program: Sequence[str], *, as_module: bool) -> None:
    """Run it as `__main__`, with its arguments.

    What it raises, `SystemExit` included, is raised here, and shown by `sys.excepthook` as Python alone would
    show it.
    """
    try:
        _execute(program, as_module=as_module)
    except BaseException:
        sys.excepthook = _without_our_frames(sys.excepthook)
        raise


def _execute(program: Sequence[str], *, as_module: bool) -> None:
    """What `python script.py ...`, `python folder ...` or `python -m module ...` do."""
    name = program[0]
    sys.argv = list(program)
    main = types.ModuleType("__main__")
    vars(main).update(__builtins__=builtins)
    if sys.version_info < (3, 14):
        vars(main).update(__annotations__={})
    sys.modules["__main__"] = main
    if as_module:
        _set_path(os.getcwd())
        runpy._run_module_as_main(name)  # type: ignore[attr-defined]
    elif Path(name).is_dir() or _is_archive(name):
        _set_path(os.path.abspath(name))
        runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]
    else:
        _set_path(os.path.dirname(os.path.realpath(name)))
        path = os.path.abspath(name)
        loader = importlib.machinery.SourceFileLoader("__main__", path)
        vars(main).update(__file__=path, __cached__=None, __loader__=loader)
        exec(compile(_source(name), path, "exec", dont_inherit=True), vars(main))


def _set_path(first: str) -> None:
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        sys.path[0] = first


def _is_archive(name: str) -> bool:
    import zipfile

    return not name.endswith(".py") and zipfile.is_zipfile(name)


def _source(name: str) -> bytes:
    try:
        with io.open_code(os.path.abspath(name)) as file:
            return file.read()
    except OSError as error:
        sys.stderr.write(f"{sys.executable}: can't open file {os.path.abspath(name)!r}: ")
        sys.stderr.write(f"[Errno {error.errno}] {error.strerror}\n")
        raise SystemExit(2) from None


def _without_our_frames(hook: Callable[..., Any]) -> Callable[..., Any]:
    """An excepthook that shows the error as the script alone would have raised it."""

    def show(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        chain, seen = [error], set()
        while chain:
            link = chain.pop()
            if id(link) not in seen:
                seen.add(id(link))
                link.__traceback__ = _shortened(link.__traceback__)
                chain += [e for e in (link.__cause__, link.__context__) if e is not None]
        hook(kind, error, error.__traceback__)

    return show


def _shortened(trace: types.TracebackType | None) -> types.TracebackType | None:
    """From the script's first frame on, without the functions of torch that are wrapped."""
    first = trace
    while first is not None and first.tb_frame.f_code is not _execute.__code__:
        first = first.tb_next
    kept: types.TracebackType | None = None
    for frame in reversed([*_frames(first.tb_next if first else trace)]):
        if not _is_hook(frame):
            frame.tb_next, kept = kept, frame
    return kept


def _frames(trace: types.TracebackType | None) -> Iterator[types.TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _is_hook(frame: types.TracebackType) -> bool:
    return str(frame.tb_frame.f_globals.get("__name__", "")).startswith("layerwatch.hooks.")


class AfterImport(MetaPathFinder):
    """Calls a function once, when a module has been imported."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name, self._then = name, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if finder is not self and find is not None and (spec := find(name, path, target)) is not None:
                if spec.loader is not None:
                    self._follow(spec.loader)
                return spec
        return None

    def _follow(self, loader: Any) -> None:
        original = loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            del loader.exec_module
            original(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._then()

        loader.exec_module = exec_module
