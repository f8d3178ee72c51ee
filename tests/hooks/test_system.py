"""System metrics: what is read, who reads it and when, and that the training does not notice."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from trainings import batch, failures, loss_of, mlp, train, watched_training, weights_of

from layerwatch import Run, Watcher, watch
from layerwatch.hooks import system
from layerwatch.hooks.container import Limits
from layerwatch.hooks.distributed import World
from layerwatch.hooks.machine import Gpus, Machine, visible
from layerwatch.monitor import LogWriter

LEVELS = {"memory", "memory_process", "disk_free"}
RATES = {"cpu", "cpu_process", "disk_read", "disk_write", "network_in", "network_out"}


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "PERIOD", 0.01)


_others: set[threading.Thread] = set()  # of watchers that tests of other files have left open


def sampling() -> list[threading.Thread]:
    found = {thread for thread in threading.enumerate() if thread.name == "layerwatch-system"}
    return list(found - _others)


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(system, "JOIN_SECONDS", 100.0)  # a reading may be slow
    _others.clear()
    _others.update(sampling())
    yield
    assert not sampling()


def trained(path: Path, enough: Callable[[Watcher], bool]) -> Run:
    """Trains until it is enough."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with watch(model, optimizer, run=path, every=50) as watcher:
        while not enough(watcher):
            optimizer.zero_grad()
            loss_of(model(batch(0))).backward()
            optimizer.step()
            time.sleep(0.002)
    assert failures(watcher) == ""
    return Run(path)


def logged(run: Run) -> set[str]:
    return {name.removeprefix("system/") for name in run.scalar_names() if name.startswith("system/")}


def wait_for_a_reading(watcher: Watcher) -> None:
    """Which the next step writes."""
    assert watcher._system is not None
    while not watcher._system.samples:
        time.sleep(0.002)


# In a training ----------------------------------------------------------------------------------------------


def test_a_training_logs_what_the_machine_did(tmp_path: Path, often: None) -> None:
    before = time.time()

    def thrice(_: Watcher) -> bool:
        run = Run(tmp_path / "run")
        names = logged(run)
        return "cpu" in names and all(len(run.scalars(f"system/{name}")) > 2 for name in names)

    run = trained(tmp_path / "run", thrice)
    assert LEVELS <= logged(run) <= LEVELS | RATES
    assert {"cpu", "cpu_process"} <= logged(run)
    for name in logged(run):
        frame = run.scalars(f"system/{name}")
        assert frame["step"].is_monotonic_increasing
        assert frame["step"].between(0, run.last_step).all()
        assert frame["time"].between(before, time.time()).all()
        assert (frame["value"] >= 0).all()
        assert frame["value"].map(math.isfinite).all()
    assert (run.scalars("system/cpu")["value"] <= 100).all()
    assert 0 < run.scalars("system/memory")["value"].max() <= 100
    resident = psutil.Process().memory_info().rss / 1e9
    assert run.scalars("system/memory_process")["value"].iloc[-1] == pytest.approx(resident, rel=0.2)
    free = shutil.disk_usage(tmp_path).free / 1e9
    assert run.scalars("system/disk_free")["value"].iloc[-1] == pytest.approx(free, rel=0.1)
    assert not sampling()


def test_a_process_at_work_is_seen_to_be(tmp_path: Path) -> None:
    def clocks() -> tuple[float, float]:
        return time.process_time(), time.monotonic()

    machine = Machine(tmp_path)
    before = clocks()
    assert set(machine.read()) == LEVELS  # rates take two readings
    began = clocks()
    while time.process_time() < began[0] + 0.3:
        pass
    ended = clocks()
    numbers = machine.read()
    after = clocks()
    least = 100 * (ended[0] - began[0]) / (after[1] - before[1])  # however long a reading has taken
    most = 100 * (after[0] - before[0]) / (ended[1] - began[1])
    assert least <= numbers["cpu_process"] <= most  # of a core
    assert numbers["cpu"] > 0
    time.sleep(0.3)
    assert machine.read()["cpu_process"] < 0.8 * numbers["cpu_process"]


def test_a_training_shorter_than_the_period_reads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(Machine, "read", lambda self: read.append(self._folder) or {})
    model = mlp()
    run = watched_training(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1))
    assert not logged(run)
    assert tmp_path / "run" not in read
    assert not sampling()


def test_it_can_be_switched_off(tmp_path: Path, often: None) -> None:
    model = mlp()
    with watch(model, run=tmp_path / "run", system=False):
        assert not sampling()


def test_the_weights_are_the_same_bit_for_bit(tmp_path: Path, often: None) -> None:
    def weights(name: str, **watching: Any) -> list[torch.Tensor]:
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        with watch(model, optimizer, run=tmp_path / name, every=1, **watching) as watcher:
            read = (lambda _: wait_for_a_reading(watcher)) if watcher._system else None
            train(model, optimizer, 30, after_step=read)
        return [*weights_of(model).values(), torch.get_rng_state()]

    pairs = zip(weights("with"), weights("without", system=False), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert logged(Run(tmp_path / "with"))


def test_the_log_is_written_by_the_thread_that_trains(
    tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = set()
    write = LogWriter.scalars

    def noting(self: LogWriter, step: int, when: float, numbers: dict[str, float]) -> None:
        writers.add((threading.current_thread().name, any(name.startswith("system/") for name in numbers)))
        write(self, step, when, numbers)

    monkeypatch.setattr(LogWriter, "scalars", noting)
    trained(tmp_path / "run", lambda _: any(of_the_system for _, of_the_system in writers))
    assert ("MainThread", True) in writers
    assert {thread for thread, _ in writers} == {"MainThread"}


def test_a_pause_keeps_the_latest_readings_and_writes_them_at_the_next_step(
    tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "KEPT", 3)
    read: list[float] = []

    def count(_: Machine) -> dict[str, float]:
        read.append(float(len(read)))
        return {"memory": read[-1]}

    monkeypatch.setattr(Machine, "read", count)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with watch(model, optimizer, run=tmp_path / "run", every=1) as watcher:
        train(model, optimizer, 1)
        before = len(read)
        while len(read) < before + 8:  # a validation
            time.sleep(0.01)
        watcher._end_sampling()
        train(model, optimizer, 1)
    frame = Run(tmp_path / "run").scalars("system/memory")
    assert frame.loc[frame["step"] == 1, "value"].tolist() == read[-3:]


def test_a_machine_that_hangs_delays_neither_a_step_nor_the_end(
    tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, released = threading.Event(), threading.Event()

    def hang(_: Machine) -> dict[str, float]:
        hangs.set()
        released.wait()
        return {}

    monkeypatch.setattr(Machine, "read", hang)
    monkeypatch.setattr(system, "JOIN_SECONDS", 0.1)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    try:
        run = watched_training(tmp_path / "run", model, optimizer, 5, after_step=lambda _: hangs.wait())
        assert run.info["closed"]  # while it hangs
    finally:
        released.set()
    for thread in sampling():
        thread.join()


def test_what_a_system_does_not_tell_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError("/proc is not mounted")

    monkeypatch.setattr(psutil, "cpu_times", denied)
    monkeypatch.setattr(psutil, "disk_io_counters", lambda **_: None)
    machine = Machine(tmp_path / "gone")
    machine.read()
    time.sleep(0.01)
    found = machine.read()
    assert set(found) == {"memory", "memory_process", "cpu_process", "network_in", "network_out"}


def test_a_counter_that_was_set_back_has_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = iter([10e6, 4e6, 6e6])
    disks = lambda **_: {"sda": SimpleNamespace(read_bytes=next(read), write_bytes=0)}  # noqa: E731
    monkeypatch.setattr(psutil, "disk_io_counters", disks)
    clock = iter(float(second) for second in range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    machine = Machine(tmp_path)
    found = [machine._traffic().get("disk_read") for _ in range(3)]
    assert found[:2] == [None, None]
    assert found[2] is not None
    assert 0 < found[2] <= 2  # megabytes a second


def test_what_goes_through_a_raid_or_a_bridge_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two disks with a partition below a RAID below encryption; a card with a bridge and a bond."""
    for device in ("disks/sda", "disks/sdb", "cards/eth0"):
        (tmp_path / device / "device").mkdir(parents=True)
    monkeypatch.setattr("layerwatch.hooks.machine.BLOCKS", tmp_path / "disks")
    monkeypatch.setattr("layerwatch.hooks.machine.CARDS", tmp_path / "cards")
    second = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(second)))
    read = iter([0, 3e6, 3e6])

    def disks(**_: Any) -> dict[str, Any]:
        half = next(read) / 2
        sizes = {"sda": half, "sda1": half, "sdb": half, "md0": 2 * half, "dm-0": 2 * half, "loop0": 5.0}
        return {name: SimpleNamespace(read_bytes=size, write_bytes=0) for name, size in sizes.items()}

    def cards(**_: Any) -> dict[str, Any]:
        return {
            name: SimpleNamespace(bytes_recv=9e6, bytes_sent=0) for name in ("lo", "eth0", "bond0", "br0")
        }

    monkeypatch.setattr(psutil, "disk_io_counters", disks)
    monkeypatch.setattr(psutil, "net_io_counters", cards)
    machine = Machine(tmp_path)
    machine._traffic()
    then = machine._before["disk_read"][0]
    found = machine._traffic()
    assert found["disk_read"] * (machine._before["disk_read"][0] - then) == 3.0  # megabytes
    assert machine._before["network_in"][1] == 9e6
    monkeypatch.setattr("layerwatch.hooks.machine.CARDS", tmp_path / "none")  # a container
    assert machine._traffic()["network_in"] > 0
    assert machine._before["network_in"][1] == 27e6


def test_a_system_that_hides_itself_is_no_reason_not_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden(*_: Any, **__: Any) -> Any:
        raise PermissionError("not for you")

    model = mlp()
    monkeypatch.setattr(psutil, "Process", hidden)
    assert "memory" in Machine(tmp_path).read()
    monkeypatch.setattr(Limits, "__init__", hidden)
    run = watched_training(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1))
    assert "system metrics are not sampled: PermissionError('not for you')" in run.info["notes"]
    assert run.info["closed"]


def test_where_no_thread_can_be_had_nothing_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "layerwatch-system":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    model = mlp()
    run = watched_training(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1))
    assert run.info["closed"]


def test_without_psutil_there_is_one_note_and_no_error(
    tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "layerwatch.hooks.machine")
    monkeypatch.setitem(sys.modules, "psutil", None)
    model = mlp()
    run = watched_training(
        tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1), 3,
        after_step=lambda _: time.sleep(0.02),
    )  # fmt: skip
    (note,) = [note for note in run.info["notes"] if "psutil" in note]
    assert note.startswith("system metrics are not sampled")
    assert not logged(run)


def test_a_forked_child_neither_reads_nor_writes(tmp_path: Path, often: None) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with watch(model, optimizer, run=tmp_path / "run", every=1) as watcher:
        train(model, optimizer, 2)
        child = os.fork()
        if child == 0:
            try:
                train(model, optimizer, 2)
                watcher.close()
                os._exit(len(sampling()))
            finally:
                os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        wait_for_a_reading(watcher)
        train(model, optimizer, 1)
    run = Run(tmp_path / "run")
    assert run.last_step == 2
    assert logged(run)


def test_the_thread_ends_when_watching_does_because_of_an_error(tmp_path: Path, often: None) -> None:
    model = mlp()
    watcher = watch(model, run=tmp_path / "run")
    assert sampling()
    watcher._fail(RuntimeError("ours"))
    for thread in sampling():
        thread.join()


def test_what_reading_takes_counts_as_monitoring(tmp_path: Path, often: None) -> None:
    taken = []

    def enough(watcher: Watcher) -> bool:
        assert watcher._system is not None
        taken.append(watcher._system.seconds)
        return taken[-1] > 0.02 and watcher._cadence._beside > 0.01

    trained(tmp_path / "run", enough)
    assert taken == sorted(taken)
    assert taken[-1] > 0.02


# Which process ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "environment", "prefix"),
    [
        (0, {}, "system/"),
        (0, {"LOCAL_RANK": "0", "GROUP_RANK": "3"}, "system/"),  # the first process tells under plain names
        (1, {"LOCAL_RANK": "1", "GROUP_RANK": "0"}, None),
        (4, {"LOCAL_RANK": "0", "GROUP_RANK": "1"}, "system/host1/"),
        (5, {"LOCAL_RANK": "1", "GROUP_RANK": "1"}, None),
        (8, {"SLURM_LOCALID": "0", "SLURM_NODEID": "2"}, "system/host2/"),
        (4, {"LOCAL_RANK": "0"}, None),  # nobody says which machine it is
        (4, {"LOCAL_RANK": "0", "GROUP_RANK": "0"}, None),
        (1, {}, None),
    ],
)
def test_one_process_of_each_machine_samples(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    environment: dict[str, str],
    prefix: str | None,
) -> None:
    for name in (*system.LOCAL_RANKS, *system.HOSTS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    sampler, note = system.sampler_of(tmp_path, World(rank, 16))
    assert note is None
    assert (sampler and sampler._prefix) == prefix


# GPUs, through a made NVML ----------------------------------------------------------------------------------


class NVMLError(Exception):
    pass


class Nvml(ModuleType):
    """Four GPUs as pynvml shows them; the third one does not tell its power."""

    NVMLError, NVML_TEMPERATURE_GPU = NVMLError, 0

    def __init__(self, *, driver: bool = True) -> None:
        super().__init__("pynvml")
        self.driver, self.users, self.asked = driver, 0, 0

    def nvmlInit(self) -> None:
        self.asked += 1
        if not self.driver:
            raise NVMLError("driver not loaded")
        self.users += 1

    def nvmlShutdown(self) -> None:
        self.users -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 4

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str | bytes:
        uuid = f"GPU-{handle}{handle}{handle}a-b"
        return uuid.encode() if handle % 2 else uuid  # older and newer versions

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=10 * handle, memory=0)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=handle << 30, total=8 << 30)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if handle == 2:
            raise NVMLError("not supported")
        return 100_000 + handle

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        assert sensor == self.NVML_TEMPERATURE_GPU
        return 40 + handle


def test_gpus_are_read_as_torch_numbers_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-222")
    nvml = Nvml()
    gpus = Gpus(nvml)
    expected = {
        "gpu0/utilisation": 30.0, "gpu0/memory": 37.5, "gpu0/power": 100.003, "gpu0/temperature": 43.0,
        "gpu1/utilisation": 20.0, "gpu1/memory": 25.0, "gpu1/temperature": 42.0,
    }  # fmt: skip
    assert gpus.read() == gpus.read() == expected
    assert (nvml.asked, nvml.users) == (1, 1)
    gpus.close()
    assert nvml.users == 0


def test_a_machine_without_a_driver_is_asked_once(tmp_path: Path) -> None:
    nvml = Nvml(driver=False)
    machine = Machine(tmp_path, nvml)
    for _ in range(3):
        assert set(machine.read()) >= LEVELS
    machine.close()
    assert (nvml.asked, nvml.users) == (1, 0)


@pytest.mark.parametrize(
    ("chosen", "places"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2, 0", [2, 0]),
        ("1,7,0", [1]),  # what follows a number of no GPU is not seen
        ("GPU-b", [1]),
        ("GPU-", []),  # of several
        ("0,0", [0]),
        ("MIG-1234", []),
        ("0,NoDevFiles", [0]),
    ],
)
def test_the_visible_gpus_are_those_of_cuda(chosen: str | None, places: list[int]) -> None:
    assert visible(chosen, ["GPU-aa", "GPU-bb", "GPU-cc"]) == places


def test_a_training_on_a_machine_with_gpus_logs_them(
    tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    run = trained(tmp_path / "run", lambda _: "gpu3/temperature" in logged(Run(tmp_path / "run")))
    assert run.scalars("system/gpu3/utilisation")["value"].unique().tolist() == [30.0]
    assert {"gpu0/power", "gpu1/memory", "gpu2/temperature"} <= logged(run)
    assert nvml.users == 0


def test_without_nvml_a_note_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    sampler, note = system.sampler_of(tmp_path, World(0, 1))
    assert sampler is not None
    assert note is not None
    assert "pip install nvidia-ml-py" in note


# Containers -------------------------------------------------------------------------------------------------


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


V2 = {
    "cgroup.controllers": "cpu memory",
    "pod/cpu.max": "150000 100000",
    "pod/cpu.stat": "usage_usec 7000000\nuser_usec 1",
    "pod/memory.max": "4000000000",
    "pod/memory.current": "3000000000",
    "pod/memory.stat": "anon 5\ninactive_file 1000000000",
    "pod/box/cpu.max": "max 100000",
    "pod/box/memory.max": "max",
    "pod/box/memory.current": "77",
}
V1 = {
    "cpu/docker/cpu.cfs_quota_us": "50000",
    "cpu/docker/cpu.cfs_period_us": "100000",
    "cpuacct/docker/cpuacct.usage": "2500000000",
    "cpu/cpu.cfs_quota_us": "-1",
    "cpu/cpu.cfs_period_us": "100000",
    "memory/memory.limit_in_bytes": "1000",
    "memory/memory.usage_in_bytes": "700",
    "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 200",
}


def test_the_tightest_limit_above_the_process_counts(tmp_path: Path) -> None:
    mount = tree(tmp_path / "cgroup", V2)
    own = tree(tmp_path, {"own": "0::/pod/box"}) / "own"
    limits = Limits(mount, own)
    assert (limits.cores, limits.bytes) == (1.5, 4_000_000_000)
    assert limits.cpu_seconds() == 7.0
    assert limits.memory_used() == 2_000_000_000


def test_version_1_and_a_path_that_is_not_mounted_here(tmp_path: Path) -> None:
    mount = tree(tmp_path / "cgroup", V1)
    own = tree(tmp_path, {"own": "3:cpu,cpuacct:/docker\n4:memory:/docker/9f86d0\n9:name=systemd:/"}) / "own"
    limits = Limits(mount, own)
    assert (limits.cores, limits.bytes) == (0.5, 1000)
    assert limits.cpu_seconds() == 2.5
    assert limits.memory_used() == 500


@pytest.mark.parametrize("files", [{}, {"memory/memory.limit_in_bytes": str(2**63 - 4096)}])
def test_without_limits_there_are_none(tmp_path: Path, files: dict[str, str]) -> None:
    limits = Limits(tree(tmp_path / "cgroup", files), tmp_path / "nothing")
    assert (limits.cores, limits.bytes) == (None, None)


def test_shares_are_of_what_the_container_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = tree(tmp_path / "cgroup", V2)
    own = tree(tmp_path, {"own": "0::/pod/box"}) / "own"
    monkeypatch.setattr("layerwatch.hooks.machine.Limits", lambda: Limits(mount, own))
    clock = iter(float(second) for second in range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    machine = Machine(tmp_path)
    machine._cpu()
    (mount / "pod" / "cpu.stat").write_text("usage_usec 8500000\n")  # 1.5 s of processors in 1 s
    assert machine._cpu()["cpu"] == pytest.approx(100.0)
    assert machine._memory()["memory"] == 50.0


def test_run_json_is_the_same_with_and_without(tmp_path: Path) -> None:
    def told(name: str, **watching: Any) -> dict[str, Any]:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        watched_training(tmp_path / name, model, optimizer, 2, watching=watching)
        info = json.loads((tmp_path / name / "run.json").read_text())
        different = ("id", "created", "ended", "name", "checksum", "starts", "cadence")
        return {key: value for key, value in info.items() if key not in different}

    assert told("a") == told("b", system=False)
