"""What is wrong with this run, and how its losses went."""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import Dash, Input, Output, State, html

from ...monitor import Run, RunError
from ..components import aria, finding_item, key_figure, notice, scale, smoothing, toolbar
from ..figures.curves import multiples_height, small_multiples
from ..figures.loss import best_validation, loss
from ..figures.theme import Figure, Style, message
from ..plots import Plot, Scene, plot_card
from ..queries import Judgement, Library
from ..text import duration, integer, number, share
from ..urls import View, fraction, step_range

NO_LOSS = "No train_loss was logged. Call watcher.log(train_loss=loss) in the training loop to see it here."


def layout(view: View, library: Library, style: Style) -> list[Any]:
    """Key figures, losses, findings, the other scalars."""
    run = library.run(view.run)
    judged = library.judgement(view.run, wait=1.5)
    others = other_scalars(run)
    height = 380 + 30 * min(len(judged.findings) if judged else 0, 8)
    losses = [run.scalars(name)["value"].to_numpy() for name in ("train_loss", "val_loss")]
    parts: list[Any] = [
        html.Div(key_figures(run, judged), id="key-figures", className="kpis"),
        toolbar(view, scale(view, *losses), smoothing(view)),
        html.Div(
            [
                plot_card(LOSS, style, height=height),
                html.Div(
                    findings(view.run, judged), id="findings", className="findings", **aria("polite", "live")
                ),
            ],
            className="split",
        ),
    ]
    if others:
        height = multiples_height(len(others), style.narrow)
        parts.append(plot_card(SCALARS, style, height=height))
    return parts


def other_scalars(run: Run) -> list[str]:
    """Names of the logged scalars that have no plot of their own."""
    return [name for name in run.scalar_names() if name not in ("train_loss", "val_loss")]


def key_figures(run: Run, judged: Judgement | None) -> list[html.Div]:
    """The strip of numbers at the top."""
    train, val = run.scalars("train_loss"), run.scalars("val_loss")
    tensors, seconds = run.tensors(), elapsed(run)
    steps = run.last_step + 1
    pace = f"{number(steps / seconds)} steps/s" if seconds and steps > 0 else ""
    best = best_validation(val)
    elements = int(tensors["elements"].sum()) if len(tensors) else 0
    trainable = int(tensors.loc[tensors["trainable"].astype(bool), "elements"].sum()) if len(tensors) else 0
    alarms = len(judged.alarms) if judged else None
    figures = [
        key_figure("Steps", integer(steps), pace),
        key_figure("Duration", duration(seconds), "still training" if run.live else ""),
        key_figure("Train loss", _latest(train), "latest"),
        key_figure(
            "Validation loss", _latest(val), f"best {number(best[1])} at {integer(best[0])}" if best else ""
        ),
        key_figure(
            "Alarms",
            "…" if alarms is None else str(alarms),
            "checking" if judged is None else (f"{len(judged.findings) - len(judged.alarms)} remarks"),
            "" if alarms is None else ("good" if alarms == 0 else judged.health if judged else ""),
        ),
        key_figure(
            "Parameters", number(elements), f"{share(trainable / elements)} trainable" if elements else ""
        ),
    ]
    overhead = run.scalars("overhead")
    if len(overhead):
        figures.append(key_figure("Overhead", share(float(overhead["value"].iloc[-1])), _cadence(run)))
    elif run.info.get("every"):
        figures.append(key_figure("Captured", _cadence(run)))
    return figures


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


def findings(name: str, judged: Judgement | None) -> list[Any]:
    """The list, most severe first; a plain green sentence without an alarm."""
    if judged is None:
        return [notice("Checking", "The detectors are reading the log.")]
    if judged.error:
        text = f"The detectors stopped: {judged.error}. The plots below are not affected."
        return [notice("Not judged", text, "warning")]
    order = {"critical": 0, "warning": 1, "info": 2}
    items: list[Any] = [
        finding_item(name, f) for f in sorted(judged.findings, key=lambda f: order[f.severity])
    ]
    if not judged.alarms:
        items.insert(
            0, notice("No alarms", "Every detector that could judge this run found it healthy.", "good")
        )
    if judged.notes:
        notes = html.Ul([html.Li(note) for note in judged.notes])
        items.append(html.Details([html.Summary(f"{len(judged.notes)} things could not be judged"), notes]))
    return items


def draw_loss(scene: Scene) -> Figure:
    """The stacked loss figure."""
    run = scene.run
    train, val = run.scalars("train_loss"), run.scalars("val_loss")
    if train.empty and val.empty:
        return message(NO_LOSS, scene.style)
    judged = scene.runs.judgement(scene.name, wait=1.0)
    return loss(
        train,
        val,
        judged.findings if judged else [],
        scene.style,
        fraction(scene.values["smoothing"]),
        scene.text("scale") == "log",
        step_range(scene.text("range")),
    )


def draw_scalars(scene: Scene) -> Figure:
    """Small multiples of the other scalars."""
    frames = {name: scene.run.scalars(name) for name in other_scalars(scene.run)}
    return small_multiples(frames, scene.style, fraction(scene.values["smoothing"]))


LOSS = Plot(
    "loss-plot",
    "Loss and generalisation gap",
    "Gap = validation minus training loss since the previous validation. "
    "Dotted lines: where a finding begins. Drag to zoom, double-click to go back.",
    draw_loss,
    ("scale", "smoothing"),
    good="Both losses fall and flatten together; the gap stays small or grows slowly.",
    bad="Loss is flat from the start, jumps up, or validation turns up while training goes on falling.",
    height=380,
    keep=("scale",),
    judged=True,
)
SCALARS = Plot(
    "scalars-plot",
    "Other scalars",
    "Everything else that was logged, each on its own axis.",
    draw_scalars,
    ("smoothing",),
    good="Smooth or slowly changing curves; a learning rate that follows its schedule.",
    bad="Sudden jumps: look at what else changed at the same step.",
)
PLOTS = (LOSS, SCALARS)


def register(app: Dash, library: Library) -> None:
    """Key figures and findings follow a live run."""

    @app.callback(
        Output("key-figures", "children"),
        Output("findings", "children"),
        Input("pulse", "data"),
        Input("verdict", "data"),
        State("page", "data"),
        prevent_initial_call=True,
    )
    def update(_pulse: Any, _verdict: Any, page: dict[str, Any]) -> tuple[Any, Any]:
        name = page["run"]
        try:
            judged = library.judgement(name)
            return key_figures(library.run(name), judged), findings(name, judged)
        except (RunError, OSError) as error:
            return [], [notice("This run cannot be read", library.explain(error), "critical")]
