"""Many runs: each one read into one row of a table, by one process, several, or a cluster."""

from .keeping import NotKeptError, look, scan_and_keep, table_of
from .reading import scan_run
from .scanning import scan, worsened
from .table import COLUMNS, TABLE, ScanTable, read_table, write_table

__all__ = [
    "COLUMNS",
    "TABLE",
    "NotKeptError",
    "ScanTable",
    "look",
    "read_table",
    "scan",
    "scan_and_keep",
    "scan_run",
    "table_of",
    "worsened",
    "write_table",
]
