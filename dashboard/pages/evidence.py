"""The findings of a run as a list to choose from, and what proves the one that is chosen."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dash import ALL, ClientsideFunction, Dash, Input, Output, State, ctx, dcc, html, no_update

from ...monitor import RunError
from ...monitor.problems import problems
from ..components import aria, badge, hidden, layer_link, notice
from ..excerpt import case
from ..figures.evidence import Region, evidence
from ..figures.theme import Figure, Style, message
from ..plots import Plot, Scene, plot_card
from ..rules import rule_of
from ..text import integer, number, words
from ..urls import View, href, problem_href, step_range

if TYPE_CHECKING:
    from ...monitor.findings import Finding
    from ..judging import Judgement
    from ..queries import Library

GROUPS = {"critical": "Critical", "warning": "Warnings", "info": "Remarks"}
NONE = "Choose a finding to see what proves it."
SHOWN_LAYERS = 4


def region(finding: Finding) -> Region:
    """The steps that a finding holds for."""
    return Region(finding.first_step, max(finding.last_step, finding.first_step), finding.severity)


def shown_range(finding: Finding, last_step: int) -> str:
    """The step range that shows a finding with what came before and after, as the URL has it."""
    where = region(finding)
    return around(where.first, where.last, last_step)


def around(first: int, last: int, last_step: int) -> str:
    """A step range with a margin, as the URL has it."""
    length = max(last - first, round(0.02 * max(last_step, 1)), 4)
    low = max(first - round(0.4 * length), 0)
    high = min(last + round(0.15 * length), max(last_step, first + 1))
    return f"{low}:{max(high, low + 1)}"


def chosen(judged: Judgement | None, problem: str) -> Finding | None:
    """The finding of a problem code."""
    return next((f for f in judged.findings if f.problem == problem), None) if judged else None


def by_severity(findings: list[Finding]) -> list[Finding]:
    """The most severe first; among equals root causes first, as the detectors have them."""
    return sorted(findings, key=lambda f: list(GROUPS).index(f.severity))


# ---- the list


def finding_list(name: str, judged: Judgement | None, last_step: int) -> list[Any]:
    """The findings under their severities; a plain green sentence without an alarm."""
    if judged is None:
        return [notice("Checking", "The detectors are reading the log.")]
    if judged.error:
        text = f"The detectors stopped: {judged.error}. The plots are not affected."
        return [notice("Not judged", text, "warning")]
    items: list[Any] = []
    if not judged.alarms:
        said = "Every detector that could judge this run found it healthy."
        items.append(notice("No alarms", said, "good"))
    for severity, word in GROUPS.items():
        group = [f for f in judged.findings if f.severity == severity]
        if group:
            items.append(html.H2([word, html.Span(str(len(group)), className="dim")], className="group"))
            items += [finding_item(name, f, last_step) for f in group]
    if judged.notes:
        notes = html.Ul([html.Li(note) for note in judged.notes])
        items.append(html.Details([html.Summary(f"{len(judged.notes)} things could not be judged"), notes]))
    return items


def said(finding: Finding) -> dict[str, str]:
    """The texts of a finding that may change while the run grows."""
    where = region(finding)
    span = integer(where.first) + (f" – {integer(where.last)}" if where.last > where.first else "")
    numbers = [
        f"{words(key).lower()} {number(value)}"
        for key, value in finding.evidence.items()
        if not isinstance(value, str) or len(value) <= 24  # longer ones repeat the summary
    ]
    return {
        "since": f"step {span}",
        "summary": finding.summary,
        "facts": " · ".join(numbers),
        "advice": finding.advice,
    }


def finding_item(run: str, finding: Finding, last_step: int) -> html.Article:
    """What, where, since when, what to try; its head is a button that shows the evidence."""
    text, problem = said(finding), finding.problem
    known = {
        "data-finding": problem,
        "data-range": shown_range(finding, last_step),
        "data-tensor": finding.layers[0] if finding.layers else "",
        "aria-pressed": "false",
        "aria-controls": "evidence",
    }

    def part(key: str, tag: Any = html.Span, **more: Any) -> Any:
        return tag(text[key], id={"finding": problem, "part": key}, **more)

    head = html.Button(
        [
            badge(finding.severity),
            html.Span(words(problem), className="finding-name"),
            part("since", className="since"),
            html.Span("Evidence", className="finding-more"),
        ],
        className="finding-head",
        **known,  # pyright: ignore[reportArgumentType]
    )
    layers: list[Any] = [layer_link(run, layer) for layer in finding.layers[:SHOWN_LAYERS]]
    if len(finding.layers) > SHOWN_LAYERS:
        layers.append(html.Span(f"and {len(finding.layers) - SHOWN_LAYERS} more", className="dim"))
    advice = html.P([html.B("Try: "), part("advice")], className="finding-advice") if finding.advice else None
    return html.Article(
        [
            head,
            part("summary", html.P, className="finding-summary"),
            html.Div(layers, className="finding-layers") if layers else None,
            part("facts", html.P, className="facts dim"),
            advice,
            html.A("About this problem", href=problem_href(problem), className="finding-about")
            if problem in problems()
            else None,
        ],
        className=f"finding {finding.severity}",
    )


def shape(judged: Judgement | None) -> str:
    """What the list is built from besides its texts: the same shape, the same elements."""
    if judged is None or judged.error:
        return str(judged)
    return json.dumps([[[f.problem, f.severity, f.layers] for f in judged.findings], judged.notes])


# ---- the evidence


def panel(view: View, library: Library, style: Style) -> html.Div:
    """The plot of the chosen finding, and what it means in words."""
    text = words_of(library, view.run, view.params.get("finding", ""))
    lines = [
        html.Div([html.H3(word), html.P(text[key], id=f"evidence-{key}")], id=f"evidence-{key}-row")
        for key, word in (("rule", "Rule"), ("facts", "Measured"), ("advice", "Try first"))
    ]
    links = [
        html.A(text["layer"][0], href=text["layer"][1], id="evidence-layer", className="action"),
        html.A(text["flow"][0], href=text["flow"][1], id="evidence-flow", className="pill"),
        html.A("About this problem", href=text["about"], id="evidence-about", className="pill"),
        html.Button("Close", id="evidence-close", className="pill"),
    ]
    name = html.Span(text["name"], id="evidence-name")
    words_card = html.Section(
        [*lines, html.Div(links, className="evidence-links")], className="card evidence-words"
    )
    return html.Div(
        [
            plot_card(EVIDENCE, style, explain=name),
            words_card,
            hidden(view, "finding"),
            hidden(view, "tensor"),
            dcc.Store(id="findings-view"),
        ],
        id="evidence",
        className="evidence" if view.params.get("finding") else "evidence hidden",
        **aria("Evidence"),  # pyright: ignore[reportArgumentType]
        role="region",
    )


def words_of(library: Library, name: str, problem: str) -> dict[str, Any]:
    """Everything that is said beside the plot; links as (text, address)."""
    judged = library.judgement(name, wait=0.3) if problem else None
    finding = chosen(judged, problem)
    if finding is None:
        missing = "This run has no such finding (any more)." if judged and problem else NONE
        nowhere = ("Layer", href("layer", name))
        flow = ("Gradient flow", href("gradient-flow", name))
        return {
            "name": missing,
            "rule": "",
            "facts": "",
            "advice": "",
            "about": problem_href(),
            "layer": nowhere,
            "flow": flow,
        }
    text, rule = said(finding), rule_of(problem)
    run = library.run(name)
    steps = shown_range(finding, run.last_step)
    layer = finding.layers[0] if finding.layers else ""
    target = {"tensor": layer, "range": steps} if layer else {"range": steps}
    return {
        "name": f"{words(problem)}, {text['since']} (shaded). Dashed: the threshold.",
        "rule": problems()[problem].rule
        if problem in problems()
        else "This problem comes from a detector that was added; its rule is in its own documentation.",
        "about": problem_href(problem if problem in problems() else ""),
        "facts": text["facts"] or text["summary"],
        "advice": text["advice"] or "–",
        "layer": (f"Open {layer}" if layer else "Open the layers", href("layer", name, **target)),
        "flow": ("All layers in gradient flow", href("gradient-flow", name, metric=rule.metric, range=steps)),
    }


def draw(scene: Scene) -> Figure:
    """The quantity that the rule is about, with its steps shaded and its threshold."""
    problem = scene.text("finding")
    if not problem:
        return message(NONE, scene.style)
    judged = scene.runs.judgement(scene.name, wait=0.3)
    finding = chosen(judged, problem)
    if finding is None:
        wait = (
            "The detectors are reading the log."
            if judged is None
            else "This run has no such finding (any more)."
        )
        return message(wait, scene.style)
    steps, selected = step_range(scene.text("range")), scene.text("tensor")

    def make() -> Any:
        return rule_of(problem).read(case(scene.run, finding, selected, steps))

    found = scene.runs.memo(scene.run, ("evidence", problem, finding.layers, selected, steps), make)
    return evidence(found, region(finding), scene.style, steps, selected)


EVIDENCE = Plot(
    "evidence-plot",
    "Evidence",
    NONE,
    draw,
    ("finding", "tensor"),
    good="The curve stays on the harmless side of the dashed line, outside of the shaded steps.",
    bad="The curve has crossed the dashed line, or left what is usual, and stays there.",
    height=300,
    judged=True,
)


def register(app: Dash, library: Library) -> None:
    """Texts follow the choice and a live run; elements are built anew only when findings come or go."""

    @app.callback(
        Output("evidence-name", "children"),
        Output("evidence-rule", "children"),
        Output("evidence-facts", "children"),
        Output("evidence-advice", "children"),
        Output("evidence-layer", "children"),
        Output("evidence-layer", "href"),
        Output("evidence-flow", "children"),
        Output("evidence-flow", "href"),
        Output("evidence-about", "href"),
        Output("evidence", "className"),
        Input({"state": "finding"}, "value"),
        Input("verdict", "data"),
        State("page", "data"),
        prevent_initial_call=True,
    )
    def explain(problem: str, _verdict: Any, page: dict[str, Any]) -> tuple[Any, ...]:
        text = words_of(library, page["run"], problem or "")
        lines = (text["name"], text["rule"], text["facts"], text["advice"])
        look = "evidence" if problem else "evidence hidden"
        return *lines, *text["layer"], *text["flow"], text["about"], look

    @app.callback(
        Output("findings", "children"),
        Output("findings-shape", "data"),
        Output({"finding": ALL, "part": ALL}, "children"),
        Input("verdict", "data"),
        State("page", "data"),
        State("findings-shape", "data"),
        prevent_initial_call=True,
    )
    def follow(_verdict: Any, page: dict[str, Any], known: str) -> tuple[Any, Any, Any]:
        places = [place["id"] for place in ctx.outputs_list[2]]
        keep = [no_update] * len(places)
        try:
            run, judged = library.run(page["run"]), library.judgement(page["run"])
        except (RunError, OSError) as error:
            return [notice("This run cannot be read", str(error), "critical")], "", keep
        now = shape(judged)
        if now != known:
            return finding_list(page["run"], judged, run.last_step), now, keep
        texts = {f.problem: said(f) for f in judged.findings} if judged else {}
        return no_update, no_update, [texts[place["finding"]][place["part"]] for place in places]

    app.clientside_callback(
        ClientsideFunction("findings", "mark"),
        Output("findings-view", "data"),
        Input({"state": "finding"}, "value"),
        Input("findings", "children"),
    )
