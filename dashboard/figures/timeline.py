"""What happened to a run over its steps: one lane a kind, a bar for what lasted, a mark for what did not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..happenings import FINDINGS, KINDS, TONES, Happening
from ..text import integer
from .base import step_axis
from .theme import Figure, Style, message, wrap

#: More marks than this in a lane lie on top of each other anyway.
MOST = 400
LANE = 30  # pixels


def height(lanes: int) -> int:
    """Pixels for so many lanes."""
    return 64 + LANE * max(lanes, 2)


def lanes(found: Sequence[Happening]) -> list[str]:
    """The kinds that occur, from the top."""
    present = {h.kind for h in found}
    return [kind for kind in KINDS if kind in present]


def timeline(
    found: Sequence[Happening], last_step: int, style: Style, steps: tuple[float, float] | None = None
) -> Figure:
    """All happenings by kind and step."""
    placed = [h for h in found if h.first >= 0]
    kinds = lanes(placed)
    if not kinds:
        return message("Nothing happened to this run that was worth a note.", style)
    traces = [
        _lane(kind, [h for h in placed if h.kind == kind], -row, style) for row, kind in enumerate(kinds)
    ]
    end = max([last_step, *(h.last for h in placed), 1])
    axis = step_axis(steps, [])
    if not steps:
        axis |= {"range": [-0.01 * end, 1.01 * end]}
    names = [KINDS[kind] for kind in kinds]
    return {
        "data": traces,
        "layout": {
            "showlegend": False,
            "hovermode": "closest",
            "xaxis": axis,
            "yaxis": {
                "tickvals": [-row for row in range(len(kinds))],
                "ticktext": names,
                "range": [-len(kinds) + 0.4, 0.6],
                "fixedrange": True,
                "zeroline": False,
                "title": {"text": ""},
            },
        },
    }


def _lane(kind: str, found: list[Happening], row: int, style: Style) -> dict[str, Any]:
    """One trace: a segment for each happening, interrupted between them."""
    found = sorted(found, key=lambda h: (h.first, h.last))
    if len(found) > MOST:
        found = [found[i] for i in np.unique(np.linspace(0, len(found) - 1, MOST).round().astype(int))]
    color = _color(kind, style)
    x: list[int | None] = []
    said: list[list[str] | None] = []
    for h in found:
        span = integer(h.first) + (f" – {integer(h.last)}" if h.last > h.first else "")
        text = [h.title.replace("<", "&lt;"), span, wrap(h.text, 64)]
        x += [h.first, h.last, None]
        said += [text, text, None]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": KINDS[kind],
        "x": x[:-1],
        "y": [None if at is None else row for at in x[:-1]],
        "customdata": said[:-1],
        "line": {"color": color, "width": 7 if kind in FINDINGS else 5},
        "marker": {"color": color, "size": 9, "symbol": "square" if kind == "restart" else "circle"},
        "hovertemplate": "<b>%{customdata[0]}</b><br>step %{customdata[1]}<br>%{customdata[2]}"
        "<extra></extra>",
        "connectgaps": False,
        "cliponaxis": True,
    }


def _color(kind: str, style: Style) -> str:
    p = style.palette
    own = {"restart": p.accent, "checkpoint": p.good, "note": p.info, "alert": p.accent}
    return own.get(kind) or p.severity(kind if kind in FINDINGS else TONES.get(kind, ""))
