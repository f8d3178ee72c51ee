"""The history of a run that is still written: every look reads what is new, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ..bins import KEPT
from .history import Bools, History, Ints
from .matrices import Matrices
from .thinned import Thinned, sparing

if TYPE_CHECKING:
    from ..findings import Finding
    from ..normal import Normal
    from ..run import Run

#: Scalars are read again from so many steps before the last one: those of an accelerator and those of the
#: flight recorder come late.
LATE_STEPS = 1000


class Growing:
    """A run as detectors read it again and again. Its findings are those of a `Run` that is opened anew.

    The matrices that were read are kept and made longer. A log that was cut (a training that was resumed, a
    file that turned out to be damaged) is read anew, and so is one whose old rows are merged: one that is too
    long, see `Thinned`, or is written with keep="rollup". That bounds the memory as it does for a `Run`.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.name, self.info = run.name, run.info
        self._matrices: Matrices | None = None
        self._scalars: dict[str, pd.DataFrame] = {}
        self._fresh: set[str] = set()  # names of scalars that were read since the last look
        self._identity: Any = None
        self._found: tuple[list[Finding], list[str]] | None = None

    def find(self, normal: Normal | None = None) -> tuple[list[Finding], list[str]]:
        """`findings.find` on the run as it is now. `normal`: the same at every call."""
        from ..findings import judge

        if not self.run.refresh() and self._found is not None:
            return self._found
        source = self._look()
        if isinstance(source, Thinned):
            found, notes = judge(History(source), normal)
            self._found = found, [*notes, source.note]
        else:
            self._found = judge(History(self, self._matrices), normal)
        return self._found

    def _look(self) -> Growing | Thinned:
        """Take in what is new."""
        run = self.run
        self.info, self._fresh = run.info, set()
        source = sparing(run)
        identity = run.info.get("created"), tuple(run.sessions()["first_step"]), tuple(run.problems)
        if isinstance(source, Thinned) or identity != self._identity or self._merged():
            self._matrices, self._scalars = Matrices(self), {}
        elif self._matrices is not None:
            self._matrices.refresh()
        self._identity = identity
        return source if isinstance(source, Thinned) else self

    def _merged(self) -> bool:
        """Old rows may have been replaced by roll-ups."""
        if self.info.get("keep") != "rollup" or self._matrices is None:
            return False
        return self._matrices.grid("weight").steps.size > KEPT

    # What a history asks for

    def sums(self, kind: str, columns: Sequence[str], since: int | None = None) -> pa.Table:
        """`Run.sums`."""
        return self.run.sums(kind, columns, since)

    def scalars(self, name: str) -> pd.DataFrame:
        """`Run.scalars`; of what was read before, only the end is read again."""
        known = self._scalars.get(name)
        if name not in self._fresh:
            self._fresh.add(name)
            since = int(known["step"].iloc[-1]) - LATE_STEPS if known is not None and len(known) else None
            news = self.run.scalars(name, steps=None if since is None else (since, None))
            if known is not None and since is not None:
                kept = known.iloc[: int(np.searchsorted(known["step"].to_numpy(), since))]
                news = pd.concat([kept, news], ignore_index=True)
            self._scalars[name] = news
        return self._scalars[name]

    def scalar_names(self) -> list[str]:
        """`Run.scalar_names`."""
        return self.run.scalar_names()

    def tensors(self) -> pd.DataFrame:
        """`Run.tensors`."""
        return self.run.tensors()

    def modules(self) -> pd.DataFrame:
        """`Run.modules`."""
        return self.run.modules()

    def stats(
        self, kind: str, tensor: str | None = None, columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """`Run.stats`."""
        return self.run.stats(kind, tensor, columns)

    def drift(self) -> pd.DataFrame:
        """`Run.drift`."""
        return self.run.drift()

    def activity(self, kind: str, tensor: str) -> tuple[Ints, Bools]:
        """`Run.activity`: asked for where a layer is suspicious only, so it is not kept."""
        return self.run.activity(kind, tensor)

    def events(self) -> pd.DataFrame:
        """`Run.events`."""
        return self.run.events()

    def checksums(self) -> pd.DataFrame:
        """`Run.checksums`."""
        return self.run.checksums()
