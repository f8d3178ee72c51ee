"""The plots of the Layer page: what each reads of the run, and when it has something to show."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from ...monitor import Run
from ..figures.histogram import Part, histogram_map, overlaid, ridgeline
from ..figures.layer import activity, quantiles, share_map, vector
from ..figures.norms import Series, history
from ..figures.theme import Figure, message
from ..plots import Plot, Scene
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
    kind = kind_of(scene)
    name = named(scene.run, kind, scene.text("tensor"))
    captured = scene.run.stats(kind, name, ["step", "last_step"], max_points=POINTS)
    if captured.empty:
        return message(f"No {KINDS[kind].lower()} histogram was captured here.", scene.style)
    p = scene.style.palette
    ends = int(captured["step"].iloc[0]), int(captured["last_step"].iloc[-1])
    parts = []
    for key, end, color in (("first", ends[0], p.second), ("second", ends[1], p.accent)):
        step = whole(scene.values.get(key), end)
        step = min(max(step, ends[0]), ends[1])
        frame = scene.run.histogram(kind, name, step)
        parts.append(Part(f"step {integer(_captured(scene.run, kind, name, step))}", frame, color))
    return overlaid(parts, KINDS[kind].lower(), scene.style, log=scene.text("scale") == "log")


def whole(value: Any, default: int) -> int:
    """A step that the reader typed, or the default."""
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        return default


def _captured(run: Run, kind: str, name: str, step: int) -> int:
    """The last captured step at or before one: the one whose histogram `Run.histogram` gives."""
    return int(run.stats(kind, name, ["step"], steps=(None, step))["step"].iloc[-1])


def draw_quantiles(scene: Scene) -> Figure:
    """The nested bands of one kind."""
    kind = kind_of(scene)
    name = named(scene.run, kind, scene.text("tensor"))
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
    found = scene.run.values(name, "attention_entropy")
    return share_map(*found, "attention entropy", "head", scene.style, step_range(scene.text("range")))


def _read(scene: Scene, kind: str, name: str, columns: list[str]) -> pd.DataFrame:
    steps = span(scene, kind, name, POINTS)
    return scene.run.stats(kind, name, columns, steps=steps, max_points=POINTS)


def draw_attention(scene: Scene) -> Figure:
    """Entropy and largest logit of the attention."""
    name = attention_of(scene.run, scene.text("tensor"))
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
        moved = run.drift(name, steps=span(scene, "drift", name, POINTS), max_points=POINTS)
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


def _histogram(kind: str, explain: str, good: str, bad: str) -> Plot:
    def draw(scene: Scene) -> Figure:
        return draw_histogram(kind, scene)

    keys = ("tensor", "view", "scale")
    return Plot(
        f"histogram-{kind}",
        f"{KINDS[kind]} histogram",
        explain,
        draw,
        keys,
        good,
        bad,
        height=240,
        keep=keys,
    )


def _card(
    name: str,
    title: str,
    explain: str,
    draw: Callable[[Scene], Figure],
    good: str,
    bad: str,
    height: int = 270,
    own: tuple[str, ...] = ("tensor",),
    on_steps: bool = True,
) -> Plot:
    return Plot(f"{name}-plot", title, explain, draw, own, good, bad, height, own, on_steps=on_steps)


HISTOGRAMS = {
    "weight": _histogram(
        "weight",
        "Values of the weight; stronger is more.",
        "A bell that widens or narrows slowly.",
        "Values that pile up at zero, split in two, or spread without end.",
    ),
    "gradient": _histogram(
        "gradient",
        "Values of the gradient, before clipping.",
        "Centred on zero, about as wide at the end as at the start, or slowly narrower.",
        "A line at zero (nothing arrives) or a band that widens by decades.",
    ),
    "update": _histogram(
        "update",
        "How far one step moved each weight.",
        "Narrow against the weights, following the learning rate.",
        "As wide as the weights themselves, or a line at zero.",
    ),
    "activation": _histogram(
        "activation",
        "Values of the module's output.",
        "Spread over a range that stays.",
        "Everything at zero (dead) or at the ends of the range (saturated).",
    ),
}
CARDS = {
    "steps": _card(
        "steps",
        "Two steps",
        "A click in a histogram picks a step; the last two picks are compared.",
        draw_steps,
        "Two bells of one shape, the later one a little wider.",
        "A later histogram that is far wider, shifted, or a spike at zero.",
        own=("tensor", "kind", "scale", "first", "second"),
        on_steps=False,
    ),
    "quantile": _card(
        "quantile",
        "Quantiles",
        "The bands hold 50, 90, 98 and 100 % of the elements; the line is the median.",
        draw_quantiles,
        "Bands of steady width.",
        "Bands that open like a funnel, or close to a line.",
        own=("tensor", "kind"),
    ),
    "bias": _card(
        "bias",
        "Bias values",
        "Each element over time: of the bias, else of a small weight.",
        draw_bias,
        "Elements that settle.",
        "An element that runs away, or all of them standing still.",
    ),
    "activity": _card(
        "activity",
        "Active units",
        "Blue: the unit was not zero for some sample of the capture.",
        draw_activity,
        "Units that take turns.",
        "A row that stays red is dead.",
    ),
    "units": _card(
        "units",
        "Dead or saturated units",
        "The share of samples for which a unit is at zero, or at the flat ends of its activation.",
        draw_units,
        "Pale: units that answer to most samples.",
        "A dark row: a unit that says the same to every sample and cannot learn.",
    ),
    "attention": _card(
        "attention",
        "Attention",
        "Entropy: 0 looks at one key, 1 at all alike; the band holds 90 % of the queries.",
        draw_attention,
        "Entropy between the extremes, logits that level off.",
        "Entropy that falls to zero while the largest logit grows: attention collapses.",
    ),
    "heads": _card(
        "heads",
        "Entropy by head",
        "The mean entropy of each head's attention.",
        draw_heads,
        "Heads that differ.",
        "A head at 0 (one key) or at 1 (no preference) for good.",
    ),
    "optimizer": _card(
        "optimizer",
        "Optimizer state",
        "Gradient against √v, what it is divided by; elements that ε holds up; momentum.",
        draw_optimizer,
        "A ratio near 1 that sinks slowly, no element below ε.",
        "A ratio far above 1 (v is stale), or many elements below ε: their steps shrink.",
    ),
    "history": _card(
        "history",
        "Norms, update ratio and drift",
        "Drift is |w − reference| ÷ |reference|. Dotted green: an update of a thousandth of the weight. "
        "Bands, in long runs: lowest and highest of the captures behind a point.",
        draw_history,
        "An update ratio near 10⁻³, norms that level off.",
        "A gradient norm that falls or rises by decades, a weight norm that grows without end.",
        height=560,
    ),
}
PLOTS = (*HISTOGRAMS.values(), *CARDS.values())
#: The cards that a layer may lack.
SHOWN = (*HISTOGRAMS, *CARDS)


def available(run: Run, name: str) -> list[str]:
    """Class names of the cards in SHOWN: hidden where there is nothing to show."""
    kinds, is_tensor = set(run.kinds()), entry(run, name) is not None
    module = module_of(run, name)
    output = module in set(module_names(run))
    held = {kind: kind in kinds and name in set(run.names(kind)) for kind in ("weight", "gradient", "update")}
    attention, bias = attention_of(run, name), bias_of(run, name)
    units = (
        run.stats("activation", module, ["units", "active_units"], max_points=1)["units"]
        if output
        else pd.Series()
    )
    has = {
        **held,
        "activation": output,
        "steps": any(held.values()) or output,
        "quantile": any(held.values()) or output,
        "bias": bool(bias) and len(run.values(bias)[0]) > 0,
        "activity": bool(units.notna().any()),
        "units": output and bool(unit_kind(run, module)),
        "attention": bool(attention),
        "heads": bool(attention) and len(run.values(attention, "attention_entropy")[0]) > 0,
        "optimizer": is_tensor
        and any(k in kinds and name in run.names(k) for k in ("second_moment", "momentum")),
        "history": is_tensor or output,
    }
    return ["" if has[card] else "hidden" for card in SHOWN]
