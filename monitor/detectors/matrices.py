"""The rows of a run as matrices: read once, placed once, and made longer as the log grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from ..derive import DRIFT_COLUMNS, DRIFT_NEEDS, codes_of, columns_of, drift_arrays, needed, stats_arrays
from ..scan import ENCODED

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Codes = NDArray[np.int64]

#: What is read of a kind when it is first asked for: what the detectors use. Anything else is read when it is
#: asked for, at the price of reading the kind's places once more.
FIRST: dict[str, tuple[str, ...]] = {
    "gradient": ("norm", "rms", "mean", "std", "min", "max", "zeros", "nans", "infs", "count", "skipped"),
    "weight": ("norm", "rms", "nans", "infs", "state", "skipped"),
    "update": ("norm", "rms", "ratio", "along", "lost", "zeros", "count"),
    "activation": ("norm", "rms", "mean", "std", "min", "nans", "infs", "count", "samples", "units"),
    "initial_weight": ("norm", "rms", "mean", "std", "min", "max"),
    "drift": ("relative_l2",),
}
#: Rows that are derived and placed at a time: few enough for the processor's caches.
BLOCK = 1 << 16
#: Rows of a step may come while so many captures of later steps are there already.
LATE_CAPTURES = 3


#: A column as numbers, or as places in a list of words (-1: none).
Values: TypeAlias = "NDArray[Any] | tuple[Codes, list[str]]"


class Rows(NamedTuple):
    """Some rows of a kind. `derive` computes their columns, when they are to be placed."""

    step: Ints
    place: Codes  # of the tensor in `words`
    words: list[str]
    derive: Callable[[], Mapping[str, Values]]


class Source(Protocol):
    """What matrices are read from: `Run.sums` where it is there, else whole frames."""

    def stats(
        self, kind: str, tensor: str | None = None, columns: Sequence[str] | None = None
    ) -> pd.DataFrame: ...
    def drift(self) -> pd.DataFrame: ...


class Matrix:
    """One column: a row for each tensor, a column for each captured step; NaN where there is nothing.

    What is the same at every step, as counts are, is kept once.
    """

    def __init__(self, block: Floats) -> None:
        self.length = block.shape[1]
        self._held = block[:, :1].copy() if _constant(block) else block

    @property
    def constant(self) -> bool:
        return self._held.shape[1] == 1 < self.length

    def replace(self, since: int, block: Floats) -> None:
        """Put these columns behind the first `since`. The block may have more rows: tensors that are new."""
        length = since + block.shape[1]
        kept = self._held[:, :1] if self.constant else self._held[:, : min(since, self.length)]
        same = self.constant and since and kept.shape[0] == block.shape[0]
        if not since:
            self.length, self._held = length, block[:, :1].copy() if _constant(block) else block
        elif same and _same(block, kept):
            self.length = length
        else:
            self._grow(since, length, block.shape[0])
            self._held[:, since:length] = block
            self.length = length

    def _grow(self, since: int, length: int, tensors: int) -> None:
        """Room for so many captures and tensors; doubled, so that appending stays cheap."""
        held = self._held
        if self.constant or held.shape[0] < tensors or held.shape[1] < length:
            room = max(length, 2 * held.shape[1] if held.shape[1] < length else held.shape[1])
            larger = np.full((tensors, room), np.nan)
            larger[: held.shape[0], :since] = held[:, :1] if self.constant else held[:, :since]
            self._held = larger

    def take(self, tensors: Ints | slice) -> Floats:
        """(captures, tensors), not to be written to; without a copy where that is possible."""
        rows = self._held[tensors]
        found = np.broadcast_to(rows, (rows.shape[0], self.length)) if self.constant else rows
        return found[:, : self.length].T


def _constant(block: Floats) -> bool:
    return block.shape[1] > 1 and _same(block, block[:, :1])


def _same(block: Floats, column: Floats) -> bool:
    """By their bits, so that nothing equals nothing."""
    return bool((block.view(np.int64) == np.ascontiguousarray(column).view(np.int64)).all())


class Grid:
    """The rows of one kind."""

    def __init__(self) -> None:
        self.steps: Ints = np.empty(0, np.int64)
        self.names: dict[str, int] = {}  # tensor -> its row in every matrix
        self.columns: dict[str, Matrix] = {}
        self.words: dict[str, int] = {}  # of columns of strings: word -> its number

    @property
    def resume_at(self) -> int | None:
        """The step from which rows are to be read again: some may have come late."""
        return int(self.steps[-LATE_CAPTURES]) if self.steps.size > LATE_CAPTURES else None

    def put(self, blocks: Sequence[Rows], columns: Sequence[str], since: int | None = None) -> None:
        """Take in rows, in place of all from step `since` on (None: of all)."""
        kept = int(np.searchsorted(self.steps, since)) if since is not None else 0
        fresh = _union([rows.step for rows in blocks])
        for rows in blocks:
            for place in np.flatnonzero(np.bincount(rows.place, minlength=len(rows.words))):
                self.names.setdefault(rows.words[place], len(self.names))
        for name, block in self._placed(blocks, columns, fresh).items():
            if name in self.columns:
                self.columns[name].replace(kept, block)
            else:
                self.columns[name] = Matrix(block)
        self.steps = np.concatenate([self.steps[:kept], fresh])

    def add_columns(self, blocks: Sequence[Rows], names: Sequence[str]) -> None:
        """Further columns of the rows that are there already."""
        for name, block in self._placed(blocks, names, self.steps).items():
            self.columns[name] = Matrix(block)

    def _placed(self, blocks: Sequence[Rows], columns: Sequence[str], steps: Ints) -> dict[str, Floats]:
        found = {name: np.full((len(self.names), steps.size), np.nan) for name in columns}
        places = _places(steps)
        for rows in blocks if steps.size else ():
            line = np.array([self.names.get(word, -1) for word in rows.words])[rows.place]
            at = places(rows.step)
            inside = (line >= 0) & (at >= 0)
            flat = line * steps.size + at
            flat = flat if inside.all() else flat[inside]
            for name, values in rows.derive().items():
                numbers = self._numbers(values) if isinstance(values, tuple) else values
                found[name].reshape(-1)[flat] = numbers if flat.size == inside.size else numbers[inside]
        return found

    def _numbers(self, values: tuple[Codes, list[str]]) -> Floats:
        codes, words = values
        return np.array([*(self.words.setdefault(w, len(self.words)) for w in words), np.nan])[codes]

    def take(self, column: str, names: Sequence[str], steps: Ints) -> Floats:
        """A column of these tensors at these steps: (len(steps), len(names)), not to be written to."""
        matrix = self.columns.get(column)
        lines = np.array([self.names.get(name, -1) for name in names])
        if matrix is None or not steps.size or not (lines >= 0).any():
            return np.full((steps.size, len(names)), np.nan)
        everything = lines.size == len(self.names) and bool((lines == np.arange(lines.size)).all())
        found = matrix.take(slice(None) if everything else lines)
        rows = self._rows(steps)
        if isinstance(rows, slice) and (lines >= 0).all():
            found = found[rows]
        else:
            found = found[rows].copy(order="K")
            found[:, lines < 0] = np.nan
            if not isinstance(rows, slice):
                found[rows < 0] = np.nan
        found.flags.writeable = False
        return found

    def _rows(self, steps: Ints) -> slice | Ints:
        """Where these steps are; -1 where they are not."""
        begin = int(np.searchsorted(self.steps, steps[0]))
        if np.array_equal(self.steps[begin : begin + steps.size], steps):
            return slice(begin, begin + steps.size)
        return _places(self.steps)(steps)


def _union(steps: Sequence[Ints]) -> Ints:
    """All of these steps, ascending; there are few of them beside the rows."""
    few = [s[np.concatenate([[True], s[1:] != s[:-1]])] for s in steps if s.size]
    if not few:
        return np.empty(0, np.int64)
    together = np.concatenate(few)
    low, high = int(together.min()), int(together.max())
    if high - low > 100 * together.size:
        return np.unique(together)
    there = np.zeros(high - low + 1, bool)
    there[together - low] = True
    return np.flatnonzero(there) + low


def _places(steps: Ints) -> Callable[[Ints], Ints]:
    """Where steps are among these, which ascend; -1 where they are not."""
    if not steps.size:
        return lambda wanted: np.full(wanted.size, -1)
    low, high = int(steps[0]), int(steps[-1])
    if high - low > 1000 * steps.size:
        at = lambda wanted: np.minimum(np.searchsorted(steps, wanted), steps.size - 1)  # noqa: E731
        return lambda wanted: np.where(steps[at(wanted)] == wanted, at(wanted), -1)
    table = np.full(high - low + 2, -1)  # the last one is for what lies outside; faster than searching
    table[steps - low] = np.arange(steps.size)
    return lambda wanted: table[np.where((wanted >= low) & (wanted <= high), wanted - low, -1)]


class Matrices:
    """The grids of one source, filled as they are asked for."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._grids: dict[str, Grid] = {}

    def grid(self, kind: str, column: str | None = None) -> Grid:
        """The rows of a kind, with at least the columns of `FIRST` and this one."""
        if kind not in self._grids:
            columns = list(dict.fromkeys([*FIRST.get(kind, ()), *([column] if column else [])]))
            grid = Grid()
            grid.put(self._read(kind, columns), columns)
            self._grids[kind] = grid
        grid = self._grids[kind]
        if column is not None and column not in grid.columns:
            grid.add_columns(self._read(kind, [column]), [column])
        return grid

    def refresh(self) -> None:
        """Take in what the log has got since."""
        for kind, grid in self._grids.items():
            since, columns = grid.resume_at, list(grid.columns)
            grid.put(self._read(kind, columns, since), columns, since)

    def _read(self, kind: str, columns: Sequence[str], since: int | None = None) -> list[Rows]:
        drift = kind == "drift"
        wanted = [name for name in columns if name in (DRIFT_COLUMNS if drift else columns_of(kind))]
        if (sums := getattr(self.source, "sums", None)) is not None:
            raw = ["step", "tensor", *(DRIFT_NEEDS if drift else needed(wanted))]
            return _of_table(sums(kind, list(dict.fromkeys(raw)), since), kind, wanted)
        if drift:
            return [_of_frame(self.source.drift(), wanted)]
        asked = list(dict.fromkeys(["step", "tensor", *wanted]))
        return [_of_frame(self.source.stats(kind, None, asked), wanted)]


def _of_table(table: pa.Table, kind: str, columns: Sequence[str]) -> list[Rows]:
    """Rows of sums, which are derived block by block."""
    strings = [c for c in columns if c in ENCODED]
    numbers = [c for c in columns if c not in strings]

    def of_block(block: pa.Table) -> Rows:
        def derive() -> dict[str, Values]:
            found = drift_arrays(block) if kind == "drift" else stats_arrays(block, numbers)
            return {c: found[c] for c in numbers} | {c: codes_of(block[c]) for c in strings}

        return Rows(block["step"].to_numpy(), *codes_of(block["tensor"]), derive)

    return [of_block(table.slice(start, BLOCK)) for start in range(0, table.num_rows, BLOCK)]


def _of_frame(frame: pd.DataFrame, columns: Sequence[str]) -> Rows:
    def values(name: str) -> Values:
        if name not in ENCODED:
            return frame[name].to_numpy(np.float64)
        codes, words = pd.factorize(frame[name])
        return codes, [str(word) for word in words]

    place, words = pd.factorize(frame["tensor"])
    there = [name for name in columns if name in frame]
    names = [str(word) for word in words]
    return Rows(
        frame["step"].to_numpy(np.int64), place, names, lambda: {name: values(name) for name in there}
    )
