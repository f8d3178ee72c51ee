"""The other ways to lay out a step axis: logarithmic, time since the start, time of day.

Figures speak in steps. `shown` converts a finished one: every axis that `base.step_axis` marked, with its
traces, shapes, annotations and ranges. It also says in `layout.meta` which axes those are, and how assets/
zoom.js finds the steps of a drag.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .base import STEPS
from .theme import Figure

AXES = {"step": "Step", "log": "Log step", "relative": "Relative time", "wall": "Wall time"}
#: Seconds of a unit, its sign, and up to how many seconds on screen it is used.
UNITS = ((1.0, "s", 180.0), (60.0, "min", 3 * 3600.0), (3600.0, "h", 3 * 86400.0), (86400.0, "d", math.inf))
KNOTS = 64  # at most so many points of the clock go to the browser, on screen and in all
LEAST = 0.5  # where a logarithmic axis shows step 0
STEP_X = re.compile(r"step %\{x:,d\}")

Convert = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Clock:
    """When the steps of a run were taken: `seconds` since 1970 at increasing `steps`, never decreasing."""

    steps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    seconds: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @staticmethod
    def of(steps: np.ndarray, seconds: np.ndarray) -> Clock:
        """From pairs in any order. A step that was taken again after a restart counts when it came last."""
        steps, seconds = (np.asarray(part, dtype=np.float64) for part in (steps, seconds))
        finite = np.isfinite(steps) & np.isfinite(seconds)
        steps, seconds = steps[finite], seconds[finite]
        order = np.lexsort((seconds, steps))
        steps, seconds = steps[order], seconds[order]
        last = np.append(np.diff(steps) > 0, True)[: len(steps)]
        return Clock(steps[last], np.maximum.accumulate(seconds[last]) if len(steps) else seconds)

    @property
    def runs(self) -> bool:
        """Whether it can say how time passes: two steps at two times."""
        return len(self.steps) > 1 and bool(self.seconds[-1] > self.seconds[0])

    def at(self, steps: np.ndarray) -> np.ndarray:
        """Seconds since 1970; outside of the known steps at the run's mean pace."""
        pace = (self.seconds[-1] - self.seconds[0]) / (self.steps[-1] - self.steps[0])
        first, last = self.steps[0], self.steps[-1]
        inside = np.interp(steps, self.steps, self.seconds)
        return inside + pace * (np.maximum(steps - last, 0) + np.minimum(steps - first, 0))

    def knots(self, window: tuple[float, float] | None) -> np.ndarray:
        """Steps that describe it: all of a short run, else some in all and some on screen.

        They are multiples of a power of two from the start, so that few change while the run grows.
        """
        count = len(self.steps)
        low, high = (np.searchsorted(self.steps, window) if window else (0, count)) if count else (0, 0)
        parts = [_spread(0, count), _spread(max(int(low) - 1, 0), min(int(high) + 1, count))]
        return self.steps[np.unique(np.concatenate(parts))]


def _spread(low: int, high: int) -> np.ndarray:
    width = 1
    while (high - low) / width > KNOTS:
        width *= 2
    return np.append(np.arange(-(-low // width) * width, high, width), [low, high - 1] if high > low else [])


def shown(
    figure: Figure,
    axis: str,
    clock: Clock,
    window: tuple[float, float] | None = None,
    clocks: Mapping[str, Clock] | None = None,
) -> Figure:
    """The same figure with its step axes laid out as `axis` says, one of AXES; steps when time is unknown.

    Args:
        clock: of the page's run; `window` is the step range on screen.
        clocks: of other runs, whose traces say so: {"meta": {"run": name}}.
    """
    layout = figure["layout"]
    keys = [
        key for key, part in layout.items() if key.startswith("xaxis") and part.get("uirevision") == STEPS
    ]
    for key in keys:
        layout[key] = {name: value for name, value in layout[key].items() if name != "uirevision"}
    if not keys:
        return figure
    figure = {**figure, "data": [_quiet(trace) for trace in figure["data"]]}
    axis = axis if axis in AXES and (axis in ("step", "log") or clock.runs) else "step"
    meta: dict[str, Any] = {**layout.get("meta", {}), "axis": axis, "steps": keys}
    if axis != "step":
        style, convert = _manner(axis, clock, window)
        others = {
            name: _manner(axis, other, window, clock)[1]
            for name, other in (clocks or {}).items()
            if other.runs
        }
        if axis != "log":
            knots = clock.knots(window)
            meta["clock"] = {"steps": knots.tolist(), "values": convert(knots).tolist()}
        figure = {
            "data": [_trace(trace, keys, convert, others) for trace in figure["data"]],
            "layout": layout,
        }
        _relayout(layout, keys, style, convert)
    layout["meta"] = meta
    return figure


def _manner(
    axis: str, clock: Clock, window: tuple[float, float] | None, page: Clock | None = None
) -> tuple[dict[str, Any], Convert]:
    """The axis' own attributes, and the way from steps to its values. All runs take the page's unit."""
    if axis == "log":
        style = {
            "type": "log",
            "title": "optimizer step",
            "hoverformat": ",.4~r",
            "tickformat": ",.4~r",
            "dtick": 1,
        }
        return style, lambda steps: np.maximum(steps, LEAST)
    if axis == "wall":
        # Numbers on a date axis are milliseconds since 1970; Plotly shows them in the reader's own time zone.
        style = {"type": "date", "title": "time", "hoverformat": "%-d %b %Y, %H:%M:%S", "tickformat": ""}
        return style, lambda steps: np.round(clock.at(steps) * 1000)
    judge = page or clock
    ends = judge.at(np.array(window)) if window else judge.seconds[[0, -1]]
    size, sign, _ = next(unit for unit in UNITS if ends[1] - ends[0] < unit[2])
    style = {
        "title": "time since the start",
        "hoverformat": ".5~r",
        "tickformat": "~r",
        "ticksuffix": f" {sign}",
    }
    start = clock.seconds[0]
    return style, lambda steps: np.round((clock.at(steps) - start) / size, 6)


def _quiet(trace: dict[str, Any]) -> dict[str, Any]:
    """A heat map whose texts assets/hover.js makes of its `meta`."""
    meta = trace.get("meta")
    if trace.get("type") != "heatmap" or not isinstance(meta, dict) or not {"factor", "says"} & set(meta):
        return trace
    return {key: value for key, value in trace.items() if key != "hovertemplate"} | {"hoverinfo": "none"}


def _trace(
    trace: dict[str, Any], keys: list[str], convert: Convert, others: Mapping[str, Convert]
) -> dict[str, Any]:
    """A trace on one of the axes, converted; any other as it is."""
    if "xaxis" + str(trace.get("xaxis", "x"))[1:] not in keys:
        return trace
    own = trace.get("meta") if isinstance(trace.get("meta"), dict) else {}
    convert = others.get(str((own or {}).get("run", "")), convert)
    new = {**trace, "x": _list(trace["x"], convert)}
    if trace.get("type") == "heatmap":
        new["meta"] = {**(own or {}), "steps": list(trace["x"])}
    if isinstance(trace.get("hovertemplate"), str):
        new["hovertemplate"] = STEP_X.sub("%{x}", trace["hovertemplate"])
    return new


def _list(values: Any, convert: Convert) -> list[float | None]:
    """Converted, None where there was none."""
    steps = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    return [None if math.isnan(value) else value for value in convert(steps).tolist()]


def _relayout(layout: dict[str, Any], keys: list[str], style: dict[str, Any], convert: Convert) -> None:
    """Axes, and the shapes and annotations on them."""
    log = style.get("type") == "log"
    names = {"x" + key.removeprefix("xaxis") for key in keys}

    def ends(values: Any) -> list[float | None]:
        found = _list(values, convert)
        return [math.log10(value) if value else value for value in found] if log else found

    for key in keys:
        axis = {
            name: value
            for name, value in layout[key].items()
            if name not in ("tick0", "tickvals", "ticktext")
        }
        title = dict(axis.get("title", {}))
        axis |= {name: value for name, value in style.items() if name != "title"}
        axis["title"] = {**title, "text": style["title"] if title.get("text") else ""}
        if "range" in axis:
            axis["range"] = ends(axis["range"])
        clip = axis.pop("autorangeoptions", None)
        if clip and not log:
            axis["autorangeoptions"] = {end: _list([value], convert)[0] for end, value in clip.items()}
        layout[key] = axis
    for part, ats in (("shapes", ("x0", "x1")), ("annotations", ("x",))):
        if part in layout:
            layout[part] = [_moved(item, names, ats, ends if part == "annotations" else _plain(convert))
                            for item in layout[part]]  # fmt: skip


def _plain(convert: Convert) -> Callable[[Any], list[float | None]]:
    return lambda values: _list(values, convert)


def _moved(
    item: dict[str, Any], names: set[str], ats: tuple[str, ...], convert: Callable[[Any], list[float | None]]
) -> dict[str, Any]:
    """A shape or annotation at other places; on a logarithmic axis annotations are placed by logarithms."""
    if item.get("xref", "x") not in names:
        return item
    return {**item, **{at: convert([item[at]])[0] for at in ats if at in item}}
