"""The columns of the table of runs: which there are, how they look, which of them a link shows and sorts."""

from __future__ import annotations

from typing import Any

from ..figures.theme import Style
from ..rows import PREFIX, Row
from ..urls import View

#: What can be shown of a run besides its name.
COLUMNS = {
    "rank": "Health",
    "finding": "Worst finding",
    "owner": "Owner",
    "step": "Step",
    "updated": "Age",
    "train": "Train",
    "val": "Val",
    "gap": "Gap",
    "drift": "Largest drift",
    "model": "Model",
    "tags": "Tags",
    "note": "Note",
}
#: Shown only when asked for: tags and the note are below the run's name.
AT_WISH = ("model", "tags", "note")
ON_A_PHONE = ["rank", "val"]
NUMBER: dict[str, Any] = {
    "type": "rightAligned",
    "filter": "agNumberColumnFilter",
    "cellClass": "figure",
    "valueFormatter": {"function": "params.data.texts[params.colDef.field]"},
    "comparator": {"function": "layerwatchNumbers"},
}
LOOKS: dict[str, dict[str, Any]] = {
    "rank": {"cellRenderer": "Health", "width": 90, "filter": False, "sortingOrder": ["desc", "asc", None]},
    "finding": {"minWidth": 140, "flex": 2, "tooltipField": "finding"},
    "owner": {"width": 78, "suppressHeaderMenuButton": True, "suppressHeaderFilterButton": True},
    "step": NUMBER | {"cellRenderer": "Progress", "width": 108},
    "updated": {
        "cellRenderer": "Age",
        "width": 76,
        "filter": False,
        "comparator": {"function": "layerwatchNumbers"},
        "sortingOrder": ["desc", "asc", None],
    },
    "train": NUMBER | {"width": 78},
    "val": NUMBER | {"width": 78},
    "gap": NUMBER | {"width": 84},
    "model": {"width": 130, "tooltipField": "model"},
    "note": {"width": 200, "tooltipField": "note"},
    "drift": NUMBER | {"cellRenderer": "Drift", "width": 134, "type": None, "cellClass": ""},
    "tags": {
        "cellRenderer": "Tags",
        "width": 150,
        "valueFormatter": {"function": "params.value.join(', ')"},
        "filterValueGetter": {"function": "params.data.tags.join(', ')"},
    },
}


def columns_of(view: View, rows: list[Row], style: Style) -> list[str]:
    """The columns of a link. Else most, owners where there are several; on a phone there is room for few."""
    if "columns" not in view.params:
        owned = len({row["owner"] for row in rows}) > 1  # a column more, so another one less
        left_out = (*AT_WISH, "train") if owned else (*AT_WISH, "owner")
        return ON_A_PHONE if style.narrow else [key for key in COLUMNS if key not in left_out]
    asked = [name for name in view.params["columns"].split(",") if name]
    return [name for name in asked if name in COLUMNS or name.startswith(PREFIX)]


def configured(names: list[str]) -> list[str]:
    return [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]


def column_defs(
    view: View, settings: dict[str, bool], shown: list[str], style: Style
) -> list[dict[str, Any]]:
    """All columns, those that are not asked for hidden, sorted as the link says.

    Args:
        settings: see `rows.config_names`. shown: see `columns_of`.
    """
    star = {
        "colId": "pin",
        "headerName": "Pinned",
        "headerClass": "unseen-head",
        "cellRenderer": "Star",
        "width": 34,
        "sortable": False,
        "filter": False,
        "resizable": False,
        "cellClass": "star-cell",
    }
    run = {"field": "run", "headerName": "Run", "cellRenderer": "RunLink", "flex": 2}
    run["minWidth"] = 98 if style.narrow else 160
    own = [{"field": key, "headerName": word, **LOOKS[key]} for key, word in COLUMNS.items()]
    names = dict.fromkeys([*settings, *configured(shown)])
    more = [
        {"field": PREFIX + name, "headerName": name, "width": 130, **_kind(settings.get(name, False))}
        for name in names
    ]
    order = sorting(view)
    for definition in (run, *own, *more):
        field = definition["field"]
        definition["hide"] = field != "run" and field not in shown
        if style.narrow and "width" in definition:
            definition["width"] -= 8  # so is the padding of its cells
        if field in order:
            definition |= {"sort": order[field], "sortIndex": list(order).index(field)}
    return [star, run, *own, *more]


def _kind(numbers: bool) -> dict[str, Any]:
    """A column of numbers is filtered and aligned as numbers."""
    if numbers:
        looks = {"type": "rightAligned", "filter": "agNumberColumnFilter", "cellClass": "figure"}
        return looks | {"comparator": {"function": "layerwatchNumbers"}}
    return {"valueFormatter": {"function": "layerwatchSetting(params.value)"}}


def sorting(view: View) -> dict[str, str]:
    """Field -> "asc" or "desc", from a link such as sort=rank:desc,step:asc."""
    pairs = [part.rpartition(":") for part in view.params.get("sort", "").split(",") if part]
    return {field: way for field, _, way in pairs if field and way in ("asc", "desc")}
