"""Serving below a path, behind a proxy that takes the path away, or does not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
#: The first parts of our own addresses: with them it could not be told whether the path was taken away.
_OURS = ("run", "api", "assets", "static", "healthz")


def prefix_of(text: str) -> str:
    """ "/x" of "x", "/x" or "/x/"; "" of "" and "/".

    Raises:
        ValueError: this cannot be a path, or is one of our own.
    """
    parts = [part for part in text.split("/") if part]
    if any(not re.fullmatch(r"[A-Za-z0-9._~@%+-]+", part) or part in (".", "..") for part in parts):
        raise ValueError(f"expected a path such as /x/, got {text!r}")
    if parts and (parts[0] in _OURS or parts[0].startswith("_")):
        raise ValueError(f"expected a path that is none of the dashboard's own, got {text!r}: choose another")
    return "".join(f"/{part}" for part in parts)


def below(application: Wsgi, prefix: str) -> Wsgi:
    """The application served below `prefix`."""

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == prefix or path.startswith(f"{prefix}/"):
            path = path[len(prefix) :]
        return application({**environ, "SCRIPT_NAME": prefix, "PATH_INFO": path or "/"}, start)

    return answer
