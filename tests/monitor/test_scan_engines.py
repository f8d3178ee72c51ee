"""The same rows whoever reads them; workers that die, schedulers that are not there."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pyarrow import fs

from layerwatch.monitor import RunError
from layerwatch.monitor.fleet import engines, scan
from tests.monitor.made_fleets import make_fleet, make_sick
from tests.monitor.made_logs import make_run
from tests.object_server import ObjectServer

pytestmark = pytest.mark.timeout(600)  # many processes begin here, which a busy machine does slowly

#: Differ from scan to scan: findings hold when they were noticed, `heard` is by the scan's clock.
OWN = ("scanned", "seconds", "findings", "heard")


def facts(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(repr(sorted((k, v) for k, v in row.items() if k not in OWN)) for row in rows)


def local_cluster(workers: int) -> Any:
    from distributed import LocalCluster

    made: Any = LocalCluster  # its annotations are those of asynchronous use
    return made(n_workers=workers, threads_per_worker=1, dashboard_address=None, host="127.0.0.1")


def double(item: Any) -> Any:
    """Work of a kind: it fails, dies, or dies where it is asked to once."""
    if item == "fails":
        raise ZeroDivisionError("no")
    if item == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if isinstance(item, Path) and not item.exists():
        item.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * item if isinstance(item, int) else "done"


def slowly(item: Any) -> Any:
    time.sleep(0.1)
    return double(item)


def until(done: Callable[[], object]) -> None:
    limit = time.monotonic() + 120
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.01)


@contextlib.contextmanager
def cluster_of_processes(folder: Path, checkout: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a scheduler, which has one worker, and its process."""
    about = folder / "scheduler.json"
    modules = os.pathsep.join([str(checkout), str(Path(__file__).parent)])
    once = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}  # one worker that dies is enough
    environment = {**os.environ, **once, "PYTHONPATH": modules}

    def begin(kind: str, *options: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--no-dashboard",
             "--scheduler-file", str(about), *options],
            env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    with contextlib.ExitStack() as stack:
        scheduler = stack.enter_context(begin("scheduler", "--host", "127.0.0.1", "--port", "0"))
        stack.callback(scheduler.kill)
        until(lambda: about.exists() and about.read_text().endswith("}"))
        worker = begin("worker", "--nthreads", "1", "--no-nanny", "--local-directory", str(folder))
        stack.callback(stack.enter_context(worker).kill)
        yield json.loads(about.read_text())["address"], scheduler


@pytest.fixture
def fleet_on_s3(tmp_path: Path, object_server: ObjectServer) -> str:
    make_fleet(tmp_path / "runs")
    url = object_server.make_bucket()
    fs.copy_files(str(tmp_path / "runs"), "bucket/runs", destination_filesystem=object_server.files())
    return f"{url}/runs"


@pytest.fixture
def orphans() -> Iterator[None]:
    """No process is left."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [c for c in psutil.Process().children(recursive=True) if c.pid not in before and _works(c)]
    gone, left = psutil.wait_procs(left, timeout=60)
    assert not left, (gone, left)


def _works(process: psutil.Process) -> bool:
    try:
        return "resource_tracker" not in " ".join(process.cmdline())
    except psutil.Error:
        return False


def children(process: psutil.Process, word: str) -> list[psutil.Process]:
    """Those with this word on their command line."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if word in " ".join(child.cmdline()):
                found.append(child)
    return found


def hears_ctrl_c(process: psutil.Process) -> bool:
    """Python runs in it, and would tell where it was: what comes earlier ends a process without a word."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGINT - 1) & 1)
    return False


def test_processes_outlive_one_that_dies(tmp_path: Path, orphans: None) -> None:
    items = [*range(12), "fails", tmp_path / "once", *range(12, 20), "dies", *range(20, 25)]
    found = list(engines.processes(double, items, workers=2))
    assert len(found) == len(items)
    got = {str(item): result for item, result in found}
    assert all(got[str(i)] == 2 * i for i in range(25))
    assert got["fails"] == "ZeroDivisionError: no"
    assert got[str(tmp_path / "once")] == "done"
    assert "ended, by too little memory" in got["dies"]


def test_dask_outlives_workers_that_die(tmp_path: Path, orphans: None) -> None:
    import distributed  # noqa: F401  # which brings the setting
    from dask import config

    items = [*range(12), "fails", tmp_path / "once", "dies", *range(12, 20)]
    with config.set({"distributed.scheduler.allowed-failures": 1}):  # each more is a process to start
        found = list(engines.dask(double, items, workers=2))
    got = {str(item): result for item, result in found}
    assert len(got) == len(items)
    assert all(got[str(i)] == 2 * i for i in range(20))
    assert got["fails"] == "ZeroDivisionError: no"
    assert got[str(tmp_path / "once")] == "done"
    assert "ended, by too little memory" in got["dies"]


def test_a_worker_that_is_long_in_starting_again_is_used(tmp_path: Path, orphans: None) -> None:
    import distributed  # noqa: F401  # which brings the setting
    from dask import config

    items = [0, tmp_path / "once", 1]
    with config.set({"distributed.deploy.lost-worker-timeout": "1ms"}):  # any start is long
        found = list(engines.dask(double, items, workers=1))
    assert {str(item): result for item, result in found} == {"0": 0, str(tmp_path / "once"): "done", "1": 2}


def test_every_engine_makes_the_same_rows(fleet_on_s3: str, orphans: None) -> None:
    one = scan(fleet_on_s3)
    assert {row["run"]: row["health"] for row in one.rows} == {
        "good": "healthy", "group/other": "healthy", "sick": "critical", "torn": "unreadable"
    }  # fmt: skip
    two, three = scan(fleet_on_s3, engine="processes", workers=2), scan(fleet_on_s3, engine="dask", workers=2)
    assert facts(one.rows) == facts(two.rows) == facts(three.rows)


def test_a_cluster_that_runs_already_is_used(fleet_on_s3: str, orphans: None) -> None:
    told: list[tuple[int, int]] = []
    with local_cluster(2) as cluster:
        table = scan(
            fleet_on_s3, engine="dask", scheduler=cluster.scheduler_address,
            progress=lambda done, total: told.append((done, total)),
        )  # fmt: skip
        assert cluster.scheduler.workers  # it goes on when the scan is over
    assert len(table.rows) == 4
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_worker_killed_in_the_middle_costs_nothing(
    tmp_path: Path, object_server: ObjectServer, orphans: None
) -> None:
    for number in range(16):
        make_run(tmp_path / "runs" / f"r{number:02}", 3)
    make_sick(tmp_path / "runs" / "sick")
    object_server.make_bucket()
    fs.copy_files(str(tmp_path / "runs"), "bucket/runs", destination_filesystem=object_server.files())
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        if done == 2:
            workers = children(psutil.Process(), "--multiprocessing-fork")
            killed.append(workers[0].pid)
            workers[0].kill()

    table = scan("s3://bucket/runs", engine="dask", workers=2, progress=kill)
    assert killed
    assert len(table.rows) == 17
    assert [row["run"] for row in table.rows if row["error"] or row["health"] != "healthy"] == ["sick"]


def test_what_a_scheduler_has_dropped_is_told_without_its_own_words(orphans: None) -> None:
    from distributed import Client

    with local_cluster(1) as cluster, Client(cluster, set_as_default=False) as client:
        future: Any = client.submit(slowly, 1, pure=False)
        future.cancel()
        assert engines._answer(future).startswith("the Dask scheduler went away before it was read")


def test_a_scheduler_that_is_lost_in_the_middle_costs_no_run_its_row(
    tmp_path: Path, checkout: Path, orphans: None
) -> None:
    root, names = tmp_path / "runs", [f"r{number:02}" for number in range(12)]
    for name in names:
        make_run(root / name, 3)
    told: list[tuple[int, int]] = []
    with cluster_of_processes(tmp_path, checkout) as (address, scheduler):

        def lose(done: int, total: int) -> None:
            told.append((done, total))
            if done == 2:
                scheduler.kill()
                scheduler.wait()

        table = scan(root, engine="dask", scheduler=address, progress=lose)
    assert told == [(done, 12) for done in range(1, 13)]
    assert sorted(row["run"] for row in table.rows) == names
    assert [row["steps"] for row in table.rows if not row["error"]] == [3, 3]
    lost = [row["error"] for row in table.rows if row["error"]]
    assert lost == ["the Dask scheduler went away before it was read: the next scan reads it"] * 10
    again = scan(root, before=table)
    assert sorted((row["run"], row["steps"], row["error"]) for row in again.rows) == [
        (name, 3, None) for name in names
    ]


def test_a_scheduler_that_is_lost_before_the_last_are_tried_alone(
    tmp_path: Path, checkout: Path, orphans: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = engines._killed
    with cluster_of_processes(tmp_path, checkout) as (address, scheduler):

        def lose(future: Any) -> bool:
            if not killed(future):
                return False
            scheduler.kill()
            scheduler.wait()
            until(lambda: future.client.status == "closed")  # it has tried to reach it again
            return True

        monkeypatch.setattr(engines, "_killed", lose)
        found = list(engines.dask(double, ["dies"], scheduler=address))
    assert scheduler.returncode == -signal.SIGKILL
    assert found == [("dies", "the Dask scheduler went away before it was read: the next scan reads it")]


def test_a_result_that_cannot_be_fetched_any_more_is_told_without_dasks_own_words() -> None:
    class Done:
        """It was done when the connection broke."""

        status = "finished"

        def result(self) -> Any:
            raise OSError("in <TCP (closed) ConnectionPool.gather>: Stream is closed")

        def cancelled(self) -> bool:
            return False

    assert engines._answer(Done()).startswith("the Dask scheduler went away before it was read")


@pytest.mark.parametrize("engine", ["processes", "dask"])
def test_ctrl_c_ends_all_processes_without_a_word(tmp_path: Path, checkout: Path, engine: str) -> None:
    make_fleet(tmp_path / "runs")
    process = subprocess.Popen(
        [sys.executable, "-m", "layerwatch", "scan", "runs", "--engine", engine, "--workers", "2"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(checkout)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    family = psutil.Process(process.pid)
    try:
        workers: set[psutil.Process] = set()
        while len(workers) < 2:  # they have begun, and import what they need
            assert process.poll() is None
            time.sleep(0.01)
            workers |= {child for child in children(family, "spawn_main") if hears_ctrl_c(child)}
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, *said) == (130, "", "")
    assert not psutil.wait_procs(workers, timeout=60)[1]
    assert not list((tmp_path / "runs").glob("*.parquet"))


def test_two_clusters_on_one_machine_do_not_meet(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # it is taken already
            stack.enter_context(socket.create_server(("127.0.0.1", 8787)))  # Dask's own choice
        assert [row["run"] for row in scan(tmp_path, engine="dask", workers=1).rows] == ["a"]


def test_a_scheduler_that_is_not_there_is_named_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "a")
    monkeypatch.setattr(engines, "CONNECT_SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(RunError, match=r"tcp://127\.0\.0\.1:1 does not answer"):
        scan(tmp_path, engine="dask", scheduler="tcp://127.0.0.1:1")
    assert time.monotonic() - began < 30  # Dask's own patience
    before = set(threading.enumerate())
    with pytest.raises(RunError, match="does not answer"):
        scan(tmp_path, engine="dask", scheduler="nonsense")
    assert set(threading.enumerate()) <= before  # no half-made client is left behind


def test_a_cluster_without_workers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "a")
    monkeypatch.setattr(engines, "WORKER_SECONDS", 0.5)
    cluster = local_cluster(0)
    with cluster, pytest.raises(RunError, match="start workers"):
        scan(tmp_path, engine="dask", scheduler=cluster.scheduler_address)


def test_workers_without_layerwatch_are_named(tmp_path: Path, orphans: None) -> None:
    make_run(tmp_path / "a")
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "layerwatch.py").write_text("raise ImportError('not installed')")
    cluster = local_cluster(0)
    with cluster:
        worker = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli.dask_worker", cluster.scheduler_address, "--no-dashboard",
             "--nthreads", "1", "--no-nanny", "--local-directory", str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(tmp_path / "shadow")}, cwd=tmp_path,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            until(lambda: cluster.scheduler.workers)
            with pytest.raises(RunError, match="install layerwatch"):
                scan(tmp_path, engine="dask", scheduler=cluster.scheduler_address)
        finally:
            worker.terminate()
            worker.wait()


@pytest.mark.parametrize("engine", ["processes", "dask"])
def test_a_script_without_a_guard_is_told_what_to_do(tmp_path: Path, checkout: Path, engine: str) -> None:
    make_run(tmp_path / "runs" / "a")
    script = tmp_path / "script.py"
    script.write_text(f"import layerwatch\nlayerwatch.scan('runs', engine={engine!r}, workers=1)\n")
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "if __name__ == '__main__'" in done.stderr.splitlines()[-1]


def test_a_guarded_script_scans(tmp_path: Path, checkout: Path) -> None:
    make_fleet(tmp_path / "runs")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import layerwatch
            if __name__ == "__main__":
                table = layerwatch.scan("runs", engine="processes", workers=2)
                print(sorted(row["run"] for row in table.rows))
        """)
    )
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(checkout)}, check=True,
    )  # fmt: skip
    assert done.stdout.split("\n")[0] == "['good', 'group/other', 'sick', 'torn']"
    assert (tmp_path / "runs" / "layerwatch-scan.parquet").exists()


def test_without_dask_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(RunError, match=r"layerwatch\[cluster\]"):
        scan(tmp_path, engine="dask")
