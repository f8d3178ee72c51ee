"""System metrics beside the scalars: a thread reads the machine, the training writes what it has read."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..monitor.schema import SYSTEM
from .distributed import World

if TYPE_CHECKING:
    from .machine import Machine, Numbers

#: How often the machine is read. The first time after as long: a training that is shorter than that has
#: nothing of it in its log, and nothing is read while it starts.
PERIOD = 10.0
#: Readings that wait for the end of a step; of a longer pause the oldest are dropped.
KEPT = 64
#: What may be waited for at the end: the thread sleeps, or reads a few files.
JOIN_SECONDS = 1.0
#: Under which launchers tell the number of a process on its machine, and of the machine.
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
HOSTS = ("GROUP_RANK", "NODE_RANK", "SLURM_NODEID")


class Sampler:
    """Reads the machine every ten seconds, in a thread of its own, from `start` to `close`.

    The thread touches nothing of the training and writes nothing: `LogWriter` is the training thread's. What
    it has read waits in `samples` until a step ends. Nothing here raises: what cannot be read is left out. A
    forked child has no such thread.

    Args:
        machine: that is read. prefix: of the scalars' names.
    """

    def __init__(self, machine: Machine, prefix: str = SYSTEM) -> None:
        #: When it was read (unix seconds), and what: what `take` has not taken yet.
        self.samples: deque[tuple[float, Numbers]] = deque(maxlen=KEPT)
        #: What reading has taken so far: CPU seconds of another thread.
        self.seconds = 0.0
        self._machine, self._prefix = machine, prefix
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="layerwatch-system", daemon=True)

    def start(self) -> None:
        """Begin."""
        with contextlib.suppress(RuntimeError):  # no more threads may be had
            self._thread.start()

    def take(self) -> Iterator[tuple[float, Numbers]]:
        """Everything that was read since, oldest first."""
        while self.samples:
            yield self.samples.popleft()

    def close(self, *, wait: bool = True) -> None:
        """End; may be called twice, and in a forked child."""
        self._ending.set()
        if wait and self._thread.is_alive():
            self._thread.join(JOIN_SECONDS)

    def _work(self) -> None:
        try:
            while not self._ending.wait(PERIOD):
                numbers = self._machine.read()
                if numbers:
                    self.samples.append((time.time(), {self._prefix + k: v for k, v in numbers.items()}))
                self.seconds = time.thread_time()
        finally:
            self._machine.close()


def sampler_of(folder: Path, here: World) -> tuple[Sampler | None, str | None]:
    """The sampler of a run's process, and what is to be noted about it.

    One process of each machine samples: the first one there, as far as the launcher tells. On other machines
    than the first rank's, names have the machine's number in front, as in `system/host1/cpu`.
    """
    host = _host(here)
    if host is None:
        return None, None
    nvml = note = None
    if torch.version.cuda is not None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            note = "GPUs are not sampled: that needs NVML (pip install nvidia-ml-py)"
    try:
        from .machine import Machine

        machine = Machine(folder, nvml)
    except ImportError as error:
        return None, f"system metrics are not sampled: they need psutil (pip install psutil): {error}"
    except Exception as error:  # a system that hides itself from its processes is no reason not to train
        return None, f"system metrics are not sampled: {error!r}"
    return Sampler(machine, SYSTEM + (f"host{host}/" if host else "")), note


def _host(here: World) -> int | None:
    """The number of the machine that this process samples; None: another process does."""
    if here.rank == 0:
        return 0
    local, host = (
        next((int(v) for n in names if (v := os.environ.get(n, "")).isdigit()), None)
        for names in (LOCAL_RANKS, HOSTS)
    )
    return host if local == 0 and host else None
