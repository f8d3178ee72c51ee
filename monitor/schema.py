"""The Arrow schemas of a run's tables, and their version (documented in docs/log-format.md)."""

from __future__ import annotations

from typing import TypeVar

import pyarrow as pa

#: Written to run.json and to every file. A reader refuses a newer version; older ones stay readable.
SCHEMA_VERSION = 2

#: Scalars whose names begin so tell of the machine, not of the training: nothing is judged by them.
SYSTEM = "system/"

#: The kinds of rows in the `stats` table.
KINDS = (
    "weight",
    "initial_weight",
    "gradient",
    "gradient_norm",
    "update",
    "activation",
    "drift",
    "attention_entropy",
    "attention_logit",
    "second_moment",
    "momentum",
)

#: Sufficient statistics of one tensor at one optimizer step. Everything here adds (min/max, and `active` by
#: OR).
STATS = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("time", pa.float64(), nullable=False),  # unix seconds
        pa.field("tensor", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("captures", pa.int64(), nullable=False),  # how many captures were merged into this row
        pa.field("count", pa.int64(), nullable=False),  # elements, finite or not
        pa.field("sum", pa.float64(), nullable=False),  # over the finite elements, as are sum_sq, min, max
        pa.field("sum_sq", pa.float64(), nullable=False),
        pa.field("min", pa.float64()),  # null when no element is finite
        pa.field("max", pa.float64()),
        pa.field("zeros", pa.int64(), nullable=False),
        pa.field("subnormals", pa.int64(), nullable=False),  # 0 < |x| < 2^-126
        pa.field("nans", pa.int64(), nullable=False),
        pa.field("pos_infs", pa.int64(), nullable=False),
        pa.field("neg_infs", pa.int64(), nullable=False),
        pa.field("buckets", pa.list_(pa.int16()), nullable=False),  # ascending; see summary.bucket_edges
        pa.field("counts", pa.list_(pa.int64()), nullable=False),
        pa.field("ref_sum_sq", pa.float64()),  # update: the weight before the step; drift: the reference
        pa.field("dot", pa.float64()),  # <reference, this tensor>
        pa.field("residual_sq", pa.float64()),  # drift: what a bf16 copy of the reference rounded away
        pa.field("sign_flips", pa.int64()),  # drift
        pa.field("lost", pa.int64()),  # update: unchanged bits although the gradient is not zero
        pa.field("samples", pa.int64()),  # activation: rows of the batch, times positions
        pa.field("units", pa.int64()),  # activation, gradient of a matrix: output units
        pa.field("active", pa.binary()),  # one bit a unit: any nonzero value in this capture
        pa.field("stage", pa.string()),  # gradient: before_clip or at_step
        pa.field("state", pa.string()),
        pa.field("skipped", pa.bool_(), nullable=False),
    ]
)

#: The values of small tensors.
VALUES = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("time", pa.float64(), nullable=False),
        pa.field("tensor", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("values", pa.list_(pa.float64()), nullable=False),
    ]
)

#: One number with a name.
SCALARS = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("time", pa.float64(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)

#: What happened to the run itself: start, restart, close, error, note.
EVENTS = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("time", pa.float64(), nullable=False),
        pa.field("event", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
    ]
)

#: The tables as rows are given to `LogWriter`, which adds what `_WRITTEN` names. Format version 1 was this.
GIVEN: dict[str, pa.Schema] = {"stats": STATS, "values": VALUES, "scalars": SCALARS, "events": EVENTS}

#: Which start of the training wrote the row: 0, and one more with each resume.
_SESSION = pa.field("session", pa.int32(), nullable=False)
#: The captured step's ordinal within session and writer, from 0. Null in logs of format version 1.
_CAPTURE = pa.field("capture", pa.int64())
_WRITTEN = {"stats": [_SESSION, _CAPTURE], "values": [_SESSION], "scalars": [_SESSION], "events": [_SESSION]}

#: The tables of a log.
TABLES: dict[str, pa.Schema] = {name: pa.schema([*schema, *_WRITTEN[name]]) for name, schema in GIVEN.items()}

#: How many captures a row of each roll-up level holds.
FACTORS = (16, 256, 4096, 65536)

#: Several captures of one tensor in one row; step, time and capture are those of the first.
ROLLUP = pa.schema(
    [
        *TABLES["stats"],
        pa.field("last_step", pa.int64(), nullable=False),
        pa.field("sum_sq_min", pa.float64(), nullable=False),  # of one capture
        pa.field("sum_sq_max", pa.float64(), nullable=False),
        pa.field("ratio_sq_max", pa.float64()),  # sum_sq / ref_sum_sq of one capture
    ]
)


def rollup_table(factor: int) -> str:
    """The name of a roll-up level's table, and of its folder."""
    return f"rollup{factor}"


ROLLUPS = tuple(rollup_table(factor) for factor in FACTORS)

#: Every table, by the name of its folder.
SCHEMAS: dict[str, pa.Schema] = {**TABLES, **dict.fromkeys(ROLLUPS, ROLLUP)}

_BY_TENSOR = [(name, "ascending") for name in ("kind", "tensor", "session", "step")]
#: The order of rows inside a Parquet part. Kind first: most questions are about one kind of all tensors.
SORT_KEYS: dict[str, list[tuple[str, str]]] = {
    "stats": _BY_TENSOR,
    "values": _BY_TENSOR,
    "scalars": [(name, "ascending") for name in ("name", "session", "step", "time")],
    "events": [("time", "ascending")],
    **dict.fromkeys(ROLLUPS, _BY_TENSOR),
}

Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)


def upgrade(rows: Rows, name: str) -> Rows:
    """Rows of format version 1, or as they are given to the writer, in today's schema of this table."""
    for field in _WRITTEN.get(name, []):
        if field.name not in rows.schema.names:
            empty = pa.nulls(rows.num_rows, field.type)
            rows = rows.append_column(field, empty if field.nullable else empty.fill_null(0))
    return rows
