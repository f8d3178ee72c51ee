"""The local folders in which runs of object stores are written first, and what it takes to begin, go on or
finish one."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from .compact import compact
from .errors import RunError, RunExistsError, StoreError
from .mirror import Mirror, described
from .process import alive
from .reader import LogReader
from .remote import Address
from .store import Store, store_of

logger = logging.getLogger("layerwatch")

#: Write-ahead files of a run on an object store become Parquet, and so can be sent, this often (seconds).
ROTATE_SECONDS = 60.0
#: A run that goes on without its spool numbers its files from the next multiple of this on: what the other
#: machine may still have to send keeps its names.
STRIDE = 100_000


@dataclass(frozen=True)
class RemoteRun:
    """A run of an object store that may be begun, or gone on with.

    Attributes:
        url, name: as shown to users.
        spool: the folder that `LogWriter` writes and `Uploader` mirrors.
        source: the whole log as far as it can be reached, for `Run`: the URL, or the spool in an outage.
        follows: for `LogWriter`.
    """

    url: str
    name: str
    spool: Path
    source: str | Path
    follows: tuple[int, int] = (0, 0)


def is_url(run: object) -> bool:
    """Does this name a place on an object store?"""
    return isinstance(run, str) and "://" in run


def spool_root() -> Path:
    """LAYERWATCH_SPOOL, or `layerwatch/spool` below the user's cache folder."""
    given = os.environ.get("LAYERWATCH_SPOOL")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerwatch" / "spool"


def spool_of(url: str) -> Path:
    """The folder in which the run at this URL is written before it is sent.

    Raises:
        StoreError: it is no URL, or too long for a folder's name.
    """
    name = quote(Address.of(url).url, safe="")
    if len(name) > 240:
        raise StoreError(f"expected a URL of at most 240 characters, got {len(name)}: {url}")
    return spool_root() / name


def spooled() -> list[str]:
    """The URLs of all runs of which something is kept here, sorted."""
    return sorted(unquote(p.parent.name) for p in spool_root().glob("*/run.json"))


def open_remote_run(url: str, *, resume: bool = False) -> RemoteRun:
    """What `watch` needs to begin the run at a URL, or to go on with it.

    Bounded by a few timeouts of the store. When it cannot be reached the run begins, or goes on from the
    spool, and is sent later.

    Raises:
        RunExistsError: there is such a run, and `resume` is off; or another one of this name.
        RunError: there is none to resume, or a process still writes it.
        StoreError: no such bucket, no access; or the store is unreachable and only it has the run.
    """
    spool, url = spool_of(url), Address.of(url).url
    store = store_of(url)
    here = (spool / "run.json").is_file()
    try:
        store.list()  # a missing bucket is told apart from a missing run
        there = described(_read(store))
    except StoreError as error:
        if error.lasting or (resume and not here):
            raise
        logger.warning("the run is written to %s and sent when the store can be reached: %s", spool, error)
        there = None
    if not resume:
        _refuse(url, spool if here else None, there)
        return RemoteRun(url, store.name, spool, url)
    if not here and not there:
        raise RunError(f"expected a run to resume at {url}, found none: drop resume=True to start it")
    if here:
        _finish_parts(spool)
    if there is None:
        return RemoteRun(url, store.name, spool, spool)
    if here:
        Mirror(spool, url).send()
    return RemoteRun(url, store.name, spool, url, _follow(store, spool))


def _refuse(url: str, spool: Path | None, there: dict | None) -> None:
    if there:
        raise RunExistsError(
            f"the run {url} exists already: "
            "pass resume=True to continue it, or another run= to start a new one"
        )
    if spool:
        raise RunExistsError(
            f"an earlier run {url} has not been sent yet: `layerwatch upload {url}` sends it, "
            "resume=True continues it; or choose another run="
        )


def _read(store: Store) -> bytes | None:
    try:
        return store.read("run.json")
    except FileNotFoundError:
        return None


def _follow(store: Store, spool: Path) -> tuple[int, int]:
    """The latest session there, and the number that files here must pass. Makes the spool if need be."""
    store.refresh()
    reader = LogReader(store)
    numbers = [span.last for table in ("stats", "scalars", "events") for span in reader.files(table)]
    if not (spool / "run.json").is_file():
        spool.mkdir(parents=True, exist_ok=True)
        (spool / "run.json").write_bytes(_read(store) or b"{}")
    session = int(described(_read(store)).get("session", 0))
    return max([session, *reader.starts]), STRIDE * (max(numbers, default=0) // STRIDE + 1)


def _finish_parts(spool: Path) -> None:
    """Everything into Parquet, so that it can be sent.

    Raises:
        RunError: a process still writes it.
    """
    info = described((spool / "run.json").read_bytes())
    ours = info.get("host") == socket.gethostname() and info.get("pid") != os.getpid()
    if ours and not info.get("closed") and alive(info.get("pid"), info.get("process_started")):
        raise RunError(
            f"expected a run that has ended, but process {info.get('pid')} still writes {spool}: "
            "it sends its log itself"
        )
    compact(spool)


def send_spool(url: str, to: str | None = None) -> int:
    """Send what is left of the run at a URL in the spool; returns the number of files that were sent.

    The spool is removed once everything is there (listed with the right sizes).

    Args:
        to: send it to another URL.

    Raises:
        RunError: nothing is left of such a run, or a process still writes it.
        StoreError: the store cannot be used, or holds another run.
    """
    spool, target = spool_of(url), to or url
    if not (spool / "run.json").is_file():
        others = ", ".join(spooled()) or "nothing"
        raise RunError(f"expected a run of {url} in {spool_root()}, found none: kept there is {others}")
    _finish_parts(spool)
    mirror = Mirror(spool, target)
    mirror.look((spool / "run.json").read_bytes())
    before = mirror.unsent()
    mirror.send()
    if not mirror.finish():
        raise StoreError(f"{target} does not list everything that was sent: try again")
    mirror.remove_local()
    return len(before)
