"""Who maps a function over runs: this process, several, or a Dask cluster. No engine knows what a run is."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import pyarrow as pa

from ..errors import RunError

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Item], Result]
#: An item with what the work made of it, or with words about why there is nothing.
Done = tuple[Item, "Result | str"]

ENGINES = ("serial", "processes", "dask")
#: So many tasks are on their way for each worker: none waits for the next one, and few are lost with it.
AHEAD = 4
#: A scheduler that does not answer for so long is not there (seconds).
CONNECT_SECONDS = 10.0
#: A cluster that grows with its work may take so long to start a worker (seconds).
WORKER_SECONDS = 120.0
_GONE = "the Dask scheduler went away before it was read: the next scan reads it"
_GUARD = "in a script, call scan below `if __name__ == '__main__':`, as worker processes import it again"


def serial(work: Work[Item, Result], items: Sequence[Item]) -> Iterator[Done[Item, Result]]:
    """One after the other, here."""
    for item in items:
        yield item, work(item)


def processes(
    work: Work[Item, Result], items: Sequence[Item], workers: int | None = None
) -> Iterator[Done[Item, Result]]:
    """In so many processes of this machine, one a core when None; in the order in which they are done.

    A process that dies, of too little memory say, takes no more than the item with it that killed it.

    Raises:
        RunError: no process can be started.
    """
    count = min(workers or os.cpu_count() or 1, len(items))
    doubtful: list[Item] = []  # those that were on their way when a process died
    left = list(items)
    while left:
        with _pool(count) as pool:
            finished, lost = 0, []
            for item, result in _ahead(pool, work, left, count * AHEAD):
                if isinstance(result, BrokenProcessPool):
                    lost.append(item)
                else:
                    finished += 1
                    yield item, result
        left = left[finished + len(lost) :]
        doubtful += lost
    while doubtful:  # one at a time, so that it is known who does it
        with _pool(1) as alone:
            died = False
            while doubtful and not died:
                item = doubtful.pop(0)
                future = alone.submit(work, item)
                yield item, _outcome(future)
                died = isinstance(future.exception(), BrokenProcessPool)


@contextlib.contextmanager
def _pool(count: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")  # a fork would take over locks of Arrow's threads
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin)
    try:
        try:
            with _deaf():
                first = [pool.submit(os.getpid) for _ in range(count)]  # each starts one
            first[0].result()
        except (BrokenProcessPool, OSError, RuntimeError) as error:
            raise RunError(
                f"worker processes cannot be started ({error or type(error).__name__}): {_GUARD}"
            ) from None
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started meanwhile do not hear Ctrl-C, which a terminal sends to all of them: each
    would print where it was."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    resource_tracker.ensure_running()  # which unblocks the signal when it is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    """In a worker process: Ctrl-C ends it, without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    prepare()


def _ahead(
    pool: ProcessPoolExecutor, work: Work[Item, Result], items: Sequence[Item], most: int
) -> Iterator[tuple[Item, Any]]:
    """Results, or the error of a pool that broke, after which nothing more is handed in."""
    waiting: dict[Future[Result], Item] = {}
    coming = iter(items)
    broken = False
    while True:
        while not broken and len(waiting) < most and (item := next(coming, None)) is not None:
            try:
                waiting[pool.submit(work, item)] = item
            except BrokenProcessPool as error:
                broken = True
                yield item, error
        if not waiting:
            return
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            item, error = waiting.pop(future), future.exception()
            broken |= isinstance(error, BrokenProcessPool)
            yield item, error if isinstance(error, BrokenProcessPool) else _outcome(future)


def _outcome(future: Future[Result]) -> Result | str:
    try:
        return future.result()
    except BrokenProcessPool:
        return "the process that read it was ended, by too little memory perhaps: scan with fewer --workers"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def prepare() -> None:
    """A worker is one of several: each keeps to one core."""
    os.environ["OMP_NUM_THREADS"] = "1"
    pa.set_cpu_count(1)


def dask(
    work: Work[Item, Result],
    items: Sequence[Item],
    workers: int | None = None,
    scheduler: str | None = None,
) -> Iterator[Done[Item, Result]]:
    """On a Dask cluster: that of `scheduler`, or one of this machine's own with so many processes.

    A task whose worker dies goes to another one, three times; then it is tried alone, before it is told as
    lost.

    Raises:
        RunError: Dask is missing here or layerwatch on the workers, or the scheduler does not answer.
    """
    try:
        from distributed import as_completed
    except ImportError:
        raise RunError(
            "expected Dask for the engine dask: pip install 'layerwatch[cluster]', or take another --engine"
        ) from None
    with _client(scheduler, workers, len(items)) as client:
        _check_workers(client)
        waiting = dict(zip(client.map(work, items, pure=False), items, strict=True))
        doubtful: list[Item] = []  # Dask blames all that a worker had before it when it died
        for future in as_completed(list(waiting), loop=client.loop, raise_errors=False):
            item = waiting.pop(future)
            if _killed(future):
                doubtful.append(item)
            else:
                yield item, _answer(future)
        for item in doubtful:  # one at a time, so that it is known who does it
            alive = client.status == "running"
            yield item, _answer(client.submit(work, item, pure=False)) if alive else _GONE


@contextlib.contextmanager
def _client(scheduler: str | None, workers: int | None, most: int) -> Iterator[Any]:
    """A client of a running scheduler, or of a cluster that ends with it."""
    from dask import config
    from distributed import Client, LocalCluster
    from distributed.comm.addressing import get_address_host_port

    if scheduler is not None:
        try:
            get_address_host_port(scheduler)  # a client of what is no address takes long to go away again
            client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise RunError(
                f"expected a Dask scheduler, but {scheduler} does not answer ({_words(error)}): "
                "start it, check the address, or leave --scheduler out"
            ) from None
        with client:
            yield client
        return
    count = min(workers or os.cpu_count() or 1, most)
    try:
        with _deaf():
            cluster = LocalCluster(
                n_workers=count, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
            )  # fmt: skip
    except (RuntimeError, OSError) as error:
        raise RunError(f"a Dask cluster cannot be started here ({_words(error)}): {_GUARD}") from None
    # A worker that dies is started again; one that is not back within 15 s would never be used, nor replaced.
    patience = config.set({"distributed.deploy.lost-worker-timeout": "1 day"})
    with patience, cluster, Client(cluster, set_as_default=False) as client:
        yield client


def _check_workers(client: Any) -> None:
    """There is a worker, or comes when there is work; and they have layerwatch."""
    first = client.submit(os.getpid, pure=False)
    try:
        first.result(timeout=WORKER_SECONDS)
    except TimeoutError:
        raise RunError(
            f"expected a Dask cluster with workers, but none took a task in {WORKER_SECONDS:.0f} s: "
            "start workers, or leave --scheduler out"
        ) from None
    for name, failure in client.run(prepare, on_error="return").items():
        if failure is not None:
            raise RunError(
                f"the worker {name} cannot read runs ({_words(failure)}): "
                f"install layerwatch {_version()} there"
            )


def _killed(future: Any) -> bool:
    return future.status == "error" and type(future.exception()).__name__ == "KilledWorker"


def _answer(future: Any) -> Any:
    try:
        return future.result()
    except Exception as error:
        if _killed(future):
            return "each worker that read it was ended, by too little memory perhaps: give workers more"
        if future.cancelled() or (future.status != "error" and isinstance(error, OSError)):
            return _GONE  # it was done perhaps, but cannot be fetched any more
        return f"{type(error).__name__}: {error}"


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _version() -> str:
    from ... import __version__

    return __version__
