"""The dashboard inside a notebook: a server in a thread of this process, in a frame below the cell."""

from __future__ import annotations

import atexit
import html
import os
import secrets
import threading
from pathlib import Path
from urllib.parse import quote

from ..monitor import Run
from ..monitor.runs import run_folders
from ..monitor.store import store_of
from .app import create_app
from .security import Access
from .serving import listen, over

HUB = "JUPYTERHUB_SERVICE_PREFIX"
_served: dict[str, Shown] = {}


class Shown:
    """A dashboard that is being served.

    Attributes:
        url: what to open in a browser.
    """

    def __init__(self, root: str, page: str, height: int, port: int) -> None:
        self._root, self._height, self._page = root, height, page
        listener = listen("127.0.0.1", port)
        port = listener.getsockname()[1]
        hub = os.environ.get(HUB, "")
        # The hub's proxy passes on the host name that the reader typed, which is not known here, and takes
        # the path away. Others have accounts on its machine, too: so there is a token.
        self._prefix = f"{hub.rstrip('/')}/proxy/{port}" if hub else ""
        self._token = secrets.token_urlsafe(24) if hub else ""
        access = Access(token=self._token, any_host=bool(hub), framed=True)
        app = create_app(root, access=access, prefix=self._prefix)
        self._library = app.server.extensions["layerwatch"]
        self._server = over(listener, app)
        self._origin = "" if hub else f"http://127.0.0.1:{port}"
        self._thread = threading.Thread(target=self._server.run, name="layerwatch-dashboard", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        query = f"?token={self._token}" if self._token else ""
        return f"{self._origin}{self._prefix}{self._page}{query}"

    def at(self, page: str, height: int) -> Shown:
        """The same server, opened at another page."""
        self._page, self._height = page, height
        return self

    def close(self) -> None:
        """Stop serving."""
        _served.pop(self._root, None)
        if self._thread.is_alive():
            # In the thread that waits for the sockets: closed under its feet, they would be an error there.
            self._server.trigger.pull_trigger(self._end)
            self._thread.join(timeout=5)
        self._server.task_dispatcher.shutdown(cancel_pending=True, timeout=1)
        self._library.close()  # and with it the process that judges

    def _end(self) -> None:
        from waitress import wasyncore

        wasyncore.close_all(self._server._map, ignore_all=True)

    def __repr__(self) -> str:
        return f"layerwatch dashboard: {self.url}"

    def _repr_html_(self) -> str:
        address = html.escape(self.url, quote=True)
        return (
            f'<iframe src="{address}" width="100%" height="{self._height}" style="border: 0" '
            'title="layerwatch dashboard" allow="clipboard-write"></iframe>'
            f'<div><a href="{address}" target="_blank" rel="noopener">Open in a tab of its own</a></div>'
        )


def show(run_or_root: str | Path | Run = "runs", height: int = 800, port: int = 0) -> Shown:
    """Show the dashboard below a notebook's cell.

    Args:
        run_or_root: a run, its folder, a folder of runs, or the URL of such a place on an object store.
        height: of the frame, in pixels. port: to listen at; 0 takes a free one.

    Returns:
        An object with `url` and `close()`. The same place is served once, however often it is shown.

    Raises:
        ValueError: the folder does not exist.
        OSError: the port is taken.
    """
    place = run_or_root.url if isinstance(run_or_root, Run) else run_or_root
    store = store_of(place)
    if store.path is not None and not store.path.is_dir():
        raise ValueError(f"expected a folder of runs, but {place} is none: check the path")
    root = str(store.path.resolve()) if store.path is not None else store.url
    alone = run_folders(store) == [""]
    page = f"/run/{quote(store.name)}/overview" if alone else "/"
    if root in _served:
        return _served[root].at(page, height)
    if not _served:
        atexit.register(_close_all)
    shown = _served[root] = Shown(root, page, height, port)
    return shown


def _close_all() -> None:
    for shown in list(_served.values()):
        shown.close()
