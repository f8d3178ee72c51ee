"""What every test gets: one thread, a working directory of its own, repeatable property tests."""

from __future__ import annotations

import math
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before numpy and torch are imported: two threads on a loaded two-core machine are slower than one,
# and sums that are split differently differ in their last bit.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a network
os.environ["LAYERWATCH_CACHE"] = tempfile.mkdtemp(prefix="layerwatch-tests-")  # not the user's own

import numpy as np
import pytest
from hypothesis import settings

from layerwatch.monitor import log

from .object_server import CREDENTIALS, ObjectServer

log.SLOW_SECONDS = math.inf  # a stall of this disk costs no test a capture; tests of slow disks set it

settings.register_profile("layerwatch", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("layerwatch")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, but all that needs a browser is one file and comes first: two browsers on two cores
    keep each other waiting, and what takes longest must not begin last."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope = super()._split_scope(nodeid)
            return "tests/browser" if scope.startswith("tests/browser/") else scope

    config.option.loadscopereorder = False  # files of few tests would come last: they take longest
    return ByFile(config, log)


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["LAYERWATCH_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths (`./runs`) land in the test's own folder, never in the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def _one_object_server() -> Iterator[ObjectServer]:
    with ObjectServer() as server:
        yield server


@pytest.fixture
def object_server(
    _one_object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[ObjectServer]:
    """An empty S3 server that every s3:// URL leads to; spools lie in the test's own folder."""
    monkeypatch.setenv("LAYERWATCH_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", _one_object_server.endpoint)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    yield _one_object_server
    _one_object_server.reset()
