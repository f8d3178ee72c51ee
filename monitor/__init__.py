"""The log and what it means: numpy, pandas and pyarrow only. Imports neither torch nor dash."""

from .compact import compact
from .errors import RunError, RunExistsError, StoreError, WeightsError
from .export import export, tidy
from .findings import SEVERITIES, Finding, find
from .log import LogWriter
from .run import Run
from .runs import open_runs, scan_runs
from .schema import KINDS, SCHEMA_VERSION
from .summary import Summary, bucket_edges, merge, quantiles, summarise

__all__ = [
    "KINDS",
    "SCHEMA_VERSION",
    "SEVERITIES",
    "Finding",
    "LogWriter",
    "Run",
    "RunError",
    "RunExistsError",
    "StoreError",
    "Summary",
    "WeightsError",
    "bucket_edges",
    "compact",
    "export",
    "find",
    "merge",
    "open_runs",
    "quantiles",
    "scan_runs",
    "summarise",
    "tidy",
]
