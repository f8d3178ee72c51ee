"""The dashboard on a socket, by waitress: one process, so that what was read is read once for all tabs."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import secrets
import socket
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ..monitor import RunError
from .app import create_app
from .pages.runs import table_of
from .prefix import prefix_of
from .security import MOST_BYTES, Access, loopback

if TYPE_CHECKING:
    from dash import Dash

    from .queries import Library

THREADS = 8
_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # of malloc.h
ANY = ("", "0.0.0.0", "::")


def serve(
    root: str | Path,
    host: str = "127.0.0.1",
    port: int = 8050,
    *,
    token: str = "",
    prefix: str = "",
    names: Sequence[str] = (),
    open_browser: bool = False,
    secret: bool = False,
) -> None:
    """Serve the dashboard until interrupted; prints its address once it listens.

    Args:
        root: a folder of runs, or one run, or the file of a scan table; or a URL of one of these.
        token: what a browser must show once; a host that others can reach has one made when there is none.
        prefix: the path that a proxy serves it at, such as "/x/".
        names: more host names to answer for, as the proxy passes them on.
        open_browser: show it in the default browser.
        secret: the token is not printed: what is printed may be kept in a log.

    Raises:
        OSError: the port is taken. ValueError: the token is too short, or the prefix no path.
    """
    if not token and not loopback(host):
        token = secrets.token_urlsafe(24)
    access = Access(host, token, tuple(names))
    prefix = prefix_of(prefix)
    _give_back()
    listener = listen(host, port)
    try:
        app = create_app(root, access=access, prefix=prefix)
        threading.Thread(target=_read_ahead, args=(app.server.extensions["layerwatch"],), daemon=True).start()
        server = over(listener, app)
        address = address_of(host, listener, prefix, token)
        shown = address.partition("?")[0] if secret else address
        print(f"layerwatch dashboard: {shown} (stop with Ctrl+C)", flush=True)  # noqa: T201
        if open_browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        server.run()
    finally:
        listener.close()


def _read_ahead(library: Library) -> None:
    """A scan table of thousands of runs takes a moment to be read: now rather than when somebody waits."""
    with contextlib.suppress(RunError, OSError):
        if library.table.look() or library.table.alone:
            table_of(library).all(library)
            table_of(library).settings()


def over(listener: socket.socket, app: Dash) -> Any:
    """Waitress's server over a listening socket; `run()` serves."""
    from waitress.server import create_server

    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a burst of plots is ordinary
    return create_server(
        app.server,
        sockets=[listener],
        threads=THREADS,
        ident="layerwatch",
        max_request_body_size=MOST_BYTES,
    )


def _give_back() -> None:
    """What a read took returns to the system at once: else each thread keeps tens of megabytes."""
    pa.set_memory_pool(pa.system_memory_pool())
    with contextlib.suppress(OSError, AttributeError):  # the GNU C library only
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_MMAP_THRESHOLD, 1 << 20)
        library.mallopt(_ARENA_MAX, 2)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)


def address_of(host: str, listener: socket.socket, prefix: str, token: str) -> str:
    """What to open in a browser."""
    name = socket.gethostname() if host in ANY else f"[{host}]" if ":" in host else host
    query = f"?token={token}" if token else ""
    return f"http://{name}:{listener.getsockname()[1]}{prefix}/{query}"
