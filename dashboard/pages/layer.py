"""Everything about one tensor, or about the outputs of one module."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
import numpy as np
from dash import Dash, Input, Output, State, html

from ...monitor import Run, RunError
from ..components import aria, choice, finding_item, notice, scale, state_id, toolbar
from ..figures.histogram import histogram_map, ridgeline
from ..figures.layer import activity, history, quantiles, vector
from ..figures.theme import Figure, Style, message
from ..plots import Plot, Scene, plot_card
from ..queries import Judgement, Library
from ..text import integer, number
from ..urls import View, step_range

KINDS = {"weight": "Weight", "gradient": "Gradient", "update": "Update", "activation": "Output"}
MAX_STEPS = 200
#: The cards that a layer may lack.
SHOWN = ("weight", "gradient", "update", "activation", "bias", "activity", "history")


def layout(view: View, library: Library, style: Style) -> list[Any]:
    """The selector, what the tensor is, its histograms, quantiles, values and history."""
    run = library.run(view.run)
    names = selectable(run)
    chosen = view.params.get("tensor", "")
    if chosen not in names:
        chosen = worst(run, library.judgement(view.run, wait=3.0))
    if not chosen:
        return [notice("No layers", "Nothing was captured in this run yet, so there is no layer to show.")]
    classes: dict[str, str] = dict(zip(SHOWN, available(run, chosen), strict=True))
    return [
        toolbar(
            view,
            _selector(run, chosen),
            choice(view, "view", {"map": "Map", "ridges": "Ridges"}, "map", "Histograms as"),
            scale(view),
            choice(view, "kind", KINDS, "weight", "Quantiles of"),
        ),
        html.Div(id="layer-facts", className="facts-strip"),
        html.Div(id="layer-findings", className="findings"),
        html.Div([_card(kind, HISTOGRAMS[kind], style, classes) for kind in KINDS], className="quarters"),
        html.Div(
            [_card(name, plot, style, classes) for name, plot in CARDS.items() if name != "history"],
            className="thirds",
        ),
        _card("history", CARDS["history"], style, classes),
    ]


def _selector(run: Run, chosen: str) -> html.Div:
    tensors, modules = run.tensors()["tensor"].tolist(), module_names(run)
    groups = [{"group": "Tensors", "items": tensors}]
    if modules:
        groups.append({"group": "Outputs of modules", "items": modules})
    select = dmc.Select(
        id=state_id("tensor"),
        data=groups,  # pyright: ignore[reportArgumentType]
        value=chosen,
        searchable=True,
        allowDeselect=False,
        size="xs",
        className="tensor-select",
        maxDropdownHeight=420,
        nothingFoundMessage="no layer of that name",
        **aria("layer"),
    )
    previous = html.Button("‹", id="layer-previous", title="previous layer (key k)", className="icon-button")
    following = html.Button("›", id="layer-next", title="next layer (key j)", className="icon-button")
    hint = html.Span(["keys ", html.Kbd("j"), " ", html.Kbd("k")], className="dim hint")
    return html.Div(
        [
            html.Span("Layer", className="label"),
            html.Div([previous, select, following, hint], className="joined"),
        ],
        className="control grow",
    )


def _card(name: str, plot: Plot, style: Style, classes: dict[str, str]) -> html.Div:
    return html.Div(plot_card(plot, style), id=f"card-{name}", className=classes.get(name, ""))


def module_names(run: Run) -> list[str]:
    """Modules whose outputs were captured."""
    if "activation" not in run.kinds():
        return []
    present = set(run.stats("activation", None, ["tensor"])["tensor"].unique())
    return [name for name in run.modules()["module"] if name in present]


def selectable(run: Run) -> list[str]:
    """Everything the selector offers, in its order."""
    return [*run.tensors()["tensor"].tolist(), *module_names(run)]


def worst(run: Run, judged: Judgement | None) -> str:
    """The first layer of the worst finding; without one the first matrix that is trained."""
    names = selectable(run)
    known = set(names)
    for finding in [*(judged.alarms if judged else []), *(judged.findings if judged else [])]:
        for layer in finding.layers:
            if layer in known:
                return layer
    tensors = run.tensors()
    matrices = tensors[tensors["role"].isin(["matrix", "conv", "output", "embedding"])]
    trained = matrices.loc[matrices["trainable"].astype(bool), "tensor"].tolist()
    return next(iter([*trained, *matrices["tensor"], *names]), "")


def module_of(run: Run, name: str) -> str:
    """The module whose output belongs to a tensor, or the name itself when it is a module; "" for neither."""
    tensors = run.tensors()
    rows = tensors[tensors["tensor"] == name]
    if rows.empty:
        return name
    module = rows["module"].iloc[0]
    return module if isinstance(module, str) else ""


def bias_of(run: Run, name: str) -> str:
    """The small tensor whose values are shown with `name`: the bias of its module, or itself."""
    tensors = run.tensors()
    rows = tensors[tensors["tensor"] == name]
    if rows.empty:
        return ""
    if rows["role"].iloc[0] in ("bias", "norm_bias", "norm_gain", "scalar"):
        return name
    sister = name.rsplit(".", 1)[0] + ".bias" if "." in name else "bias"
    return (
        sister
        if sister in set(tensors["tensor"])
        else (name if int(rows["elements"].iloc[0]) <= 1024 else "")
    )


def draw_histogram(kind: str, scene: Scene) -> Figure:
    """One histogram over time, as a map or as ridges."""
    name = scene.text("tensor")
    name = module_of(scene.run, name) if kind == "activation" else name
    frame = scene.run.histograms(kind, name, MAX_STEPS)
    log = scene.text("scale") == "log"
    if scene.text("view") == "ridges":
        return ridgeline(frame, kind, scene.style, log=log)
    return histogram_map(frame, kind, scene.style, log=log, steps=step_range(scene.text("range")))


def draw_quantiles(scene: Scene) -> Figure:
    """The nested bands of one kind."""
    kind = scene.text("kind", "weight")
    kind = kind if kind in KINDS else "weight"
    name = scene.text("tensor")
    is_module = name not in set(scene.run.tensors()["tensor"])
    if is_module:
        kind = "activation"
    frame = scene.run.stats(kind, module_of(scene.run, name) if kind == "activation" else name)
    return quantiles(frame, KINDS[kind].lower(), scene.style, step_range(scene.text("range")))


def draw_bias(scene: Scene) -> Figure:
    """The stored values of the bias."""
    name = bias_of(scene.run, scene.text("tensor"))
    if not name:
        return message("This module has no bias.", scene.style)
    return vector(*scene.run.values(name), name, scene.style, step_range(scene.text("range")))


def draw_activity(scene: Scene) -> Figure:
    """Which units fired."""
    name = module_of(scene.run, scene.text("tensor"))
    return activity(*scene.run.activity("activation", name), scene.style, step_range(scene.text("range")))


def draw_history(scene: Scene) -> Figure:
    """Norms, ratio and drift."""
    run, name = scene.run, scene.text("tensor")
    frames = (
        run.stats("weight", name),
        run.stats("gradient", name),
        run.stats("update", name),
        run.drift(name),
    )
    return history(*frames, scene.style, step_range(scene.text("range")))


def _histogram(kind: str, explain: str, good: str, bad: str) -> Plot:
    return Plot(
        f"histogram-{kind}",
        f"{KINDS[kind]} histogram",
        explain,
        lambda scene: draw_histogram(kind, scene),
        ("tensor", "view", "scale"),
        good,
        bad,
        height=240,
        keep=("tensor", "view", "scale"),
    )


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
    "quantile": Plot(
        "quantile-plot",
        "Quantiles",
        "The bands hold 50, 90, 98 and 100 % of the elements; the line is the median.",
        draw_quantiles,
        ("tensor", "kind"),
        "Bands of steady width.",
        "Bands that open like a funnel, or close to a line.",
        height=270,
        keep=("tensor", "kind"),
    ),
    "bias": Plot(
        "bias-plot",
        "Bias values",
        "Each element over time.",
        draw_bias,
        ("tensor",),
        "Elements that settle.",
        "An element that runs away, or all of them standing still.",
        height=270,
        keep=("tensor",),
    ),
    "activity": Plot(
        "activity-plot",
        "Active units",
        "Blue: the unit was not zero for some sample of the capture.",
        draw_activity,
        ("tensor",),
        "Units that take turns.",
        "A row that stays red is dead.",
        height=270,
        keep=("tensor",),
    ),
    "history": Plot(
        "history-plot",
        "Norms, update ratio and drift",
        "Drift is |w − reference| ÷ |reference|. Dotted green: an update of a thousandth of the weight.",
        draw_history,
        ("tensor",),
        "An update ratio near 10⁻³, norms that level off.",
        "A gradient norm that falls or rises by decades, a weight norm that grows without end.",
        height=460,
        keep=("tensor",),
    ),
}
PLOTS = (*HISTOGRAMS.values(), *CARDS.values())


def facts(run: Run, name: str) -> list[Any]:
    """What the log knows about a tensor or module, as short facts."""
    tensors = run.tensors()
    rows = tensors[tensors["tensor"] == name]
    if rows.empty:
        modules = run.modules()
        kind = modules.loc[modules["module"] == name, "type"]
        return [
            _fact("module", kind.iloc[0] if len(kind) else name),
            _fact("depth", _depth(modules, name, "module")),
        ]
    row = rows.iloc[0]
    shape = " × ".join(str(n) for n in row["shape"])
    items = [
        _fact("role", str(row["role"]).replace("_", " ")),
        _fact("shape", shape or "scalar"),
        _fact("elements", integer(row["elements"])),
        _fact("type", str(row["dtype"]).removeprefix("torch.")),
        _fact("state", str(row["state"]).replace("_", " ")),
        _fact("depth", _depth(tensors, name, "tensor")),
    ]
    latest = run.stats("weight", name).tail(1)
    if len(latest):
        last = latest.iloc[0]
        items += [
            _fact("norm", number(last["norm"])),
            _fact("mean", number(last["mean"])),
            _fact("std", number(last["std"])),
        ]
        bad = int(last["nans"] + last["infs"])
        items += [_fact("NaN or infinite", integer(bad))] if bad else []
    aliases = (
        [alias for alias in row["names"] if alias != name] if isinstance(row["names"], list | tuple) else []
    )
    return [*items, *([_fact("tied to", ", ".join(aliases))] if aliases else [])]


def _depth(frame: Any, name: str, column: str) -> str:
    place = int(np.argmax((frame[column] == name).to_numpy()))
    return f"{place + 1} of {len(frame)}"


def _fact(label: str, value: str) -> html.Span:
    return html.Span([html.Span(label, className="dim"), " ", html.B(value)], className="fact")


def about(judged: Judgement | None, name: str, module: str) -> list[Any]:
    """The findings that name this layer."""
    return [
        f for f in (judged.findings if judged else []) if name in f.layers or (module and module in f.layers)
    ]


def available(run: Run, name: str) -> list[str]:
    """Class names of the cards in SHOWN: hidden where there is nothing to show."""
    kinds, is_tensor = set(run.kinds()), name in set(run.tensors()["tensor"])
    output = "activation" in kinds and module_of(run, name) in set(module_names(run))
    units = output and len(run.activity("activation", module_of(run, name))[0]) > 0
    has = {
        "weight": is_tensor,
        "gradient": is_tensor,
        "update": is_tensor and "update" in kinds,
        "activation": output,
        "bias": bool(bias_of(run, name)),
        "activity": bool(units),
        "history": is_tensor,
    }
    return ["" if has[card] else "hidden" for card in SHOWN]


def register(app: Dash, library: Library) -> None:
    """What is known about the layer, and which cards it has."""

    @app.callback(
        Output("layer-facts", "children"),
        Output("layer-findings", "children"),
        *[Output(f"card-{card}", "className") for card in SHOWN],
        Input(state_id("tensor"), "value"),
        Input("pulse", "data"),
        Input("verdict", "data"),
        State("page", "data"),
    )
    def describe(name: str, _pulse: Any, _verdict: Any, page: dict[str, Any]) -> list[Any]:
        try:
            run = library.run(page["run"])
            judged = library.judgement(page["run"], wait=0.5)
        except (RunError, OSError) as error:
            return [[notice("This run cannot be read", str(error), "critical")], [], *([""] * len(SHOWN))]
        items = [finding_item(page["run"], f) for f in about(judged, name, module_of(run, name))]
        return [facts(run, name), items, *available(run, name)]
