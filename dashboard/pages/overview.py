"""What is wrong with this run, what proves it, and how its losses and other scalars went."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
import numpy as np
from dash import Dash, dcc, html

from ...monitor import Run, schema
from ...monitor.losses import TRAIN, VAL
from ..components import aria, choice, hidden, scale, smoothing, state_id, toolbar
from ..figures.curves import MAX_PANELS, Look, multiples_height, ordered, small_multiples
from ..figures.loss import best_validation, loss
from ..figures.theme import Figure, Style, message
from ..pairs import losses
from ..plots import Plot, Scene, plot_card
from ..queries import Judgement, Library
from ..text import duration, integer, number, share
from ..urls import View, fraction, step_range
from . import evidence, strip
from .labels import labels
from .strip import Numbers

NO_LOSS = "No train_loss was logged. Call watcher.log(train_loss=loss) in the training loop to see it here."
OUTLIERS = {"show": "Show", "ignore": "Ignore"}
AXES = {"auto": "Auto", "linear": "Linear", "log": "Log"}
MANY = 12  # scalars from which a filter helps
#: Units of what tells of the machine, by the ends of the names.
UNITS = {
    "utilisation": "%", "cpu": "%", "cpu_process": "% of a core", "memory": "%", "memory_process": "GB",
    "power": "W", "temperature": "°C", "disk_free": "GB", "disk_read": "MB/s", "disk_write": "MB/s",
    "network_in": "MB/s", "network_out": "MB/s",
}  # fmt: skip


def layout(view: View, library: Library, style: Style) -> list[Any]:
    """Key figures; losses and evidence beside the findings; the other scalars."""
    run = library.run(view.run)
    judged = library.judgement(view.run, wait=0.3)
    others, system = other_scalars(run), system_scalars(run)
    height = 380 + 30 * min(len(judged.findings) if judged else 0, 8)
    values = [frame["value"].to_numpy() for frame in losses(run)]
    items = evidence.finding_list(view.run, judged, run.last_step)
    parts: list[Any] = [
        *labels(run),
        strip.strip("overview", numbers(run, judged)),
        toolbar(
            view,
            scale(view, *values),
            smoothing(view),
            choice(view, "outliers", OUTLIERS, "show", "Outliers"),
        ),
        html.Div(
            [
                html.Div(
                    [plot_card(LOSS, style, height=height), evidence.panel(view, library, style)],
                    className="body",
                ),
                html.Div(items, id="findings", className="findings", **aria("polite", "live")),
            ],
            className="split",
        ),
        dcc.Store(id="findings-shape", data=evidence.shape(judged)),
    ]
    if others:
        height = multiples_height(len(others), style.narrow)
        parts.append(plot_card(SCALARS, style, height=height, tools=_scalar_tools(view, len(others))))
    if system:
        card = plot_card(SYSTEM, style, height=multiples_height(len(system), style.narrow))
        parts.append(html.Details([html.Summary("System"), card], className="fold"))
    return [*parts, hidden(view, "pins")]


def _scalar_tools(view: View, count: int) -> list[Any]:
    tools: list[Any] = [choice(view, "axes", AXES, "auto", "Value axes")]
    search = dmc.TextInput(
        id=state_id("filter"),
        value=view.params.get("filter", ""),
        placeholder="part of a name",
        debounce=250,
        size="xs",
        w=150,
        **aria("filter scalars"),
    )
    box = html.Div([html.Span("Filter scalars", className="label"), search], className="control")
    return [html.Div(box, className="" if count >= MANY else "hidden"), *tools]


def other_scalars(run: Run) -> list[str]:
    """Names of the logged scalars that have no plot of their own."""
    names = run.scalar_names()
    shown = [next((name for name in known if name in names), "") for known in (TRAIN, VAL)]
    return [name for name in names if name not in shown and not name.startswith(schema.SYSTEM)]


def system_scalars(run: Run) -> list[str]:
    """Names of the scalars that tell of the machine: GPUs first, then as `UNITS` orders them."""
    names = [name for name in run.scalar_names() if name.startswith(schema.SYSTEM)]
    return sorted(names, key=lambda name: ("gpu" not in name, _kind(name), name))


def numbers(run: Run, judged: Judgement | None) -> Numbers:
    """What the strip at the top says."""
    train, val = losses(run)
    seconds, steps = elapsed(run), run.last_step + 1
    pace = f"{number(steps / seconds)} steps/s" if seconds and steps > 0 else ""
    best = best_validation(val)
    found = {
        "Steps": (integer(steps), pace, ""),
        "Duration": (duration(seconds), "still training" if run.live else "", ""),
        "Train loss": (_latest(train), "latest", ""),
        "Validation loss": (
            _latest(val),
            f"best {number(best[1])} at {integer(best[0])}" if best else "",
            "",
        ),
        "Alarms": _alarms(judged),
        "Parameters": _parameters(run),
    }
    overhead = run.scalars("overhead")
    if len(overhead):
        found["Overhead"] = (share(float(overhead["value"].iloc[-1])), _cadence(run), "")
    elif run.info.get("every"):
        found["Captured"] = (_cadence(run), "", "")
    return found


def _alarms(judged: Judgement | None) -> tuple[str, str, str]:
    if judged is None:
        return "…", "checking", ""
    count, remarks = len(judged.alarms), len(judged.findings) - len(judged.alarms)
    return (
        str(count),
        f"{remarks} remark{'' if remarks == 1 else 's'}",
        "good" if count == 0 else judged.health,
    )


def _parameters(run: Run) -> tuple[str, str, str]:
    tensors = run.tensors()
    elements = int(tensors["elements"].sum()) if len(tensors) else 0
    if not elements:
        return number(None), "", ""
    trainable = int(tensors.loc[tensors["trainable"].astype(bool), "elements"].sum())
    return number(elements), f"{share(trainable / elements)} trainable", ""


def _cadence(run: Run) -> str:
    every = run.info.get("every")
    if isinstance(every, int):
        return "every step" if every == 1 else f"every {integer(every)} steps"
    return "cadence by budget" if every == "auto" else str(every or "")


def _latest(frame: Any) -> str:
    return number(frame["value"].iloc[-1]) if len(frame) else number(None)


def elapsed(run: Run) -> float | None:
    """Seconds from the start to the last sign of life."""
    created = run.info.get("created")
    times = [run.scalars(name)["time"].max() for name in run.scalar_names()[:4]]
    last = max([t for t in times if np.isfinite(t)] + [float(run.info.get("ended") or 0)], default=0.0)
    return last - float(created) if created and last >= float(created) else None


def draw_loss(scene: Scene) -> Figure:
    """The stacked loss figure."""
    train, val = losses(scene.run)
    if train.empty and val.empty:
        return message(NO_LOSS, scene.style)
    judged = scene.runs.judgement(scene.name, wait=0.3)
    picked = evidence.chosen(judged, scene.text("finding"))
    return loss(
        train,
        val,
        evidence.by_severity(judged.findings) if judged else [],
        scene.style,
        fraction(scene.values["smoothing"]),
        scene.text("scale") == "log",
        step_range(scene.text("range")),
        scene.text("outliers") == "ignore",
        evidence.region(picked) if picked else None,
    )


def draw_scalars(scene: Scene) -> Figure:
    """Small multiples of the other scalars, pinned ones first."""
    names = other_scalars(scene.run)
    wanted = scene.text("filter").strip().lower()
    found = [name for name in ordered(names, scene.text("pins").split(",")) if wanted in name.lower()]
    look = Look(
        fraction(scene.values["smoothing"]),
        scene.text("axes", "auto"),
        scene.text("outliers") == "ignore",
        step_range(scene.text("range")),
    )
    frames = {name: scene.run.scalars(name) for name in found[:MAX_PANELS]}
    return small_multiples(frames, scene.style, look, len(names))


def draw_system(scene: Scene) -> Figure:
    """Small multiples of what the machine did, with their units."""
    names = system_scalars(scene.run)
    look = Look(axes="linear", steps=step_range(scene.text("range")))
    frames = {_with_unit(name): scene.run.scalars(name) for name in names[:MAX_PANELS]}
    return small_multiples(frames, scene.style, look, len(names))


def _with_unit(name: str) -> str:
    short, kind = name.removeprefix(schema.SYSTEM), _kind(name)
    return f"{short} ({[*UNITS.values()][kind]})" if kind < len(UNITS) else short


def _kind(name: str) -> int:
    """The place among `UNITS` of what this is; behind them all when it is none."""
    return next((place for place, ends in enumerate(UNITS) if name.endswith(ends)), len(UNITS))


LOSS = Plot(
    "loss-plot",
    "Loss and generalisation gap",
    "Gap = validation minus training loss since the previous validation, with its noise as a band. "
    "Dotted lines: where a finding begins. Drag to zoom, double-click to go back.",
    draw_loss,
    ("scale", "smoothing", "outliers", "finding"),
    good="Both losses fall and flatten together; the gap stays small or grows slowly.",
    bad="Loss is flat from the start, jumps up, or validation turns up while training goes on falling.",
    height=380,
    keep=("scale",),
    judged=True,
)
SCALARS = Plot(
    "scalars-plot",
    "Other scalars",
    "Everything else that was logged, each on its own axis. ☆ brings one to the front; red: NaN or infinite.",
    draw_scalars,
    ("smoothing", "outliers", "axes", "filter", "pins"),
    good="Smooth or slowly changing curves; a learning rate that follows its schedule.",
    bad="Sudden jumps: look at what else changed at the same step.",
    keep=("axes", "outliers", "filter", "pins"),
)
SYSTEM = Plot(
    "system-plot",
    "System metrics",
    "What the machine did beside the training, every ten seconds: nothing here is judged.",
    draw_system,
    good="A GPU that is busy most of the time; memory that stays level; room on the disk.",
    bad="A GPU that waits while a processor is at its limit: data comes too slowly. Memory that only grows.",
)
PLOTS = (LOSS, evidence.EVIDENCE, SCALARS, SYSTEM)


def register(app: Dash, library: Library) -> None:
    """Key figures and findings follow a live run, text by text."""
    evidence.register(app, library)
    strip.register(app, "overview", lambda name: numbers(library.run(name), library.judgement(name)))
