"""Detectors in a process of their own: they read whole columns, and the pages must not wait for that.

`python -m layerwatch.dashboard.judging` reads {"url": ...} from stdin and writes a judgement to stdout, a
line of JSON each. It has a lower priority, and ends with the server, whose end of the pipe closes then.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from ..monitor import Run
from ..monitor.findings import Finding

log = logging.getLogger(__name__)
#: A worker that has grown beyond this is replaced by a new one; one that grows beyond twice of it is ended.
MOST_BYTES = 1 << 30
KEPT_RUNS = 2


@dataclass(frozen=True)
class Judgement:
    """What the detectors said about one state of a run. `error` is set when they could not finish."""

    stamp: str
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""
    again: float = 0.0  # monotonic time before which a live run is not judged again

    @property
    def alarms(self) -> list[Finding]:
        """The findings that are more than a remark."""
        return [finding for finding in self.findings if finding.severity != "info"]

    @property
    def health(self) -> str:
        """The worst severity, "healthy" without an alarm."""
        severities = {finding.severity for finding in self.findings}
        return next(
            (s for s in ("critical", "warning") if s in severities), "unknown" if self.error else "healthy"
        )


def to_plain(judged: Judgement) -> dict[str, Any]:
    """For JSON. What is not finite stays so."""
    return {
        "stamp": judged.stamp,
        "findings": [asdict(finding) for finding in judged.findings],
        "notes": judged.notes,
        "error": judged.error,
    }


def from_plain(plain: dict[str, Any], again: float = 0.0) -> Judgement:
    """The inverse.

    Raises:
        KeyError, TypeError: this is no judgement.
    """
    findings = [Finding(**{**f, "layers": tuple(f["layers"])}) for f in plain["findings"]]
    return Judgement(plain["stamp"], findings, list(plain["notes"]), str(plain["error"]), again)


class Judges:
    """The worker process as the server sees it. What was asked for last is judged first: somebody waits.

    Args:
        done: called with a run's URL and its judgement, in a thread of ours.
    """

    def __init__(self, done: Callable[[str, Judgement], None]) -> None:
        self._done = done
        self._wishes: OrderedDict[str, Future[Judgement]] = OrderedDict()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    def ask(self, url: str) -> Future[Judgement]:
        """The judgement of the run at `url`, when it is ready."""
        with self._wake:
            future = self._wishes.pop(url, None) or Future()
            self._wishes[url] = future
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="layerwatch-judge", daemon=True)
                self._thread.start()
            self._wake.notify()
        return future

    @property
    def pid(self) -> int | None:
        """The process that works for us, when there is one."""
        return self._process.pid if self._process else None

    def close(self) -> None:
        """End the worker, whatever it is at."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if process := self._process:  # our thread may be done with it at any moment
            process.kill()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._wishes or self._closed)
                if self._closed:
                    self._end()
                    return
                url = next(reversed(self._wishes))
            began = time.monotonic()
            answer = self._answer(url)
            # Judging may take at most about a fifth of the time.
            now = time.monotonic()
            judged = from_plain(answer, now + min(4 * (now - began), 60.0))
            with self._wake:
                future = self._wishes.pop(url)
            self._done(url, judged)
            future.set_result(judged)

    def _answer(self, url: str) -> dict[str, Any]:
        for _ in range(2):  # a worker may have been ended by somebody else
            if self._closed:
                break
            try:
                if line := _exchange(self._process or self._start(), url):
                    answer = json.loads(line)
                    if answer.pop("last", False):
                        self._end()
                    return answer
            except (OSError, ValueError):
                log.warning("the process that judges runs cannot be used", exc_info=True)
            self._end()
        failed = "the process that judges runs ended without an answer; it may have run out of memory"
        return to_plain(Judgement("", error=failed))

    def _start(self) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONSAFEPATH": "1",
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        if self._closed:  # while it was made: `close` has not seen it
            self._process.kill()
        return self._process

    def _end(self) -> None:
        if self._process:
            self._process.kill()
            # Closes the pipes, waits. A question that nobody has read cannot be sent any more.
            with contextlib.suppress(BrokenPipeError), self._process:
                self._process = None


def _exchange(process: subprocess.Popen[str], url: str) -> str:
    """The worker's line about a run; "" when it has ended."""
    if process.stdin is None or process.stdout is None:
        return ""
    process.stdin.write(json.dumps({"url": url}) + "\n")
    process.stdin.flush()
    return process.stdout.readline()


def judge(url: str, kept: OrderedDict[str, Run]) -> Judgement:
    """Ask the detectors. A run is kept open between two questions: its footers are parsed once."""
    stamp = ""
    try:
        run = kept.pop(url, None) or Run(url)
        run.refresh()
        kept[url] = run
        if len(kept) > KEPT_RUNS:
            kept.popitem(last=False)
        stamp = run.fingerprint()
        return Judgement(stamp, run.findings(), run.notes())
    except Exception as error:  # a detector may raise anything; the page must still open
        log.exception("the detectors failed on %s", url)
        return Judgement(stamp, error=f"{type(error).__name__}: {error}")


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _watch(server: int) -> None:
    """Ends the process when its server is gone, or before it takes the memory of the training."""
    while True:
        time.sleep(1.0)
        if hasattr(os, "nice") and os.getppid() != server:
            os._exit(0)
        if resident() > 2 * MOST_BYTES:
            log.error("judging took more than %d MB of memory and was ended", 2 * MOST_BYTES >> 20)
            os._exit(3)


def _listen(wishes: IO[str], answers: IO[str]) -> None:
    """Until the server's end of the pipe closes."""
    kept: OrderedDict[str, Run] = OrderedDict()
    for line in wishes:
        answer = to_plain(judge(json.loads(line)["url"], kept))
        answer["last"] = resident() > MOST_BYTES
        answers.write(json.dumps(answer, default=lambda value: value.item()) + "\n")  # numpy's scalars
        answers.flush()


def main() -> None:
    """The worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the server
    if hasattr(os, "nice"):
        os.nice(10)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what anything prints must not look like an answer
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(BrokenPipeError), answers:  # the server is gone
        _listen(sys.stdin, answers)


if __name__ == "__main__":
    main()
