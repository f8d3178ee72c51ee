"""The data of a plot as CSV or Parquet: the plot is drawn with the reader's choices, and read as a table."""

from __future__ import annotations

import io
import json
import re
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from flask import Flask, Response, jsonify, request

from .. import __version__
from .figures.table import STEP, table_of
from .pages import PAGES
from .plots import Plot, draw

if TYPE_CHECKING:
    from .queries import Library

PATH = "/api/data"
TYPES = {"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet"}


def register(server: Flask, library: Library) -> None:
    """`POST /api/data`, a JSON object of plot, format (csv, parquet), run, state (control -> value), screen.

    A page of another site cannot ask it: see `security.same_site`.
    """
    known = {plot.id: plot for page in PAGES.values() for plot in page.PLOTS}

    @server.post(PATH)
    def data() -> Response | tuple[Response, int]:
        asked = request.get_json()
        if not isinstance(asked, dict) or asked.get("format") not in TYPES:
            return jsonify({"error": "Expected an object with a format, csv or parquet."}), 400
        plot, run = known.get(str(asked.get("plot"))), str(asked.get("run") or "")
        if plot is None or run not in library.runs():
            return jsonify({"error": "There is no such plot, or no such run."}), 404
        state = {str(key): value for key, value in _object(asked.get("state")).items()}
        table, said = table_for(plot, library, run, state, _object(asked.get("screen")))
        if said:
            return jsonify({"error": said}), 422
        about = {"run": run, "plot": plot.id, "state": state, "layerwatch": __version__}
        answer = Response(encoded(table, asked["format"], about), content_type=TYPES[asked["format"]])
        answer.headers["Content-Disposition"] = (
            f"attachment; filename={file_name(run, plot.id)}.{asked['format']}"
        )
        answer.headers["Cache-Control"] = "no-store"
        return answer


def table_for(
    plot: Plot, library: Library, run: str, state: dict[str, Any], screen: dict[str, Any]
) -> tuple[pd.DataFrame, str]:
    """What a plot shows; and the words that it shows instead when there is nothing.

    There is always a column of steps; on another step axis that one comes beside it.
    """
    figures = []
    axis = str(state.get("axis") or STEP)
    for choice in dict.fromkeys([STEP, STEP if axis == "log" else axis]):
        chosen = {**state, "axis": choice}
        values = [None if chosen.get(key) == "" else chosen.get(key) for key in plot.controls]
        figures.append(draw(plot, library, {"run": run}, screen, values))
    said = figures[0]["layout"].get("meta", {}).get("said", "")
    table = table_of(figures[0])
    if len(figures) == 2 and STEP in table:
        other = table_of(figures[1])
        times = [name for name in other.columns if name not in table.columns]
        if len(times) == 1 and len(other) == len(table):
            table.insert(list(table.columns).index(STEP) + 1, times[0], other[times[0]])
    return table, said


def encoded(table: pd.DataFrame, form: str, about: dict[str, Any]) -> bytes:
    """The bytes of the file. Parquet also says where it comes from."""
    if form == "csv":
        return table.to_csv(index=False).encode()
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    own = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    sink = io.BytesIO()
    pq.write_table(arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), **own}), sink)
    return sink.getvalue()


def file_name(run: str, plot: str) -> str:
    """Letters, digits, dots, dashes: whatever the run is called."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{run}-{plot}")[-120:].strip("-.")


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
