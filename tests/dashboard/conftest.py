"""A folder of real runs, and the dashboard over it without a browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from dash import Dash
from werkzeug.test import Client

from layerwatch.dashboard import create_app
from layerwatch.dashboard.queries import Library
from tests.dashboard.tiny import write_runs


@pytest.fixture(scope="session")
def runs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def library(runs_root: Path) -> Library:
    return Library(runs_root)


@pytest.fixture(scope="session")
def app(runs_root: Path) -> Dash:
    return create_app(runs_root)


@pytest.fixture
def client(app: Dash) -> Client:
    return app.server.test_client()
