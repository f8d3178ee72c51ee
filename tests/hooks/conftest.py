"""What every test of the hooks gets: no training of another test that is still watched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from layerwatch.hooks.watcher import _watching


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """A test that fails in the middle of a training leaves its watcher, which others would meet."""
    yield
    for watcher in list(_watching):
        watcher._detach()
