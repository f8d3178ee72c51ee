"""Whether the network still learns what carries over: training against validation, and when to stop."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
import numpy as np
from dash import Dash, Input, Output, State, html

from ...monitor import Run, RunError
from ...monitor.detectors.validation import Course, Stop, course, early_stop
from ...monitor.growth import ALL, drift_growth, weight_growth
from ..components import aria, choice, code, notice, scale, select, smoothing, state_id, toolbar
from ..figures.overfitting import growth, overfitting, signed_gap
from ..figures.theme import Figure, Style, message
from ..pairs import Pair, pairs, read
from ..plots import Plot, Scene, plot_card
from ..queries import Library
from ..stopping import advice
from ..text import integer, number, share
from ..urls import View, fraction, step_range
from . import strip
from .overview import OUTLIERS
from .strip import Numbers

HOW = "watcher.log(val_loss=validate(model))   # whenever you validate; it attaches to the current step"
GAPS = {"absolute": "Absolute", "relative": "Relative"}
DELTAS = {"0": "any", "0.001": "0.1 %", "0.01": "1 %", "0.05": "5 %"}
PATIENCE = 3
FOLLOWED = ("pair", "patience", "delta")


def layout(view: View, library: Library, style: Style) -> list[Any]:
    """Key figures, what early stopping would have done, the curves and the growth beside them."""
    run = library.run(view.run)
    found = pairs(run.scalar_names())
    pair = pick(found, view.params.get("pair", ""))
    frames = read(run, pair)
    values = [view.params.get(key, "") for key in FOLLOWED]
    parts: list[Any] = []
    if not any(pair.val for pair in found):
        why = "Overfitting shows as a gap between validation and training loss. Log the validation loss:"
        parts.append(notice("No val_loss was logged", [html.P(why), code(HOW)]))
    else:
        parts.append(strip.strip("overfitting", numbers(library, view.run, *values)))
        parts.append(
            html.Section(html.P(sentence(run, *values), id="stop-said", className="lead"), className="card")
        )
    names = [(pair.name, _words(pair)) for pair in found] or [("loss", "loss")]
    parts += [
        toolbar(
            view,
            select(view, "pair", names, pair.name, "Metric", 150),
            _patience(view),
            select(view, "delta", list(DELTAS.items()), "0", "Improves by", 100),
            scale(view, *[frame["value"].to_numpy() for frame in frames]),
            choice(view, "gap", GAPS, "absolute", "Gap"),
            smoothing(view),
            choice(view, "outliers", OUTLIERS, "show", "Outliers"),
        ),
        plot_card(CURVES, style),
        plot_card(GROWTH, style),
    ]
    return parts


def _words(pair: Pair) -> str:
    return pair.name if pair.train else f"{pair.name} (validation only)"


def _patience(view: View) -> html.Div:
    control = dmc.NumberInput(
        id=state_id("patience"),
        value=patience_of(view.params.get("patience")),
        min=1,
        max=100,
        step=1,
        allowDecimal=False,
        debounce=250,
        size="xs",
        w=84,
        **aria("patience, in validations"),
    )
    return html.Div([html.Span("Patience", className="label"), control], className="control")


def patience_of(text: Any) -> int:
    """A count of validations; what makes no sense is the default."""
    return round(min(max(fraction(text, PATIENCE, 100), 1), 100))


def delta_of(text: Any) -> float:
    """The least relative improvement."""
    return fraction(text, 0.0, 0.5)


def pick(found: list[Pair], name: str) -> Pair:
    """The metric of a link; else the first that was validated."""
    named = next((pair for pair in found if pair.name == name), None)
    return named or next((p for p in found if p.val), found[0] if found else Pair("loss", "", ""))


def stop_of(run: Run, pair: Pair, patience: Any, delta: Any) -> Stop | None:
    """Early stopping replayed on the run."""
    val = read(run, pair)[1]
    steps, values = val["step"].to_numpy(np.int64), val["value"].to_numpy(np.float64)
    return early_stop(
        steps, values, patience_of(patience), delta_of(delta), falls=pair.falls, end=run.last_step
    )


def course_of(run: Run, pair: Pair) -> Course | None:
    """How validation went, as the detector sees it."""
    val = read(run, pair)[1]
    values = val["value"].to_numpy(np.float64)
    finite = np.isfinite(values)
    return course(val["step"].to_numpy(np.int64)[finite], (values if pair.falls else -values)[finite])


def sentence(run: Run, name: str, patience: Any, delta: Any) -> str:
    """What early stopping would have done."""
    pair = pick(pairs(run.scalar_names()), name)
    val = read(run, pair)[1]
    latest = float(val["value"].iloc[-1]) if len(val) else float("nan")
    return advice(stop_of(run, pair, patience, delta), patience_of(patience), delta_of(delta), latest)


def numbers(library: Library, name: str, pair_name: str, patience: Any, delta: Any) -> Numbers:
    """What the strip at the top says."""
    run = library.run(name)
    pair = pick(pairs(run.scalar_names()), pair_name)
    train, val = read(run, pair)
    stop, gaps = stop_of(run, pair, patience, delta), signed_gap(train, val, pair.falls)
    none = (number(None), "", "")
    found: Numbers = dict.fromkeys(
        ("Best validation", "Latest validation", "Gap now", "Gap at the best"), none
    )
    if stop:
        found["Best validation"] = (number(stop.best_value), f"at step {integer(stop.best)}", "good")
        last = val.iloc[-1]
        found["Latest validation"] = (number(last["value"]), f"at step {integer(last['step'])}", "")
    if len(gaps):
        found["Gap now"] = _gap(gaps.iloc[-1])
        at = gaps[gaps["step"] == stop.best] if stop else gaps[:0]
        found["Gap at the best"] = _gap(at.iloc[-1]) if len(at) else none
    found["Above its best"] = _above(course_of(run, pair))
    saved = stop.saved if stop else 0
    found["Early stopping saves"] = (
        f"{integer(saved)} steps" if saved else "nothing",
        share(saved / max(stop.end, 1)) if stop and saved else "",
        "",
    )
    weights, drift = _growth(library, run)
    found["Weight norm ÷ first"] = (number(_last(weights)), ALL, "")
    found["Drift"] = (number(_last(drift)), ALL, "")
    return found


def _above(went: Course | None) -> tuple[str, str, str]:
    """Prechelt's generalisation loss, and whether noise alone would show it."""
    if went is None or not went.level:
        return number(None), "", ""
    rise = share(max(went.rise, 0.0) / abs(went.level))
    if not went.turned:
        return rise, "within the noise", ""
    return rise, f"{'coming back' if went.recovering else 'worse'} since step {integer(went.best)}", "warning"


def _gap(row: Any) -> tuple[str, str, str]:
    noise = float(row["noise"])
    around = f"± {number(2 * noise)} noise · " if np.isfinite(noise) else ""
    return number(row["gap"]), f"{around}{_compared(float(row['gap']), abs(float(row['train'])))}", ""


def _compared(gap: float, train: float) -> str:
    """The gap relative to the training value."""
    if not train > 0:
        return ""
    return share(gap / train) if gap < 10 * train else f"{number(gap / train)} x training"


def _last(curves: dict[str, Any]) -> float | None:
    values = curves[ALL]["value"].dropna() if ALL in curves else []
    return float(values.iloc[-1]) if len(values) else None  # pyright: ignore[reportAttributeAccessIssue]


def _growth(library: Library, run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both growths, remembered until the run grows."""
    return library.memo(run, "growth", lambda: (weight_growth(run), drift_growth(run)))


def draw(scene: Scene) -> Figure:
    """The metric and its gap."""
    pair = pick(pairs(scene.run.scalar_names()), scene.text("pair"))
    train, val = read(scene.run, pair)
    if train.empty and val.empty:
        return message("Neither train_loss nor val_loss was logged in this run.", scene.style)
    return overfitting(
        train,
        val,
        scene.style,
        fraction(scene.values["smoothing"]),
        scene.text("scale") == "log",
        step_range(scene.text("range")),
        robust=scene.text("outliers") == "ignore",
        relative=scene.text("gap") == "relative",
        stop=stop_of(scene.run, pair, scene.values["patience"], scene.values["delta"]),
        metric=pair.name,
        falls=pair.falls,
    )


def draw_growth(scene: Scene) -> Figure:
    """Weight norm and drift."""
    return growth(*_growth(scene.runs, scene.run), scene.style, step_range(scene.text("range")))


CURVES = Plot(
    "overfitting-plot",
    "Training against validation",
    "Gap: validation against the mean of training since the previous validation, positive is worse; the "
    "band is two standard errors. Green: the best validation.",
    draw,
    ("pair", "patience", "delta", "scale", "gap", "smoothing", "outliers"),
    good="Validation follows training and levels off; the gap stays within its noise.",
    bad="Validation turns back while training still improves, and the gap widens beyond its band.",
    height=440,
    keep=("pair", "scale", "gap", "outliers"),
)
GROWTH = Plot(
    "growth-plot",
    "Weight growth and drift",
    "Bold: all layers together; dotted: those that grew or moved most. Drift: distance from the reference.",
    draw_growth,
    good="Growth slows down as the loss flattens.",
    bad="Weights go on growing, or one layer runs away, after validation was at its best.",
    height=340,
)
PLOTS = (CURVES, GROWTH)


def register(app: Dash, library: Library) -> None:
    """Numbers and the sentence follow the controls and a live run."""
    controls = [Input(state_id(key), "value") for key in FOLLOWED]
    strip.register(app, "overfitting", lambda name, *values: numbers(library, name, *values), *controls)

    @app.callback(
        Output("stop-said", "children"),
        Input("pulse", "data"),
        *controls,
        State("page", "data"),
        prevent_initial_call=True,
    )
    def update(_pulse: Any, pair: str, patience: Any, delta: Any, page: dict[str, Any]) -> str:
        try:
            return sentence(library.run(page["run"]), pair, patience, delta)
        except (RunError, OSError) as error:
            return f"This run cannot be read: {error}"
