"""Local folders and object stores answer the same questions alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerwatch.monitor.store import Store, store_of


@pytest.fixture
def store(tmp_path: Path) -> Store:
    for name, content in {
        "run.json": "{}",
        "stats/r0-000001.parquet": "0123456789",
        "stats/.r0-000002.parquet.tmp": "half",
        "group/exp1/run.json": "{}",
        "group/exp1/stats/inner/run.json": "{}",
        ".trash/run.json": "{}",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return store_of(tmp_path)


def test_what_is_listed_and_read(store: Store) -> None:
    assert store.list("stats") == {"r0-000001.parquet": 10}
    assert store.list() == {"run.json": 2}
    assert store.list("missing") == store.list("run.json") == {}
    assert store.read("stats/r0-000001.parquet") == b"0123456789"
    with store.open("stats/r0-000001.parquet") as file:
        file.seek(6)
        assert (file.read(2), file.size()) == (b"67", 10)


def test_what_is_missing(store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        store.read("stats/r0-000009.parquet")
    with pytest.raises(FileNotFoundError):
        store.open("stats/r0-000009.parquet")
    assert store.modified("missing") is store.modified("run.json/below") is None


def test_folders_with_a_run(store: Store) -> None:
    assert store.folders_with("run.json") == ["", "group/exp1"]
    inner = store.at("group/exp1")
    assert (inner.name, inner.folders_with("run.json")) == ("exp1", [""])
    assert store.at("") is store


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exp1").mkdir()
    monkeypatch.chdir(tmp_path / "exp1")
    here = store_of(".")
    assert (here.name, here.url, here.path) == ("exp1", ".", Path())
