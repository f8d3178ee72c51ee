"""A run on an object store: nothing is lost and nothing waits, whatever the store does."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest
from made_logs import info, write_step

from layerwatch.monitor import LogWriter, RunError, RunExistsError
from layerwatch.monitor.errors import StoreError
from layerwatch.monitor.reader import LogReader
from layerwatch.monitor.remote import RemoteStore
from layerwatch.monitor.schema import SORT_KEYS, TABLES
from layerwatch.monitor.spool import open_remote_run, send_spool, spooled
from layerwatch.monitor.store import store_of
from layerwatch.monitor.upload import Uploader
from tests.object_server import ObjectServer

LAST = [("step", "ascending"), ("time", "ascending")]
URL = "s3://bucket/group/exp1"
Standing = Callable[["Training"], contextlib.AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def _impatient(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("layerwatch.monitor.remote.ATTEMPTS", 1)
    monkeypatch.setattr("layerwatch.monitor.upload.LONGEST_PAUSE", 0.5)
    yield
    while Training.begun:  # those of a test that failed, too
        training = Training.begun.pop()
        training.log.close(quick=True)
        training.uploader.close(0.0)
    for thread in threading.enumerate():  # it would write to the next test's bucket
        if thread.name == "layerwatch-upload":
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture
def server(object_server: ObjectServer) -> ObjectServer:
    object_server.make_bucket()
    return object_server


def rows(source: Path | str) -> dict[str, pa.Table]:
    """Every row of every table, in order."""
    reader = LogReader(store_of(source))
    assert reader.problems == {}
    tables = {name: reader.table(name) for name in TABLES}
    return {
        name: table.sort_by([*SORT_KEYS[name], *(k for k in LAST if k not in SORT_KEYS[name])])
        for name, table in tables.items()
    }


def eventually(what: Callable[[], Any]) -> None:
    limit = time.monotonic() + 60
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.fixture
def standing(monkeypatch: pytest.MonkeyPatch) -> Standing:
    """While this is entered the uploader stands in the middle of a request: a step that waits for the store,
    or for the uploader, is noticed."""
    ask, held, stands, go = RemoteStore._translated, threading.Event(), threading.Event(), threading.Event()
    let_go: list[bool] = []

    @contextlib.contextmanager
    def asked(self: RemoteStore) -> Iterator[None]:
        if held.is_set():
            stands.set()
            let_go.append(go.wait(60))
        with ask(self):
            yield

    monkeypatch.setattr(RemoteStore, "_translated", asked)

    @contextlib.contextmanager
    def enter(training: Training) -> Iterator[None]:
        held.set()
        try:
            eventually(lambda: training.steps(1) or stands.is_set())  # it has something to ask for
            yield
        finally:
            held.clear()
            go.set()
        eventually(lambda: let_go)
        assert let_go == [True]  # else a step has waited until the patience of the one that stands had ended

    return enter


class Training:
    """Logs to a spool that is mirrored."""

    #: Those that the test has begun.
    begun: ClassVar[list[Training]] = []

    def __init__(self, *, resume: bool = False, first: int = 0, url: str = URL) -> None:
        remote = open_remote_run(url, resume=resume)
        self.spool, self.step = remote.spool, first
        described = info(host=socket.gethostname(), pid=os.getpid())
        self.log = LogWriter(
            remote.spool, described, resume=resume, follows=remote.follows, rotate_seconds=0.1
        )  # fmt: skip
        self.log.begin(first)
        self.uploader = Uploader(remote.spool, url, poll_seconds=0.1)
        self.begun.append(self)

    def steps(self, number: int) -> None:
        for _ in range(number):
            write_step(self.log, self.step)
            self.step += 1
            time.sleep(0.02)

    def close(self, copy: Path, timeout: float = 90.0) -> list[str]:
        """The spool is kept as `copy`, to be compared with what arrived."""
        self.log.close()
        shutil.copytree(self.spool, copy)
        return self.uploader.close(timeout)

    def arrived(self) -> int:
        """Parts at the store, once everything has been sent that there was at some moment."""
        store = store_of(URL)
        return len(store.list("stats")) if "alive" in store.list() else 0

    def given_up(self) -> None:
        """Its last attempt has ended."""
        self.uploader._thread.join(60)
        assert not self.uploader._thread.is_alive()


def test_a_run_arrives_while_it_is_written_and_the_spool_goes(server: ObjectServer, tmp_path: Path) -> None:
    training = Training()
    training.steps(20)
    eventually(lambda: training.arrived() > 0)
    store = store_of(URL)
    assert not json.loads(store.read("run.json"))["closed"]
    assert abs((store.modified("alive") or 0) - time.time()) < 60
    training.steps(20)
    assert training.close(tmp_path / "copy") == []
    assert training.uploader.problem is None
    assert rows(URL) == rows(tmp_path / "copy")
    assert len(rows(URL)["stats"]) == 40 * 3
    assert json.loads(store_of(URL).read("run.json"))["closed"]
    assert store_of(URL).modified("alive") is None
    assert not training.spool.exists()
    assert store_of(URL).list("wal") == {}
    names = {table: set(store_of(URL).list(table)) for table in TABLES}
    assert names == {table: {p.name for p in (tmp_path / "copy" / table).iterdir()} for table in TABLES}


@pytest.mark.parametrize(
    ("before", "fail", "mend"),
    [
        (None, ObjectServer.stop, ObjectServer.start),
        (ObjectServer.stop, None, ObjectServer.start),
        (None, ObjectServer.kill, "empty"),
        pytest.param(None, ObjectServer.freeze, ObjectServer.thaw, marks=pytest.mark.soak),
    ],
    ids=["stopped", "down at the start", "killed and empty", "frozen"],
)
def test_an_outage_loses_nothing_and_blocks_nobody(
    server: ObjectServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    standing: Standing, before: Any, fail: Any, mend: Any,
) -> None:  # fmt: skip
    if fail is ObjectServer.freeze:
        monkeypatch.setattr("layerwatch.monitor.remote.STALLED_SECONDS", 1.0)
    if before:
        before(server)
    training = Training()
    training.steps(20)
    if fail:
        eventually(lambda: training.arrived() > 0)
        fail(server)
    with standing(training):
        training.steps(20)
    eventually(lambda: training.uploader.problem)
    told = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == (2 if before else 1)
    assert all("bucket" in r.getMessage() for r in told)
    if mend == "empty":
        server.restart()
        server.make_bucket()
    else:
        mend(server)
    training.steps(20)
    eventually(lambda: training.uploader.problem is None)
    assert training.close(tmp_path / "copy") == []
    assert rows(URL) == rows(tmp_path / "copy")
    assert len(rows(URL)["stats"]) == training.step * 3 >= 60 * 3
    assert not training.spool.exists()


def test_a_slow_store_only_delays(server: ObjectServer, tmp_path: Path, standing: Standing) -> None:
    training, over = Training(), threading.Event()

    def stutter() -> None:
        while not over.wait(0.05):
            server.freeze()
            over.wait(0.4)
            server.thaw()

    stuttering = threading.Thread(target=stutter)
    stuttering.start()
    try:
        training.steps(30)
        with standing(training):
            training.steps(30)
    finally:
        over.set()
        stuttering.join()
    assert training.uploader.problem is None
    assert training.close(tmp_path / "copy") == []
    assert rows(URL) == rows(tmp_path / "copy")


def test_data_that_was_lost_in_silence_is_noticed_at_the_end(server: ObjectServer, tmp_path: Path) -> None:
    training = Training()
    training.steps(20)
    eventually(lambda: training.arrived() > 0)
    server.files().delete_dir_contents("bucket/group")
    assert training.close(tmp_path / "copy") == []
    assert rows(URL) == rows(tmp_path / "copy")


def test_what_could_not_be_sent_is_named_and_sent_by_hand(
    server: ObjectServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training()
    training.steps(10)
    server.stop()
    left = training.close(tmp_path / "copy", timeout=1.0)
    assert "run.json" in left
    assert any(name.startswith("stats/") for name in left)
    assert spooled() == [URL]
    training.given_up()
    server.start()
    assert send_spool(URL) == len(left)
    assert rows(URL) == rows(tmp_path / "copy")
    assert spooled() == []
    with pytest.raises(RunError, match="found none: kept there is nothing"):
        send_spool(URL)


def test_a_bucket_that_is_missing_is_told_at_once(server: ObjectServer) -> None:
    with pytest.raises(StoreError, match="no such bucket"):
        open_remote_run("s3://other/exp1")
    assert spooled() == []


def test_a_bucket_that_goes_missing_and_comes_back(server: ObjectServer, tmp_path: Path) -> None:
    training = Training()
    training.steps(10)
    eventually(lambda: training.arrived() > 0)
    server.restart()
    training.steps(10)
    eventually(lambda: "no such bucket" in (training.uploader.problem or ""))
    server.make_bucket()
    assert training.close(tmp_path / "copy") == []
    assert rows(URL) == rows(tmp_path / "copy")


def test_credentials_that_are_taken_away(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ObjectServer(unchecked=0) as strict:
        training = Training()
        training.steps(5)
        monkeypatch.setenv("AWS_ENDPOINT_URL", strict.endpoint)
        server.stop()  # it connects afresh after any error
        eventually(lambda: training.steps(1) or "access" in (training.uploader.problem or ""))
        assert "not-to-be-shown" not in (training.uploader.problem or "")
        server.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        assert training.close(tmp_path / "copy") == []
    assert rows(URL) == rows(tmp_path / "copy")


def test_the_same_name_twice_is_refused(server: ObjectServer, tmp_path: Path) -> None:
    training = Training()
    training.steps(3)
    with pytest.raises(RunExistsError, match=r"exp1 exists already|has not been sent"):
        open_remote_run(URL)
    training.close(tmp_path / "copy")
    with pytest.raises(RunExistsError, match="exists already: pass resume=True"):
        open_remote_run(URL)
    with pytest.raises(RunError, match="expected a run to resume at s3://bucket/new, found none"):
        open_remote_run("s3://bucket/new", resume=True)


def test_another_run_that_took_the_name_during_an_outage_is_left_alone(
    server: ObjectServer, tmp_path: Path
) -> None:
    server.stop()
    late = Training()
    late.steps(5)
    late.uploader.close(0.0)  # else it may be there before the other run
    late.given_up()
    server.start()
    store_of(URL).put("run.json", b'{"created": 1.0}')  # type: ignore[attr-defined]
    late.uploader = Uploader(late.spool, URL, poll_seconds=0.1)
    eventually(lambda: "holds another run already" in (late.uploader.problem or ""))
    assert late.close(tmp_path / "copy", timeout=0.5)
    late.given_up()
    assert store_of(URL).read("run.json") == b'{"created": 1.0}'
    assert store_of(URL).list("stats") == {}
    assert send_spool(URL, to="s3://bucket/elsewhere") > 0
    assert rows("s3://bucket/elsewhere") == rows(tmp_path / "copy")
    assert spooled() == []


def test_a_closed_run_goes_on_without_its_spool(server: ObjectServer, tmp_path: Path) -> None:
    first = Training()
    first.steps(10)
    first.close(tmp_path / "first")
    second = Training(resume=True, first=8)
    assert second.log.session == 1
    second.steps(10)
    assert second.close(tmp_path / "second") == []
    stats = rows(URL)["stats"]
    assert stats.num_rows == (8 + 10) * 3  # steps 8 and 9 of the first session are superseded
    assert sorted(stats["session"].unique().to_pylist()) == [0, 1]
    assert {n.partition("-")[2][:6] for n in store_of(URL).list("events")} == {"000001", "100001"}
    third = Training(resume=True, first=18)
    assert third.log.session == 2
    third.close(tmp_path / "third")
    assert "r0-200001.parquet" in store_of(URL).list("events")


def test_what_another_machine_still_had_to_send_keeps_its_place(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = Training()
    killed.steps(10)
    eventually(lambda: killed.arrived() > 0)
    server.stop()
    killed.steps(10)
    assert killed.close(tmp_path / "killed", timeout=0.1)
    killed.given_up()
    server.start()
    there = os.environ["LAYERWATCH_SPOOL"]
    monkeypatch.setenv("LAYERWATCH_SPOOL", str(tmp_path / "other machine"))
    other = Training(resume=True, first=12)
    other.steps(5)
    assert other.close(tmp_path / "other") == []
    described = store_of(URL).read("run.json")
    monkeypatch.setenv("LAYERWATCH_SPOOL", there)
    assert send_spool(URL) > 0
    assert store_of(URL).read("run.json") == described  # the later session's
    stats = rows(URL)["stats"]
    assert sorted(set(stats["step"].to_pylist())) == list(range(17))
    assert stats.num_rows == 17 * 3


KILLED = """
import sys
sys.path[:0] = sys.argv[1:]
from test_upload import Training
training = Training()
while True:
    training.steps(1)
    print(training.step, flush=True)
"""


def test_a_killed_training_goes_on(server: ObjectServer, tmp_path: Path, checkout: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(checkout), str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    steps = [int(process.stdout.readline()) for _ in range(60)][-1]
    process.send_signal(signal.SIGKILL)
    steps = max([steps, *map(int, process.communicate()[0].split())])
    training = Training(resume=True, first=steps)
    training.steps(5)
    assert training.close(tmp_path / "copy") == []
    assert spooled() == []
    stats = rows(URL)["stats"]
    assert sorted(set(stats["step"].to_pylist())) == list(range(steps + 5))
    assert stats.num_rows == (steps + 5) * 3


def test_a_training_that_goes_on_cannot_be_sent_from_outside(server: ObjectServer, checkout: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(checkout), str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        process.stdout.readline()
        with pytest.raises(RunError, match=f"process {process.pid} still writes"):
            send_spool(URL)
        with pytest.raises(RunError, match=f"process {process.pid} still writes"):
            open_remote_run(URL, resume=True)
    finally:
        process.kill()
        process.communicate()


def test_what_retention_drops_here_is_dropped_there(server: ObjectServer, tmp_path: Path) -> None:
    remote = open_remote_run(URL)
    log = LogWriter(remote.spool, info(), keep="rollup")
    log.begin(0)
    for name in ("r0-000001", "r0-000002", "r0-000003"):
        (remote.spool / "stats" / f"{name}.parquet").write_bytes(name.encode())
    uploader = Uploader(remote.spool, URL, poll_seconds=0.05)
    eventually(lambda: len(store_of(URL).list("stats")) == 3)
    (remote.spool / "stats" / "r0-000001.parquet").unlink()  # the oldest
    (remote.spool / "stats" / "r0-000003.parquet").unlink()  # by accident
    eventually(lambda: list(store_of(URL).list("stats")) == ["r0-000002.parquet", "r0-000003.parquet"])
    uploader.close(0.1)
    log.close(quick=True)


def test_write_ahead_files_that_are_left_are_named_and_not_waited_for(server: ObjectServer) -> None:
    training = Training()
    training.steps(3)
    training.log.close(quick=True)
    began = time.monotonic()
    left = training.uploader.close(60.0)
    assert time.monotonic() - began < 60
    assert sorted(left) == sorted(f"wal/{p.name}" for p in (training.spool / "wal").iterdir()) != []
    assert send_spool(URL) > 0
    assert rows(URL)["stats"].num_rows == 9
    assert spooled() == []
