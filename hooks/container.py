"""What a container, or any control group of Linux, lets this process use at most; and what of it is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MOUNT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
#: Version 1 has no word for "no limit": it tells a number of bytes that no machine has.
UNLIMITED = 1 << 60


class Limits:
    """The tightest limits on the way from this process's control group to the root of what can be seen.

    Attributes:
        cores: the processors that may be used at a time, as a fraction; None: no limit.
        bytes: the memory that may be used; None: no limit.

    Args:
        mount: where control groups are mounted, of version 2 or 1. own: which of them this process is in.
    """

    def __init__(self, mount: Path = MOUNT, own: Path = OWN) -> None:
        self.cores: float | None = None
        self.bytes: int | None = None
        self._cpu = self._memory = mount
        self._v2 = (mount / "cgroup.controllers").exists()
        paths = _paths(own)
        for group in self._groups(mount, paths, "cpu"):
            cores = self._cores(group)
            if cores is not None and (self.cores is None or cores < self.cores):
                self.cores, self._cpu = cores, group
        for group in self._groups(mount, paths, "memory"):
            limit = _number(group / ("memory.max" if self._v2 else "memory.limit_in_bytes"))
            if limit is not None and limit < min(UNLIMITED, self.bytes or UNLIMITED):
                self.bytes, self._memory = limit, group
        if not self._v2 and self.cores is not None:
            self._cpu = mount / "cpuacct" / self._cpu.relative_to(mount / "cpu")

    def _groups(self, mount: Path, paths: dict[str, str], controller: str) -> Iterator[Path]:
        """From the process's own group to the root. Inside a container its path may be the host's, which is
        not mounted there: then the root is the container's."""
        root = mount if self._v2 else mount / controller
        group = root / paths.get("" if self._v2 else controller, "").strip("/")
        yield from (g for g in (group, *group.parents) if g.is_relative_to(root) and g.is_dir())

    def _cores(self, group: Path) -> float | None:
        if self._v2:
            quota, _, period = _text(group / "cpu.max").partition(" ")
        else:
            quota, period = (_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None

    def cpu_seconds(self) -> float:
        """What the limited group has used of its processors so far.

        Raises:
            OSError, ValueError: it is not told.
        """
        if self._v2:
            return _field(self._cpu / "cpu.stat", "usage_usec") / 1e6
        return int((self._cpu / "cpuacct.usage").read_text()) / 1e9

    def memory_used(self) -> int:
        """Bytes that the limited group cannot give back: without the files' pages that it no longer needs.

        Raises:
            OSError, ValueError: it is not told.
        """
        name, spare = (
            ("memory.current", "inactive_file")
            if self._v2
            else ("memory.usage_in_bytes", "total_inactive_file")
        )
        used = int((self._memory / name).read_text())
        return max(0, used - _field(self._memory / "memory.stat", spare))


def _paths(own: Path) -> dict[str, str]:
    """Controller -> path of this process's group; "" of version 2."""
    lines = [line.split(":", 2) for line in _text(own).splitlines()]
    return {name: line[2] for line in lines if len(line) == 3 for name in line[1].split(",")}


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _field(path: Path, name: str) -> int:
    """Of a file with a name and a number in each line."""
    found = dict(line.split(" ", 1) for line in path.read_text().splitlines())
    return int(found.get(name, "nothing"))
