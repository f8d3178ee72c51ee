"""The errors that a reader of runs can meet. Each message says what was expected, what came, what to do
next."""

from __future__ import annotations


class RunError(ValueError):
    """A path is no run, or a run cannot be read or written as asked."""


class RunExistsError(RunError):
    """The run folder already holds a log: resume it or choose another name."""


class StoreError(RunError):
    """An object store cannot be used: unreachable; or, and this is `lasting`, no such bucket, no access."""

    def __init__(self, message: str, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


class WeightsError(ValueError):
    """A weight file or state cannot be read, or holds something else than what is asked for."""
