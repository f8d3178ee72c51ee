"""Which process it is: its number alone is given again to others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # not on this system
    resource = None  # type: ignore[assignment]


def started(pid: int | None = None) -> str | None:
    """Tells a process from others that have its number at another time; None where the system does not say.

    Args:
        pid: of this process when None.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid or os.getpid()}/stat").read_text()
    except OSError:
        return None
    return f"{boot}:{stat.rpartition(')')[2].split()[19]}"  # the 22nd field: clock ticks since the boot


def alive(pid: Any, since: str | None = None) -> bool:
    """Does this process run on this machine?

    Args:
        pid: its number. since: what `started` said of it, if known.
    """
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    return since is None or started(int(pid)) in (since, None)


def waits() -> int:
    """How often this thread has waited so far for anything but a processor; 0 where that is not counted."""
    thread = getattr(resource, "RUSAGE_THREAD", None)
    return 0 if resource is None or thread is None else resource.getrusage(thread).ru_nvcsw
