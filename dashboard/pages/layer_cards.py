"""The plots of the Layer page as cards: how to read each, and when it has something to show."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from ...monitor import Run
from ..figures.theme import Figure
from ..plots import Plot, Scene
from .layer_facts import attention_of, bias_of, entry, module_names, module_of
from .layer_plots import (
    KINDS,
    draw_activity,
    draw_attention,
    draw_bias,
    draw_heads,
    draw_histogram,
    draw_history,
    draw_optimizer,
    draw_quantiles,
    draw_steps,
    draw_units,
    held,
    unit_kind,
)


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
    name = f"{name}-plot"
    return Plot(name, title, explain, draw, own, good, bad, height, own, on_steps=on_steps)


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
    is_tensor = entry(run, name) is not None
    module = module_of(run, name)
    output = module in set(module_names(run))
    own = {kind: held(run, kind, name) for kind in ("weight", "gradient", "update")}
    attention, bias = attention_of(run, name), bias_of(run, name)
    units = (
        run.stats("activation", module, ["units", "active_units"], max_points=1)["units"]
        if output
        else pd.Series()
    )
    has = {
        **own,
        "activation": output,
        "steps": any(own.values()) or output,
        "quantile": any(own.values()) or output,
        "bias": bool(bias) and len(run.values(bias)[0]) > 0,
        "activity": bool(units.notna().any()),
        "units": output and bool(unit_kind(run, module)),
        "attention": bool(attention),
        "heads": bool(attention) and len(run.values(attention, "attention_entropy")[0]) > 0,
        "optimizer": held(run, "second_moment", name) or held(run, "momentum", name),
        "history": is_tensor or output,
    }
    return ["" if has[card] else "hidden" for card in SHOWN]
