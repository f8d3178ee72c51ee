"""What every test of the hooks gets: no training of another test that is still watched, and nothing that
happens after ten seconds: a loaded machine takes them for what takes one."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import pytest

from layerwatch.hooks import live, system
from layerwatch.hooks.watcher import _watching

live.CHECK_SECONDS = math.inf  # tests of looks and of readings set them
system.PERIOD = threading.TIMEOUT_MAX


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """A test that fails in the middle of a training leaves its watcher, which others would meet."""
    yield
    for watcher in list(_watching):
        watcher._detach()
