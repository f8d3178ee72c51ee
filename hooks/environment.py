"""What is worth knowing about the process that trains: for run.json."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def describe_environment() -> dict[str, Any]:
    """Host, process, versions, git commit, torch seed."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": sys.argv,
        "versions": {
            "layerwatch": _version("layerwatch"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "git_commit": _git_commit(),
        "seed": torch.initial_seed(),
    }


def describe_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """Class and groups (every plain option, number of parameters) of each optimizer."""
    return [
        {
            "class": type(o).__name__,
            "groups": [
                {**{k: v for k, v in g.items() if isinstance(v, int | float | str | bool | None | tuple)},
                 "parameters": len(g["params"])}
                for g in o.param_groups
            ],
        }
        for o in optimizers
    ]  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
