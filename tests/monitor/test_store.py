"""Local folders and object stores answer the same questions alike."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from layerwatch.monitor.blocks import BLOCK, BlockFile, Blocks
from layerwatch.monitor.errors import StoreError
from layerwatch.monitor.remote import RemoteStore
from layerwatch.monitor.store import Store, store_of
from tests.object_server import ObjectServer


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


@pytest.fixture
def bucket(object_server: ObjectServer) -> RemoteStore:
    store = store_of(object_server.make_bucket())
    assert isinstance(store, RemoteStore)
    return store


def test_a_bucket_answers_as_a_folder_does(bucket: RemoteStore) -> None:
    for name in (
        "run.json", "stats/r0-000001.parquet", "stats/.hidden", "group/exp1/run.json",
        "group/exp1/stats/inner/run.json", ".trash/run.json",
    ):  # fmt: skip
        bucket.put(name, b"0123456789")
    assert bucket.list("stats") == {"r0-000001.parquet": 10}
    assert bucket.list() == {"run.json": 10}
    assert bucket.list("missing") == {}
    assert bucket.folders_with("run.json") == ["", "group/exp1"]
    with bucket.open("stats/r0-000001.parquet") as file:
        file.seek(6)
        assert (file.read(2), file.size()) == (b"67", 10)
    inner = bucket.at("group/exp1")
    assert (inner.name, inner.url, inner.path) == ("exp1", "s3://bucket/group/exp1", None)
    assert inner.read("run.json") == b"0123456789"
    assert abs((bucket.modified("run.json") or 0) - time.time()) < 60
    assert bucket.modified("missing") is None


def test_a_listing_is_one_request_and_lasts_until_refresh(
    bucket: RemoteStore, object_server: ObjectServer
) -> None:
    before = object_server.requests()
    assert [bucket.list(folder) for folder in ("", "stats", "events")] == [{}, {}, {}]
    assert (object_server.requests() - before).total() == 1
    bucket.put("stats/r0-000001.parquet", b"x")
    assert bucket.list("stats") == {}
    bucket.refresh()
    assert bucket.list("stats") == {"r0-000001.parquet": 1}


def test_files_are_stored_whole_and_removed(bucket: RemoteStore, tmp_path: Path) -> None:
    content = bytes(range(256)) * 90_000  # 23 MB: several requests
    (tmp_path / "part").write_bytes(content)
    bucket.put("stats/big", tmp_path / "part")
    assert bucket.read("stats/big") == content
    file = bucket.open("stats/big")
    bucket.remove("stats/big")
    bucket.remove("stats/big")
    with pytest.raises(FileNotFoundError):
        bucket.read("stats/big")
    with pytest.raises(OSError, match="AWS Error") as caught:
        file.read(10)
    assert isinstance(bucket.explained("stats/big", caught.value), FileNotFoundError)


def test_parts_are_read_in_blocks_that_stay(bucket: RemoteStore, object_server: ObjectServer) -> None:
    content = np.random.default_rng(0).bytes(5 * BLOCK + 1000)
    bucket.put("stats/r0-000001.parquet", content)
    before = object_server.requests()

    def read(start: int, size: int) -> int:
        """Is it right? How many requests there were since the file was stored."""
        with bucket.open("stats/r0-000001.parquet") as file:
            assert file.size() == len(content)
            assert file.read_at(size, start) == content[start : start + size]
        return (object_server.requests() - before).total()

    assert read(10, 20) == 3  # listing, size, block
    assert read(BLOCK - 5, 5) == 3
    assert read(BLOCK - 5, 10) == 4
    assert read(0, 4 * BLOCK) == 5  # what is missing at once
    assert read(0, len(content)) == 6
    bucket.put("stats/r0-000001.parquet", content[::-1] + b"more")
    bucket.refresh()
    with bucket.open("stats/r0-000001.parquet") as file:
        assert file.read_at(9, 0) == content[::-1][:9]


@pytest.mark.parametrize("seed", range(3))
def test_a_file_of_blocks_reads_as_a_file(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwatch.monitor.blocks.BLOCK", 16)
    random = np.random.default_rng(seed)
    content = random.bytes(int(random.integers(1, 200)))
    blocks = Blocks(limit=64)
    for _ in range(50):
        file = BlockFile("a", len(content), lambda: pa.BufferReader(content), blocks)
        plain = io.BytesIO(content)
        for _ in range(5):
            start, size = map(int, random.integers(0, 220, 2))
            assert file.seek(start) == plain.seek(start)
            assert file.read(size) == plain.read(size)
        file.seek(0)
        assert file.read() == content
        assert sum(map(len, blocks._blocks.values())) <= 64


def test_a_part_that_is_shorter_than_listed_is_no_silent_success() -> None:
    file = BlockFile("a", 100, lambda: pa.BufferReader(b"short"), Blocks())
    with pytest.raises(OSError, match="expected 100 bytes from 0 on, got 5"):
        file.read(10)


def test_what_is_wrong_is_said_soon_and_without_secrets(
    bucket: RemoteStore, object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwatch.monitor.remote.STALLED_SECONDS", 1.0)
    with pytest.raises(StoreError, match="s3://other cannot be used: there is no such bucket") as caught:
        store_of("s3://other").list()
    assert caught.value.lasting
    bucket.put("run.json", b"{}")
    file = bucket.open("run.json")

    began, patient = time.monotonic(), store_of(bucket.url)
    object_server.freeze()
    with pytest.raises(StoreError, match="cannot be reached") as caught:
        patient.list()
    assert not caught.value.lasting
    object_server.thaw()

    object_server.stop()
    for ask in (lambda: bucket.read("run.json"), lambda: bucket.put("x", b""), lambda: bucket.remove("x")):
        with pytest.raises(StoreError, match="s3://bucket cannot be reached"):
            ask()
    with pytest.raises(OSError, match="AWS Error") as broken:
        file.read_at(2, 0)
    assert isinstance(bucket.explained("run.json", broken.value), StoreError)
    assert time.monotonic() - began < 30  # what two attempts take that do not know this test's limit
    object_server.start()
    damage = OSError("corrupt page")
    assert bucket.explained("run.json", damage) is damage


def test_wrong_credentials(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with ObjectServer(unchecked=0) as strict:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", strict.endpoint)
        for ask in (lambda s: s.list(), lambda s: s.read("run.json"), lambda s: s.put("a", b"")):
            with pytest.raises(StoreError, match=r"cannot be used.*access") as caught:
                ask(store_of("s3://bucket"))
            assert caught.value.lasting
            assert "not-to-be-shown" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://key:not-to-be-shown@bucket/exp1", "no credentials in the URL of s3://bucket/exp1"),
        ("s3:///exp1", "expected a URL such as"),
        ("s3://bucket/exp1?speed=high", "expected options among endpoint_override, region, scheme"),
        ("gs://bucket/exp1?speed=high", "cannot be used"),
        ("nonsense://bucket/exp1", "a scheme that fsspec knows"),
    ],
)
def test_urls_that_cannot_be(url: str, said: str) -> None:
    with pytest.raises(StoreError, match=said) as caught:
        store_of(url)
    assert "not-to-be-shown" not in str(caught.value)


def test_the_endpoint_can_be_in_the_url(
    bucket: RemoteStore, object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("exp1/run.json", b"{}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    options = f"?scheme=http&endpoint_override=127.0.0.1:{object_server.port}&region=eu-west-1"
    store = store_of("s3://bucket/" + options)
    assert store.at("exp1").read("run.json") == b"{}"
    assert store.at("exp1").url == "s3://bucket/exp1" + options


def test_other_schemes_go_through_fsspec() -> None:
    store = store_of("memory://runs/exp1")
    assert isinstance(store, RemoteStore)
    store.put("stats/r0-000001.parquet", b"0123")
    assert store.list("stats") == {"r0-000001.parquet": 4}
    assert store.read("stats/r0-000001.parquet") == b"0123"
    with pytest.raises(FileNotFoundError):
        store.read("missing")
    store.remove("stats/r0-000001.parquet")
    assert store_of("memory://runs").folders_with("run.json") == []
