"""Names from a log as plain text: Plotly reads tags such as <a href> and <b> in most of its texts."""

from __future__ import annotations

from typing import Any

from ..text import short
from .theme import Figure

LONGEST = 80  # characters of a name in a legend or at an axis


def safe(text: str) -> str:
    """A text that Plotly shows as it is."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def escaped(figure: Figure) -> Figure:
    """The figure with the names of its traces, and of what stands at its axes, as plain text of a bounded
    length. A trace whose name was changed keeps the true one in `meta.name`."""
    layout = figure["layout"]
    aliases: dict[str, dict[str, str]] = {}
    data = []
    for trace in figure["data"]:
        for letter in "xy":
            names = trace.get(letter)
            if isinstance(names, (list, tuple)):
                axis = f"{letter}axis{str(trace.get(f'{letter}axis', letter))[1:]}"
                known = (layout.get(axis) or {}).get("labelalias") or {}
                aliases.setdefault(axis, {}).update(_aliases(names, known))
        data.append(_named(trace))
    axes = {
        axis: {
            **(layout.get(axis) or {}),
            "labelalias": {**((layout.get(axis) or {}).get("labelalias") or {}), **new},
        }
        for axis, new in aliases.items()
        if new
    }
    return {**figure, "data": data, "layout": {**layout, **axes}}


def _named(trace: dict[str, Any]) -> dict[str, Any]:
    name = trace.get("name")
    shown = safe(short(name, LONGEST)) if isinstance(name, str) else name
    if shown == name:
        return trace
    return {**trace, "name": shown, "meta": {**(trace.get("meta") or {}), "name": name}}


def _aliases(names: list[Any] | tuple[Any, ...], known: dict[str, str]) -> dict[str, str]:
    """What to write instead of the names that are too long or hold marks."""
    found = {}
    for name in names:
        if not isinstance(name, str):
            return {}
        shown = safe(known.get(name, short(name, LONGEST)))
        if shown != known.get(name, name):
            found[name] = shown
    return found
