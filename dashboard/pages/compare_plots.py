"""The plots of the Compare page."""

from __future__ import annotations

import numpy as np

from ...monitor import Run, RunError
from ...monitor.parting import pair
from ..figures.compare import colors_of, difference_map, multiples, overlay
from ..figures.histogram import Part, overlaid
from ..figures.theme import Figure, message
from ..plots import Plot, Scene
from ..text import integer
from ..urls import fraction, step_range
from .compare_facts import chosen, drifts, norms, pair_of, scalar_names

KINDS = {"weight": "Weight", "gradient": "Gradient", "update": "Update"}
PAIR = ("with", "one", "two")


def runs_of(scene: Scene) -> dict[str, Run]:
    """The runs that are compared, the page's own first."""
    names, _ = chosen(scene.values.get("with"), scene.runs, scene.name)
    return {name: scene.runs.run(name) for name in names}


def draw_curves(scene: Scene) -> Figure:
    """One scalar of every run."""
    name = scene.text("scalar", "train_loss")
    curves = {run_name: run.scalars(name) for run_name, run in runs_of(scene).items()}
    smooth, log = fraction(scene.values.get("smoothing")), scene.text("scale") == "log"
    return overlay(curves, name, scene.style, smooth, log, step_range(scene.text("range")))


def draw_all(scene: Scene) -> Figure:
    """Every scalar of every run, when asked for."""
    if scene.text("show") != "all":
        return message("Choose All to see every scalar.", scene.style)
    runs = runs_of(scene)
    names = scalar_names(scene.runs, list(runs))
    scalars = {name: {run_name: run.scalars(name) for run_name, run in runs.items()} for name in names}
    smooth = fraction(scene.values.get("smoothing"))
    return multiples(scalars, scene.style, smooth, step_range(scene.text("range")))


def _two(scene: Scene) -> tuple[list[str], str, str]:
    """All runs, and which of them are A and B."""
    names = list(runs_of(scene))
    if len(names) < 2:
        raise RunError("Choose a second run to compare with.")
    return names, *pair_of(names, scene.text("one"), scene.text("two"))


def draw_gradient(scene: Scene) -> Figure:
    """The logarithm of the ratio of the gradient norms."""
    return _difference(scene, "gradient")


def draw_drift(scene: Scene) -> Figure:
    """The difference of the drifts."""
    return _difference(scene, "drift")


def _difference(scene: Scene, kind: str) -> Figure:
    names, one, two = _two(scene)
    runs = [scene.runs.run(name) for name in (one, two)]
    if kind == "drift":
        both = pair(*[drifts(scene.runs, run) for run in runs])
        values, what = both.a - both.b, "drift, A − B"
    else:
        both = pair(*[norms(scene.runs, run, kind) for run in runs])
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.log10(both.a) - np.log10(both.b)
        values, what = np.where(np.isfinite(values), values, np.nan), f"{kind} norm, A ÷ B in decades"
    if not both.tensors:
        return message(f"{one} and {two} have no layer of one name with a {kind}.", scene.style)
    if not len(both.steps):
        return message(f"{one} and {two} were never captured at about the same step.", scene.style)
    colors = colors_of(names, scene.style.palette)
    shown = step_range(scene.text("range"))
    return difference_map(
        both.tensors, both.steps, values, what, scene.style, (colors[one], colors[two]), shown
    )


def draw_histogram(scene: Scene) -> Figure:
    """The histograms of one layer in every run, at one step."""
    name, kind, runs = scene.text("tensor"), scene.text("kind", "weight"), runs_of(scene)
    kind = kind if kind in KINDS else "weight"
    colors = colors_of(list(runs), scene.style.palette)
    parts = []
    for run_name, run in runs.items():
        step = _step(scene, run, kind, name)
        if step is not None:
            frame = run.histogram(kind, name, step)
            label = f"{run_name}, step {integer(step)}"
            parts.append(Part(label, frame, colors[run_name], {"run": run_name}))
    return overlaid(parts, KINDS[kind].lower(), scene.style, log=scene.text("scale") == "log")


def _step(scene: Scene, run: Run, kind: str, name: str) -> int | None:
    """The last capture at or before the chosen step, else the first one; None without any."""
    wanted = scene.values.get("at")
    limit = int(wanted) if isinstance(wanted, int | float) else None
    rows = run.stats(kind, name, ["step"], steps=None if limit is None else (None, limit))
    if rows.empty:
        rows = run.stats(kind, name, ["step"]).iloc[:1]
    return int(rows["step"].iloc[-1]) if len(rows) else None


CURVES = Plot(
    "compare-plot",
    "One scalar of all runs",
    "Click a run in the legend to hide it; drag to zoom.",
    draw_curves,
    ("with", "scalar", "scale", "smoothing"),
    good="Runs that differ in a seed only stay within each other's noise.",
    bad="A step at which one run leaves the others: look there at gradient flow and drift.",
    height=380,
    keep=("with", "scalar", "scale"),
)
ALL = Plot(
    "compare-scalars",
    "All scalars of all runs",
    "Each on its own value axis, logarithmic where values span three decades.",
    draw_all,
    ("with", "show", "smoothing"),
    good="Curves that move together.",
    bad="A curve that leaves the others earlier than the loss does: it may be the cause.",
    keep=("with", "show"),
)
GRADIENT = Plot(
    "compare-gradient",
    "Gradient norm, A against B",
    "log₁₀ of A ÷ B: 1 is ten times; in the colour of the run with more.",
    draw_gradient,
    PAIR,
    good="Pale everywhere: the same signal reaches every layer.",
    bad="A block of rows in one colour: the signal dies or explodes there in one of the runs.",
    keep=PAIR,
)
DRIFT = Plot(
    "compare-drift",
    "Drift, A against B",
    "Relative L2, A − B; in the colour of the run that moved more.",
    draw_drift,
    PAIR,
    good="Pale everywhere: both runs move their layers alike.",
    bad="One row far darker than its neighbours: only one of the runs moves it.",
    keep=PAIR,
)
HISTOGRAM = Plot(
    "compare-histogram",
    "One layer in all runs",
    "Each as shares of its own elements, at the last capture up to the step.",
    draw_histogram,
    ("with", "tensor", "kind", "at", "scale"),
    good="Bells of one width.",
    bad="One that is far wider, shifted, or a spike at zero.",
    height=300,
    keep=("with", "tensor", "kind", "scale"),
    on_steps=False,
)
PLOTS = (CURVES, ALL, GRADIENT, DRIFT, HISTOGRAM)
