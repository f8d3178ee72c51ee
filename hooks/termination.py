"""A training that is asked to end (SIGTERM, as schedulers send it) finishes its log first.

Only while nobody else handles the signal. The process ends by it all the same. Python runs a handler between
two operations of the main thread, so that one that hangs in native code would not end any more: a thread sees
the signal as well, and ends the process when the handler is not done in time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import weakref
from typing import Protocol

#: What the handler may take before the process is ended without it, in seconds.
GRACE_SECONDS = 5.0


class Terminable(Protocol):
    """What can be asked to end at once."""

    def terminate(self) -> bool:
        """Finish the log; False when that has to wait until `go_on`."""
        ...


_open: weakref.WeakKeyDictionary[Terminable, float] = weakref.WeakKeyDictionary()
_installed = False
_mask = threading.local()  # the signals that a forking thread had blocked
#: The signal has come.
asked = False


def listen(watcher: Terminable, grace: float) -> None:
    """Finish this log, in so many seconds, when the process is asked to end."""
    _open[watcher] = grace
    _install()


def unlisten(watcher: Terminable) -> None:
    """Not any more."""
    _open.pop(watcher, None)


def go_on() -> None:
    """What could not be finished when the signal came can be now."""
    if asked and threading.current_thread() is threading.main_thread():
        _handle(signal.SIGTERM)


def _install() -> None:
    global _installed
    if _installed or threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # somebody's own: it ends the process in order
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    if before != -1:  # an event loop's
        signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)
    else:
        os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_leave_to_parent)
        threading.Thread(target=_end_in_time, args=(read,), name="layerwatch-signal", daemon=True).start()
    signal.signal(signal.SIGTERM, _handle)
    _installed = True


def _hold() -> None:
    """A forked child shares the pipe: a signal to it, which is none to its parent, has to wait for
    `_leave_to_parent`."""
    held = {signal.SIGTERM} if _ours() else set()  # another handler may raise, which a fork would swallow
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, held)


def _release() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _leave_to_parent() -> None:
    signal.set_wakeup_fd(-1)
    if _ours():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _release()


def _ours() -> bool:
    """Nobody has set another handler since: that one ends the process in order."""
    return signal.getsignal(signal.SIGTERM) is _handle


def _end_in_time(read: int) -> None:
    while signal.SIGTERM not in os.read(read, 1) or not _ours():
        pass
    threading.Event().wait(max(_open.values(), default=GRACE_SECONDS))
    ctypes.pythonapi.PyOS_setsig(int(signal.SIGTERM), None)  # `signal.signal` is for the main thread only
    os.kill(os.getpid(), signal.SIGTERM)


def _handle(number: int, frame: object = None) -> None:
    global asked
    asked = True
    done = [watcher.terminate() for watcher in list(_open)]
    if all(done):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
