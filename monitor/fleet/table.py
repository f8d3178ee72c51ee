"""The scan table: one row a run, a Parquet file beside the runs or anywhere else."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import RunError, StoreError
from ..store import parted, store_of

#: The table's name in the folder of the runs.
TABLE = "layerwatch-scan.parquet"
#: Written to every table. A newer one is refused; an older one is read, and its rows are made anew.
VERSION = 1
#: Worst first. `unknown`: the detectors failed; `unreadable`: the run could not be read, see `error`.
HEALTHS = ("critical", "warning", "unreadable", "unknown", "healthy")

FINDING = pa.struct(
    [
        pa.field("problem", pa.string()),
        pa.field("severity", pa.string()),
        pa.field("first_step", pa.int64()),
        pa.field("last_step", pa.int64()),
        pa.field("layers", pa.list_(pa.string())),  # worst first, eight at most
        pa.field("summary", pa.string()),
        pa.field("advice", pa.string()),
        # unix seconds of the scan that found it first, or found it more severe than ever before; of the first
        # scan of all, when the run wrote last
        pa.field("noticed", pa.float64()),
    ]
)
SCALAR = pa.struct(
    [
        pa.field("name", pa.string()),
        pa.field("last", pa.float64()),
        pa.field("best", pa.float64()),  # null where nobody knows what is better
        pa.field("best_step", pa.int64()),
    ]
)
#: Relative L2 distance from the reference of all tensors of a block together, at the last capture.
BLOCK = pa.struct(
    [
        pa.field("block", pa.string()),
        pa.field("relative_l2", pa.float64()),
        pa.field("tensors", pa.int32()),
    ]
)
#: What the training itself has told, by its events `alert`: `alerts.records.alerted(run.events())`.
ALERTED = pa.struct(
    [
        pa.field("problem", pa.string()),
        pa.field("severity", pa.string()),
        pa.field("channel", pa.string()),
        pa.field("time", pa.float64()),
    ]
)
#: Times are unix seconds. A null means that it is not known.
COLUMNS = pa.schema(
    [
        pa.field("run", pa.string(), nullable=False),  # the path below the root, as it is shown
        pa.field("url", pa.string(), nullable=False),  # what `Run` opens
        pa.field("id", pa.string()),  # of the training: the same in copies of its folder
        pa.field("copy_of", pa.string()),  # another run of this table with the same id
        pa.field("created", pa.float64()),
        pa.field("ended", pa.float64()),
        pa.field("wrote", pa.float64()),  # the newest file, by the clock of the store
        # when it was last seen to write, by the clock of who scans: scanned - heard is how long it is silent
        pa.field("heard", pa.float64()),
        pa.field("closed", pa.bool_(), nullable=False),
        pa.field("live", pa.bool_(), nullable=False),  # a process was writing when it was scanned
        pa.field("owner", pa.string()),
        pa.field("tags", pa.list_(pa.string()), nullable=False),
        pa.field("note", pa.string()),
        pa.field("model", pa.string()),
        pa.field("host", pa.string()),
        pa.field("world", pa.int32()),  # processes that wrote it together
        pa.field("git_commit", pa.string()),
        pa.field("layerwatch", pa.string()),  # the version that wrote it
        pa.field("config", pa.string()),  # JSON, one level: {"optimizer.lr": 0.1}
        pa.field("steps", pa.int64()),
        pa.field("tensors", pa.int32()),
        pa.field("parameters", pa.int64()),
        pa.field("health", pa.string(), nullable=False),  # one of HEALTHS
        pa.field("problem", pa.string()),  # the code of the worst finding that is an alarm
        pa.field("alarms", pa.int32(), nullable=False),
        pa.field("findings", pa.list_(FINDING), nullable=False),
        pa.field("notes", pa.list_(pa.string()), nullable=False),  # what could not be judged; damaged files
        pa.field("damaged", pa.list_(pa.string()), nullable=False),  # its files, what is wrong with each
        pa.field("scalars", pa.list_(SCALAR), nullable=False),
        pa.field("train_loss", pa.float64()),  # the last one, under whichever of the usual names
        pa.field("val_loss", pa.float64()),
        pa.field("gap", pa.float64()),  # validation minus training loss at the last validation
        pa.field("drift", pa.float64()),  # the largest relative L2 distance of a tensor at the last capture
        pa.field("drift_layer", pa.string()),
        pa.field("blocks", pa.list_(BLOCK), nullable=False),
        pa.field("cost", pa.float64()),  # the share of the training's time that monitoring took
        pa.field("bytes", pa.int64()),  # of the log
        pa.field("alerts", pa.list_(pa.string())),  # names of the channels that the training itself tells
        pa.field("alerted", pa.list_(ALERTED)),
        pa.field("error", pa.string()),  # why it could not be read
        pa.field("health_before", pa.string()),  # at the scan before; null: it was not there
        pa.field("worse", pa.float64()),  # the scan at which its health last became worse; null: never
        pa.field("scanned", pa.float64(), nullable=False),  # when it was read; unchanged ones are not again
        pa.field("seconds", pa.float64()),  # what reading it took
        pa.field("key", pa.string()),  # the state of its files, and of what judges it
    ]
)


def unknown() -> dict[str, Any]:
    """A row of which nothing is known."""
    return {field.name: [] if pa.types.is_list(field.type) else None for field in COLUMNS}


class NoTableError(RunError):
    """There is no table."""


class DamagedTableError(RunError):
    """A file is no table, or cannot be read as one."""


@dataclass(frozen=True)
class ScanTable:
    """What a scan found.

    Attributes:
        root: what was scanned. rows: a dictionary by the names of COLUMNS for each run, newest first.
        scanned: unix seconds of this scan; before: of the one it was compared with, None of the first.
        notes: what is wrong with the scan as a whole.
    """

    root: str
    rows: list[dict[str, Any]]
    scanned: float
    before: float | None = None
    notes: list[str] = field(default_factory=list)

    def to_arrow(self) -> pa.Table:
        """The rows as a table of COLUMNS."""
        about = {
            "version": VERSION, "root": self.root, "scanned": self.scanned, "before": self.before,
            "notes": self.notes,
        }  # fmt: skip
        schema = COLUMNS.with_metadata({"layerwatch_scan": json.dumps(about)})
        return pa.Table.from_pylist(self.rows, schema)

    def to_pandas(self) -> Any:
        """The rows as a data frame."""
        return self.to_arrow().to_pandas()


def write_table(table: ScanTable, path: str | Path) -> None:
    """Write it whole to a file or a URL: a reader sees the old one or the new one.

    Raises:
        RunError: it cannot be written there.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table.to_arrow(), sink, compression="zstd")
    folder, name = parted(path)
    store_of(folder).put(name, sink.getvalue().to_pybytes())


def read_table(path: str | Path) -> ScanTable:
    """Read it again.

    Raises:
        NoTableError: there is none. DamagedTableError: it is no scan table. RunError: a newer layerwatch
            wrote it. StoreError: its object store cannot be read.
    """
    folder, name = parted(path)
    try:
        found = pq.read_table(pa.BufferReader(store_of(folder).read(name)))
        about = json.loads((found.schema.metadata or {})[b"layerwatch_scan"])
        version, scanned = int(about["version"]), float(about["scanned"])
    except StoreError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise NoTableError(
            f"expected a scan table, but {path} does not exist: make one with `layerwatch scan`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DamagedTableError(
            f"expected a scan table, but {path} is none ({type(error).__name__}): "
            "give the file that `layerwatch scan --out` has written, or scan again"
        ) from None
    if version > VERSION:
        raise RunError(f"{path} has version {version}, this layerwatch reads up to {VERSION}: upgrade it")
    known = [column for column in COLUMNS.names if column in found.column_names]
    absent = {column: value for column, value in unknown().items() if column not in known}
    rows = [absent | row for row in found.select(known).to_pylist()]
    return ScanTable(str(about["root"]), rows, scanned, about.get("before"), list(about.get("notes") or ()))
