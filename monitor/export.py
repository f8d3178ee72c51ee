"""A run as one tidy table in a file: statistics, scalars or histograms, read and written piece by piece."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from .derive import COMMON, EXTRA, columns_of, drift_frame, histogram_frame, needed, stats_frame
from .errors import RunError
from .frames import by_tensor
from .levels import rows
from .run import Run
from .scan import Between
from .schema import KINDS, ROLLUPS

SUFFIXES = (".parquet", ".csv")
#: Rows of the log that are in memory at once; of histograms, each of which becomes some fifty.
PIECE, HISTOGRAMS_PIECE = 12_000, 2_000
#: Kinds that have rows of their own. Drift is told on the rows of the weights.
EXPORTED = tuple(kind for kind in KINDS if kind != "drift")

_DRIFT = ["relative_l2", "cosine", "sign_flips"]
_DRIFT_NEEDS = [
    "step", "time", "tensor", "captures", "count", "sum_sq", "ref_sum_sq", "dot", "residual_sq", "sign_flips",
]  # fmt: skip
_ORDER = [
    "step", "tensor", "kind", *COMMON, *(name for extra in EXTRA.values() for name in extra), *_DRIFT,
    "last_step", "captures",
]  # fmt: skip
_TEXT = ("tensor", "kind", "state", "stage", "name")
#: Whole numbers; those that do not apply to a kind are empty there.
_WHOLE = (
    "step", "count", "zeros", "subnormals", "nans", "infs", "lost", "samples", "units", "active_units",
    "sign_flips", "last_step", "captures",
)  # fmt: skip


def _schema(columns: Sequence[str]) -> pa.Schema:
    types = dict.fromkeys(_TEXT, pa.string()) | dict.fromkeys(_WHOLE, pa.int64()) | {"skipped": pa.bool_()}
    return pa.schema([(name, types.get(name, pa.float64())) for name in dict.fromkeys(columns)])


#: What can be exported, and its columns.
TABLES = {
    "stats": _schema(_ORDER),
    "scalars": _schema(["step", "time", "name", "value"]),
    "histograms": _schema(["step", "tensor", "kind", "low", "high", "count"]),
}


@dataclass(frozen=True)
class _Filters:
    steps: Between
    tensor: re.Pattern[str] | None
    kinds: tuple[str, ...]

    @classmethod
    def of(
        cls, steps: tuple[int | None, int | None] | None, tensor: str | None, kinds: Sequence[str]
    ) -> _Filters:
        """Checked.

        Raises:
            RunError: no kind that is exported, no regex, or steps in the wrong order.
        """
        for kind in [k for k in kinds if k not in EXPORTED]:
            near = get_close_matches(kind, EXPORTED, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(EXPORTED)}"
            hint = "it is told on the rows of kind weight" if kind == "drift" else hint
            raise RunError(f"expected a kind that is exported, got {kind!r}: {hint}")
        low, high = steps or (None, None)
        if low is not None and high is not None and low > high:
            raise RunError(f"expected the first step before the last, got {low}:{high}: turn them around")
        try:
            pattern = None if tensor is None else re.compile(tensor)
        except re.error as error:
            raise RunError(
                f"expected a regular expression for the tensors, got {tensor!r} ({error}): mend it, or "
                "escape its special characters with a backslash"
            ) from None
        return cls(Between(low, high), pattern, tuple(kinds))

    def matching(self, names: Sequence[str]) -> list[str]:
        return [n for n in names if self.tensor is None or self.tensor.search(n)]


def export(
    run: Run,
    out: str | Path,
    *,
    steps: tuple[int | None, int | None] | None = None,
    tensor: str | None = None,
    kinds: Sequence[str] = (),
    table: Literal["stats", "scalars", "histograms"] = "stats",
) -> int:
    """Write rows of a run to a .parquet or .csv file, whole or not at all; returns their number.

    Args:
        steps: first and last step, both included; None is no bound. tensor: a regular expression that is
            found in the names of the wanted tensors. kinds: only these.
        table: "stats" has a row for each step, tensor and kind, with every statistic of `Run.stats` (empty
            where it does not apply), and relative_l2, cosine and sign_flips of `Run.drift` on the rows of
            weights. `captures` and `last_step` tell rows that hold several captures, as `keep="rollup"`
            leaves of old ones. "scalars" has a row for each number: step, time, name, value; `tensor`
            chooses names. "histograms" has a row for each non-empty bucket: step, tensor, kind, low, high,
            count.

    Memory stays bounded whatever the size of the run. Rows come by kind, tensor in order of definition, step.

    Raises:
        RunError: another suffix, a filter that is none, nothing to export, or a file that cannot be written.
    """
    target, schema = Path(out), TABLES[table]
    if target.suffix not in SUFFIXES:
        raise RunError(
            f"expected an output that ends in {' or '.join(SUFFIXES)}, got {str(out)!r}: choose one of them"
        )
    if not target.resolve().parent.is_dir():
        raise RunError(
            f"expected an existing folder for the output, but {target.parent} is none: make it first"
        )
    filters = _Filters.of(steps, tensor, kinds)
    if table == "scalars" and kinds:
        raise RunError("expected no kind with scalars, which have none: leave out --kind, or --scalars")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    pieces, written = _pieces(run, filters, table), 0
    first = next(pieces, None)
    if first is None:
        raise RunError(_why_empty(run, filters, table))
    try:
        with _writer(temporary, target.suffix, schema) as file:
            for piece in itertools.chain([first], pieces):
                file.write_table(piece)
                written += piece.num_rows
        os.replace(temporary, target)
    except OSError as error:
        raise RunError(
            f"expected to write {out}, but {error.strerror or error}: choose another place"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return written


@contextlib.contextmanager
def _writer(path: Path, suffix: str, schema: pa.Schema) -> Iterator[Any]:
    how = pa_csv.WriteOptions(include_header=False, quoting_style="needed")
    with path.open("wb") as file:
        if suffix == ".parquet":
            with pq.ParquetWriter(file, schema, compression="zstd") as writer:
                yield writer
        else:
            file.write((",".join(schema.names) + "\n").encode())  # Arrow would put names into quotes
            with pa_csv.CSVWriter(file, schema, write_options=how) as writer:
                yield writer


def tidy(run: Run) -> pd.DataFrame:
    """What `export` writes of a run, in memory."""
    pieces = list(_pieces(run, _Filters.of(None, None, ()), "stats"))
    return pa.Table.from_batches([b for p in pieces for b in p.to_batches()], TABLES["stats"]).to_pandas()


def _pieces(run: Run, filters: _Filters, table: str) -> Iterator[pa.Table]:
    """The rows, at most about `PIECE` of the log at once."""
    if table == "scalars":
        yield from _scalars(run, filters)
        return
    make = _histograms if table == "histograms" else _stats
    limit = HISTOGRAMS_PIECE if table == "histograms" else PIECE
    tensors = filters.matching(_tensors(run))
    for kind in [k for k in _kinds(run) if k in (filters.kinds or EXPORTED)]:
        for where, steps in _portions(run, kind, tensors, filters.steps, limit):
            yield make(run, kind, where, steps)
            pa.default_memory_pool().release_unused()


def _distinct(run: Run, column: str) -> set[Any]:
    """Values of a column of `stats`, and of what is left of old rows."""
    return set().union(*(run._log.distinct(table, column) for table in ("stats", *ROLLUPS)))


def _kinds(run: Run) -> list[str]:
    there = _distinct(run, "kind")
    return [kind for kind in EXPORTED if kind in there]


def _tensors(run: Run) -> list[str]:
    """In order of definition; what is not described comes last, by name."""
    depth = {name: place for place, name in reversed(list(enumerate(run._names())))}
    return sorted(_distinct(run, "tensor"), key=lambda name: (depth.get(name, len(depth)), name))


def _portions(
    run: Run, kind: str, tensors: Sequence[str], steps: Between, limit: int
) -> Iterator[tuple[dict[str, Any], Between]]:
    """Conditions that take in all rows of a kind, in order, and the steps of these rows, each at most about
    `limit` rows."""
    done, together = 0, 1
    while done < len(tensors):
        batch = tensors[done : done + together]
        where = {"kind": [kind], "tensor": batch}
        found = np.sort(rows(run._log, ["step"], where, 1, steps)["step"].to_numpy())
        together = max(1, limit * len(batch) // max(found.size, 1))
        if together < len(batch):
            continue
        if found.size:
            bounds = np.unique([found[0], *found[limit::limit], found[-1] + 1]).tolist()
            for low, high in itertools.pairwise(bounds):
                yield where, Between(low, high - 1)
        done += len(batch)


def _read(run: Run, columns: Sequence[str], where: dict[str, Any], steps: Between) -> pa.Table:
    """The rows whose first step is one of these, by tensor, then step."""
    found = rows(run._log, columns, where, 1, steps)
    order = by_tensor(found, where["tensor"])
    step = found["step"].to_numpy()[order]
    return found.take(order[(step >= (steps.low or 0)) & (step <= (steps.high or 0))])


def _stats(run: Run, kind: str, where: dict[str, Any], steps: Between) -> pa.Table:
    columns = [*columns_of(kind), "last_step", "captures"]
    frame = stats_frame(_read(run, needed(columns), where, steps), kind, columns).assign(kind=kind)
    if kind == "weight":
        drift = drift_frame(_read(run, _DRIFT_NEEDS, {**where, "kind": ["drift"]}, steps))
        frame = frame.merge(drift[["step", "tensor", *_DRIFT]], "left", ["step", "tensor"])
    return _table(frame.reindex(columns=TABLES["stats"].names), "stats")


def _histograms(run: Run, kind: str, where: dict[str, Any], steps: Between) -> pa.Table:
    found = _read(run, ["step", "tensor", "zeros", "subnormals", "buckets", "counts"], where, steps)
    frames = [
        histogram_frame(found.filter(pc.field("tensor") == tensor)).assign(tensor=tensor, kind=kind)
        for tensor in where["tensor"]
    ]
    return _table(pd.concat(frames, ignore_index=True), "histograms")


def _table(frame: pd.DataFrame, table: str) -> pa.Table:
    """Missing numbers are null, not NaN: empty in a CSV file."""
    arrays = [pa.array(frame[f.name], f.type, from_pandas=True, safe=False) for f in TABLES[table]]
    return pa.Table.from_arrays(arrays, schema=TABLES[table])


def _scalars(run: Run, filters: _Filters) -> Iterator[pa.Table]:
    for name in filters.matching(run.scalar_names()):
        found = run._log.table("scalars", TABLES["scalars"].names, {"name": [name], "step": filters.steps})
        if len(found):
            yield found.sort_by([("step", "ascending"), ("time", "ascending")]).cast(TABLES["scalars"])


def _why_empty(run: Run, filters: _Filters, table: str) -> str:
    """Which filter has taken everything."""
    what, names = ("scalar", run.scalar_names()) if table == "scalars" else ("tensor", _tensors(run))
    if not names:
        missing = "scalar" if what == "scalar" else "captured step"
        return f"the run {run.url} holds no {missing} yet: there is nothing to export"
    if not filters.matching(names):
        pattern = filters.tensor.pattern if filters.tensor else ""
        near = get_close_matches(pattern, names, 3, 0.3) or names[:3]
        return f"{pattern!r} is found in the name of no {what} of {run.url}: there is {', '.join(near)}"
    if filters.kinds and not set(filters.kinds) & set(_kinds(run)):
        there = ", ".join(_kinds(run))
        return f"{run.url} has no rows of kind {', '.join(filters.kinds)}: it has {there}"
    steps = run._log.distinct("scalars", "step") if what == "scalar" else _distinct(run, "step")
    if not any(map(filters.steps.holds, steps)):
        low, high = ("" if bound is None else bound for bound in filters.steps)
        span = f"{len(steps):,} steps from {min(steps)} to {max(steps)}"
        return f"no row of {run.url} is in steps {low}:{high}: it has {span}"
    return f"no row of {run.url} passes all filters together: leave one of them out"
