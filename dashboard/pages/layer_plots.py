"""What the plots of the Layer page read of the run, and draw of it."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from ...monitor import Run
from ..figures.histogram import Part, histogram_map, nothing, overlaid, ridgeline
from ..figures.layer import activity, quantiles, share_map, vector
from ..figures.norms import Series, history
from ..figures.theme import Figure, message
from ..plots import Scene
from ..text import integer
from ..urls import step_range
from .layer_facts import attention_of, bias_of, entry, module_names, module_of

KINDS = {"weight": "Weight", "gradient": "Gradient", "update": "Update", "activation": "Output"}
#: Rows that a plot reads; of longer runs each holds several captures, and a zoom reads finer ones.
HISTOGRAM_POINTS = 512
POINTS = 4096
#: Values that are stored of the units of a module, and what their map says.
UNITS = {"saturated_share": "share of samples saturated", "dead_share": "share of samples dead"}


def named(run: Run, kind: str, name: str) -> str:
    """The name that rows of this kind have: activations are those of the tensor's module."""
    return module_of(run, name) if kind == "activation" else name


def held(run: Run, kind: str, name: str) -> bool:
    """Whether there is any row of this kind: asked first, since looking for rows in vain takes time."""
    return kind in run.kinds() and name in run.names(kind)


def span(scene: Scene, kind: str, name: str, points: int) -> tuple[int, int] | None:
    """The steps to read: all, unless the run is so long that a zoom shows more than the whole does."""
    shown = step_range(scene.text("range"))
    if shown is None:
        return None
    whole = scene.run.stats(kind, name, ["captures"], max_points=points)
    if not (whole["captures"] > 1).any():
        return None
    margin = 0.1 * (shown[1] - shown[0])
    return max(math.floor(shown[0] - margin), 0), math.ceil(shown[1] + margin)


def kind_of(scene: Scene) -> str:
    """The kind that quantiles and the two steps show: the chosen one if this layer has it."""
    if entry(scene.run, scene.text("tensor")) is None:
        return "activation"
    kind = scene.text("kind", "weight")
    return kind if kind in KINDS else "weight"


def draw_histogram(kind: str, scene: Scene) -> Figure:
    """One histogram over time, as a map or as ridges."""
    name = named(scene.run, kind, scene.text("tensor"))
    if not held(scene.run, kind, name):
        return nothing(KINDS[kind].lower(), scene.style)
    steps = span(scene, kind, name, HISTOGRAM_POINTS)
    frame = scene.run.histograms(kind, name, steps=steps, max_points=HISTOGRAM_POINTS)
    log, word = scene.text("scale") == "log", KINDS[kind].lower()
    if scene.text("view") == "ridges":
        shown = step_range(scene.text("range"))
        frame = frame[frame["step"].between(*shown)] if shown else frame
        return ridgeline(frame, word, scene.style, log=log)
    return histogram_map(frame, word, scene.style, log=log, steps=step_range(scene.text("range")))


def draw_steps(scene: Scene) -> Figure:
    """The histograms of two steps over each other."""
    run, kind = scene.run, kind_of(scene)
    name = named(run, kind, scene.text("tensor"))
    if not held(run, kind, name):
        return nothing(KINDS[kind].lower(), scene.style)
    rows = run.stats(kind, name, ["step", "last_step", "captures"], max_points=HISTOGRAM_POINTS)
    frame = run.histograms(kind, name, steps=None, max_points=HISTOGRAM_POINTS)  # what the maps have read
    p, parts = scene.style.palette, []
    for key, place, color in (("first", 0, p.second), ("second", -1, p.accent)):
        wanted = whole(scene.values.get(key))
        row = rows[rows["step"] <= wanted].tail(1) if wanted is not None else rows.iloc[[place]]
        row = (rows.head(1) if row.empty else row).iloc[0]
        if row["captures"] == 1 or wanted is None:
            label, one = row_name(row), frame[frame["step"] == row["step"]]
        else:
            label, one = _single(run, kind, name, int(row["step"]), min(wanted, int(row["last_step"])))
        parts.append(Part(label, one, color))
    return overlaid(parts, KINDS[kind].lower(), scene.style, log=scene.text("scale") == "log")


def row_name(row: pd.Series) -> str:
    """The step of a row, or its steps when it holds several captures."""
    if row["captures"] == 1:
        return f"step {integer(row['step'])}"
    return f"steps {integer(row['step'])} – {integer(row['last_step'])}"


def _single(run: Run, kind: str, name: str, low: int, high: int) -> tuple[str, pd.DataFrame]:
    """The last capture of a range, of finer rows than the maps show."""
    columns = ["step", "last_step", "captures"]
    row = run.stats(kind, name, columns, steps=(low, high)).iloc[-1]
    frame = run.histograms(kind, name, steps=(int(row["step"]), int(row["step"])))
    return row_name(row), frame[frame["step"] == row["step"]]


def whole(value: Any) -> int | None:
    """A step that the reader typed or picked; None for none."""
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        return None


def draw_quantiles(scene: Scene) -> Figure:
    """The nested bands of one kind."""
    kind = kind_of(scene)
    name = named(scene.run, kind, scene.text("tensor"))
    if not held(scene.run, kind, name):
        return message(f"No {KINDS[kind].lower()} was captured here.", scene.style)
    columns = ["step", "min", "max", "p01", "p05", "p25", "p50", "p75", "p95", "p99"]
    steps = span(scene, kind, name, HISTOGRAM_POINTS)
    frame = scene.run.stats(kind, name, columns, steps=steps, max_points=HISTOGRAM_POINTS)
    return quantiles(frame, KINDS[kind].lower(), scene.style, step_range(scene.text("range")))


def draw_bias(scene: Scene) -> Figure:
    """The stored values of the bias."""
    name = bias_of(scene.run, scene.text("tensor"))
    if not name:
        return message("This layer has no bias in the log.", scene.style)
    return vector(*scene.run.values(name), name, scene.style, step_range(scene.text("range")))


def draw_activity(scene: Scene) -> Figure:
    """Which units fired."""
    name = module_of(scene.run, scene.text("tensor"))
    if not held(scene.run, "activation", name):
        return message("The activity of single units was not captured here.", scene.style)
    found = scene.run.activity("activation", name, max_points=HISTOGRAM_POINTS)
    return activity(*found, scene.style, step_range(scene.text("range")))


def draw_units(scene: Scene) -> Figure:
    """How much of the time each unit is dead or saturated."""
    name = module_of(scene.run, scene.text("tensor"))
    kind = unit_kind(scene.run, name) or "dead_share"
    found = scene.run.values(name, kind)
    return share_map(*found, UNITS[kind], "unit", scene.style, step_range(scene.text("range")))


def unit_kind(run: Run, module: str) -> str:
    """What is stored of the units of a module: how often they saturate, or how often they are dead."""
    return next((kind for kind in UNITS if len(run.values(module, kind)[0])), "")


def draw_heads(scene: Scene) -> Figure:
    """The attention entropy of every head."""
    name = attention_of(scene.run, scene.text("tensor"))
    if not name:
        return message("This layer is no part of an attention.", scene.style)
    found = scene.run.values(name, "attention_entropy")
    return share_map(*found, "attention entropy", "head", scene.style, step_range(scene.text("range")))


def _read(scene: Scene, kind: str, name: str, columns: list[str]) -> pd.DataFrame:
    if not held(scene.run, kind, name):
        return pd.DataFrame(columns=columns)
    steps = span(scene, kind, name, POINTS)
    return scene.run.stats(kind, name, columns, steps=steps, max_points=POINTS)


def draw_attention(scene: Scene) -> Figure:
    """Entropy and largest logit of the attention."""
    name = attention_of(scene.run, scene.text("tensor"))
    if not name:
        return message("This layer is no part of an attention.", scene.style)
    columns = ["step", "mean", "p05", "p95"]
    entropy = scene.run.stats("attention_entropy", name, columns, max_points=HISTOGRAM_POINTS)
    logit = _read(scene, "attention_logit", name, ["step", "max"])
    series = [
        Series(entropy, "mean", "attention entropy", "accent", low="p05", high="p95", share=True),
        Series(logit, "max", "largest logit", "second"),
    ]
    return history(series, scene.style, step_range(scene.text("range")))


def draw_optimizer(scene: Scene) -> Figure:
    """What the optimizer remembers of this tensor."""
    name = scene.text("tensor")
    second = _read(scene, "second_moment", name, ["step", "rms_ratio", "below_epsilon"])
    momentum = _read(scene, "momentum", name, ["step", "norm"])
    series = [
        Series(second, "rms_ratio", "gradient ÷ √v", "third", log=True),
        Series(second, "below_epsilon", "share below ε", "critical", share=True),
        Series(momentum, "norm", "momentum norm", "accent", log=True),
    ]
    return history(series, scene.style, step_range(scene.text("range")))


def _norm(scene: Scene, kind: str, name: str, color: str, *, log: bool) -> Series:
    """A norm, with the lowest and highest of the captures behind each point."""
    frame = _read(scene, kind, name, ["step", "norm", "norm_min", "norm_max"])
    return Series(frame, "norm", f"{kind} norm", color, log, low="norm_min", high="norm_max")


def draw_history(scene: Scene) -> Figure:
    """Norms, ratio and drift; of a module its outputs."""
    run, name = scene.run, scene.text("tensor")
    series = []
    if entry(run, name) is not None:
        update = _read(scene, "update", name, ["step", "ratio", "ratio_max"])
        reach = span(scene, "drift", name, POINTS) if held(run, "drift", name) else None
        moved = (
            run.drift(name, steps=reach, max_points=POINTS) if held(run, "drift", name) else pd.DataFrame()
        )
        series = [
            _norm(scene, "gradient", name, "second", log=True),
            Series(update, "ratio", "update ratio", "third", log=True, low="ratio", high="ratio_max"),
            _norm(scene, "weight", name, "accent", log=False),
            Series(moved, "relative_l2", "drift", "fourth"),
        ]
    module = module_of(run, name)
    if module in module_names(run):
        output = _read(scene, "activation", module, ["step", "rms", "units", "active_units"])
        idle = output.assign(dead=1 - output["active_units"] / output["units"])
        series.append(Series(output, "rms", "output rms", "info"))
        series.append(Series(idle, "dead", "dead units", "critical", share=True))
    return history(series, scene.style, step_range(scene.text("range")))
