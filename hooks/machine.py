"""What the machine does while a training runs on it: processors, memory, disks, network, NVIDIA GPUs."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from .container import Limits

Numbers = dict[str, float]
#: Where Linux tells of disks and of network cards.
BLOCKS, CARDS = Path("/sys/block"), Path("/sys/class/net")
#: What one second brought of a counter: the counter's name, its value -> the rate, None for the first time.
Rate = Callable[[str, float], float | None]


class Machine:
    """Reads all that can be had at the moment; what this system does not tell is left out, never an error.

    Not for several threads. Units: `docs/capture.md`.

    Args:
        folder: on whose disk room is wanted. nvml: the module `pynvml`, or None.
    """

    def __init__(self, folder: Path, nvml: ModuleType | None = None) -> None:
        self._folder, self._limits = folder, Limits()
        self._gpus = Gpus(nvml) if nvml is not None else None
        self._before: dict[str, tuple[float, float]] = {}  # of a counter: when it was read, and its value

    def read(self) -> Numbers:
        """Name, without the `system/` in front of it -> number."""
        found: Numbers = {}
        for read in (
            self._own_cpu, self._own_memory, self._cpu, self._memory, self._disk, self._traffic, self._gpu,
        ):  # fmt: skip
            with contextlib.suppress(Exception):  # a system that does not tell it, a folder that has gone
                found.update(read())
        return found

    def close(self) -> None:
        """Done."""
        if self._gpus is not None:
            self._gpus.close()

    def _rate(self, counter: str, value: float) -> float | None:
        """What a second has added to a counter since it was read last; None the first time, or when it was
        set back."""
        now = time.monotonic()
        then, before = self._before.get(counter, (now, value))
        self._before[counter] = now, value
        return (value - before) / (now - then) if now > then and value >= before else None

    def _rates(self, counters: Numbers, unit: float) -> Numbers:
        rates = {name: self._rate(name, value) for name, value in counters.items()}
        return {name: rate / unit for name, rate in rates.items() if rate is not None}

    def _own_cpu(self) -> Numbers:
        return self._rates({"cpu_process": time.process_time()}, 0.01)

    def _own_memory(self) -> Numbers:
        return {"memory_process": self._process.memory_info().rss / 1e9}

    @functools.cached_property
    def _process(self) -> psutil.Process:
        return psutil.Process()

    def _cpu(self) -> Numbers:
        if self._limits.cores is not None:
            return self._rates({"cpu": self._limits.cpu_seconds()}, 0.01 * self._limits.cores)
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        every = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        idling, passing = self._rate("idle", idle), self._rate("all", every)
        if idling is None or not passing:
            return {}
        return {"cpu": 100 * min(max(0.0, 1 - idling / passing), 1.0)}

    def _memory(self) -> Numbers:
        machine, limit = psutil.virtual_memory(), self._limits.bytes
        if limit is not None and limit < machine.total:
            return {"memory": 100 * self._limits.memory_used() / limit}
        return {"memory": float(machine.percent)}

    def _disk(self) -> Numbers:
        return {"disk_free": psutil.disk_usage(os.fspath(self._folder)).free / 1e9}

    def _traffic(self) -> Numbers:
        disks = devices(psutil.disk_io_counters(perdisk=True) or {}, BLOCKS)
        cards = devices(psutil.net_io_counters(pernic=True), CARDS)
        counters: Numbers = {}
        if disks:
            counters["disk_read"] = sum(disk.read_bytes for disk in disks)
            counters["disk_write"] = sum(disk.write_bytes for disk in disks)
        if cards:
            counters["network_in"] = sum(card.bytes_recv for card in cards)
            counters["network_out"] = sum(card.bytes_sent for card in cards)
        return self._rates(counters, 1e6)

    def _gpu(self) -> Numbers:
        return self._gpus.read() if self._gpus is not None else {}


def devices(counters: Mapping[str, Any], folder: Path) -> list[Any]:
    """Of the counters by name those of devices: partitions, encrypted disks, RAIDs, bridges and bonds count
    again what goes through the devices below them. All but loopback where none is known to be one, as in
    containers.

    Args:
        folder: where Linux tells what a name stands for.
    """
    real = [counter for name, counter in counters.items() if os.path.exists(f"{folder}/{name}/device")]
    return real or [counter for name, counter in counters.items() if name != "lo"]


class Gpus:
    """The GPUs that this process may use, through NVML, numbered as torch numbers them.

    Args:
        nvml: the module `pynvml`. It is initialised at the first reading, which may take a moment.
    """

    def __init__(self, nvml: ModuleType) -> None:
        self._nvml: Any = nvml
        self._handles: list[Any] | None = None

    def read(self) -> Numbers:
        """`gpu<number>/` and what of it is told: utilisation and memory in percent, power in watts,
        temperature in degrees Celsius."""
        if self._handles is None:
            self._handles = []  # without a driver it is not tried again
            self._nvml.nvmlInit()
            self._handles = self._visible()
        found = {}
        for number, handle in enumerate(self._handles):
            for name, read in (
                ("utilisation", self._utilisation),
                ("memory", self._memory),
                ("power", self._power),
                ("temperature", self._temperature),
            ):
                with contextlib.suppress(self._nvml.NVMLError):  # this card does not tell it
                    found[f"gpu{number}/{name}"] = float(read(handle))
        return found

    def close(self) -> None:
        """NVML counts who uses it."""
        if self._handles:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def _visible(self) -> list[Any]:
        nvml = self._nvml
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        names = [_word(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        return [handles[place] for place in visible(os.environ.get("CUDA_VISIBLE_DEVICES"), names)]

    def _utilisation(self, handle: Any) -> float:
        return self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu

    def _memory(self, handle: Any) -> float:
        memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
        return 100 * memory.used / memory.total

    def _power(self, handle: Any) -> float:
        return self._nvml.nvmlDeviceGetPowerUsage(handle) / 1e3

    def _temperature(self, handle: Any) -> float:
        return self._nvml.nvmlDeviceGetTemperature(handle, self._nvml.NVML_TEMPERATURE_GPU)


def visible(chosen: str | None, uuids: Sequence[str]) -> list[int]:
    """The places of the GPUs that CUDA_VISIBLE_DEVICES lets a process see, in its order.

    As CUDA reads it: numbers, or beginnings of UUIDs, up to the first that names none; None means all. The
    parts of a divided GPU (`MIG-...`) are not told apart by NVML's figures, and end the list.
    """
    if chosen is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for entry in (part.strip() for part in chosen.split(",")):
        if entry.isdigit():
            places = [int(entry)] if int(entry) < len(uuids) else []
        else:
            places = [i for i, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
        if len(places) != 1 or places[0] in found:
            break
        found += places
    return found


def _word(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else text
