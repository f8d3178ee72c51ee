"""The table of all runs, the worst first when asked."""

from __future__ import annotations

import time
from typing import Any

import dash_ag_grid as dag
import numpy as np
from dash import Dash, Input, Output, html, no_update

from ...monitor import Run, RunError
from ..components import card, code, notice
from ..figures.loss import gap
from ..figures.theme import Style
from ..plots import Plot
from ..queries import Library
from ..text import age, integer, number, words
from ..urls import View, href

PLOTS: tuple[Plot, ...] = ()
RANK = {"critical": 3, "warning": 2, "checking": 1, "unknown": 1, "healthy": 0}

FIRST_RUN = """from layerwatch import watch

watcher = watch(model, optimizer, run="runs/exp1")
# in the loop: loss.backward(); optimizer.step(); optimizer.zero_grad()
watcher.log(train_loss=loss)"""


def layout(view: View, library: Library, style: Style) -> list[Any]:
    """The table, or how to make a first run."""
    names = library.runs()
    broken = library.broken()
    parts: list[Any] = []
    if not names:
        text = [
            html.P(
                f"There is no run in {library.root} yet. These lines write one; it appears here by itself:"
            ),
            code(FIRST_RUN),
            html.P("Or train five small example runs with `layerwatch demo`."),
        ]
        parts.append(notice("No runs yet", text))
    explain = "Click a name to open a run. Health is the worst finding; click a heading to sort by it."
    grid = card(f"{len(names)} run{'' if len(names) == 1 else 's'}", explain, _grid(library, style))
    parts.append(html.Div(grid, className="" if names else "hidden", id="runs-card"))
    if broken:
        rows = [html.Li([html.B(name), ": ", reason]) for name, reason in broken.items()]
        parts.append(notice("Folders that cannot be read", html.Ul(rows), "warning"))
    return parts


def _grid(library: Library, style: Style) -> dag.AgGrid:
    rows = table(library)
    right = {"type": "rightAligned", "filter": "agNumberColumnFilter", "cellClass": "figure"}
    columns = [
        {
            "field": "run",
            "headerName": "Run",
            "cellRenderer": "RunLink",
            "minWidth": 190,
            "flex": 2,
            "pinned": None,
        },
        {"field": "rank", "headerName": "Health", "cellRenderer": "Health", "width": 112, "filter": False},
        {"field": "finding", "headerName": "Worst finding", "minWidth": 190, "flex": 2},
        right | {"field": "step", "headerName": "Last step", "width": 122, "valueFormatter": _shown("step")},
        {
            "field": "seconds",
            "headerName": "Age",
            "width": 118,
            "valueFormatter": _shown("seconds"),
            "filter": False,
        },
        right
        | {"field": "train", "headerName": "Train loss", "width": 126, "valueFormatter": _shown("train")},
        right | {"field": "val", "headerName": "Val loss", "width": 118, "valueFormatter": _shown("val")},
        right | {"field": "gap", "headerName": "Gap", "width": 100, "valueFormatter": _shown("gap")},
    ]
    return dag.AgGrid(
        id="runs-grid",
        rowData=rows,
        columnDefs=columns,
        defaultColDef={
            "sortable": True,
            "filter": True,
            "resizable": True,
            "suppressHeaderMenuButton": False,
        },
        getRowId="params.data.run",
        dashGridOptions={
            "domLayout": "autoHeight" if len(rows) <= 60 else "normal",
            "theme": {"function": "layerwatchGridTheme(themeQuartz)"},
            "suppressCellFocus": True,
            "rowHeight": 40,
            "headerHeight": 38,
            "enableCellTextSelection": True,
            "animateRows": False,
        },
        style={"height": None if len(rows) <= 60 else "78vh"},
        className="runs-grid",
        dangerously_allow_code=False,
    )


def _shown(field: str) -> dict[str, str]:
    """Sort by the number, show its text: the texts of a row are in `texts`."""
    return {"function": f"params.data.texts.{field}"}


def table(library: Library) -> list[dict[str, Any]]:
    """One row a run, for the grid; `texts` holds what is shown where the value itself is for sorting."""
    return [row(library, name, run) for name, run in library.runs().items()]


def row(library: Library, name: str, run: Run) -> dict[str, Any]:
    """The table's line for one run. A run that cannot be read any more says so."""
    try:
        library.run(name)
        judged = library.judgement(name, wait=0.05)
        train, val = run.scalars("train_loss"), run.scalars("val_loss")
        gaps = gap(train, val)["gap"].to_numpy()
        step = run.last_step
    except (RunError, OSError) as error:
        return _broken(name, str(error))
    health = judged.health if judged else "checking"
    worst = judged.alarms[0] if judged and judged.alarms else None
    more = f" +{len(judged.alarms) - 1}" if judged and len(judged.alarms) > 1 else ""
    numbers = {
        "train": _last(train["value"].to_numpy()),
        "val": _last(val["value"].to_numpy()),
        "gap": _last(gaps),
    }
    if not all(value is None or np.isfinite(value) for value in numbers.values()):
        numbers["gap"] = None  # between numbers only
    seconds = time.time() - float(run.info.get("ended") or run.info.get("created") or time.time())
    return {
        "run": name,
        "href": href("overview", name),
        "health": health,
        "rank": RANK.get(health, 0),
        "live": run.live,
        "finding": words(worst.problem) + more if worst else ("" if health != "checking" else "checking"),
        "step": step,
        "seconds": seconds,
        **{
            key: value if value is not None and np.isfinite(value) else None for key, value in numbers.items()
        },
        "texts": {
            "step": integer(step) if step >= 0 else number(None),
            "seconds": "live" if run.live else age(time.time() - seconds),
            **{key: number(value) for key, value in numbers.items()},
        },
    }


def _broken(name: str, reason: str) -> dict[str, Any]:
    texts = dict.fromkeys(("step", "seconds", "train", "val", "gap"), number(None))
    blank = dict.fromkeys(("step", "seconds", "train", "val", "gap"))
    head = {"run": name, "href": href("overview", name), "health": "unknown", "rank": 1, "live": False}
    return head | {"finding": reason} | blank | {"texts": texts}


def _last(values: np.ndarray) -> float | None:
    return float(values[-1]) if len(values) else None


def register(app: Dash, library: Library) -> None:
    """The rows follow the folder; the grid itself stays."""

    @app.callback(
        Output("runs-grid", "rowData"),
        Output("runs-card", "className"),
        Input("pulse", "data"),
        Input("verdict", "data"),
        prevent_initial_call=True,
    )
    def rows(_pulse: Any, _verdict: Any) -> tuple[Any, Any]:
        found = table(library)
        return found, ("" if found else no_update)
