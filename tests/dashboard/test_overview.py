"""The overview: findings to choose from, the evidence of each problem code, the small plots of scalars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from layerwatch.dashboard.excerpt import case
from layerwatch.dashboard.figures import curves, loss
from layerwatch.dashboard.figures.evidence import Evidence, Region, evidence
from layerwatch.dashboard.figures.theme import DARK, LIGHT, Style
from layerwatch.dashboard.pages import evidence as panel
from layerwatch.dashboard.pages import overview
from layerwatch.dashboard.proofs import vanishing
from layerwatch.dashboard.quantities import QUANTITIES
from layerwatch.dashboard.queries import Library
from layerwatch.dashboard.rules import RULES, rule_of
from layerwatch.dashboard.shell import open_page
from layerwatch.dashboard.urls import View, step_range
from layerwatch.monitor import Run
from layerwatch.monitor.detectors import History, registered
from layerwatch.monitor.detectors.gradients import leverage
from layerwatch.monitor.findings import CAUSES, Finding
from layerwatch.monitor.problems import problems
from tests.dashboard.test_figures import frame
from tests.dashboard.test_pages import controls, figures, parts, text
from tests.monitor.made_logs import make_run as made_run
from tests.ranks import parted_run

WIDE = {"theme": "light", "narrow": False}


def finding(
    problem: str, layers: tuple[str, ...] = (), severity: Any = "critical", **numbers: float
) -> Finding:
    return Finding("x", problem, severity, layers, 10, 30, "why", dict(numbers), "what to do")


@pytest.fixture(scope="module")
def vanished(library: Library) -> Finding:
    judged = library.judgement("vanishing", wait=150)
    assert judged is not None
    return judged.alarms[0]


# ---- rules and evidence


def test_labels_are_at_the_head_in_full_and_only_where_there_are_any(tmp_path: Path) -> None:
    note = "<b>warm-up</b>\nof 500 steps " + "and more " * 50
    made_run(tmp_path / "told", tags=["baseline", "lr-sweep"], owner="ana", note=note)
    made_run(tmp_path / "silent")
    style = Style(LIGHT)
    head = overview.layout(View("overview", "told", {}), Library(tmp_path), style)[0]
    chips = [part for part in parts([head]) if getattr(part, "className", "") == "tag"]
    assert [chip.children for chip in chips] == ["baseline", "lr-sweep"]
    assert note in text([head])
    assert "ana" in text([head])
    assert overview.layout(View("overview", "silent", {}), Library(tmp_path), style)[0].className == "kpis"


def test_ranks_that_part_are_drawn(tmp_path: Path) -> None:
    run = parted_run(tmp_path / "parted")
    (found,) = [f for f in run.findings() if f.problem == "replica_desync"]
    proof = rule_of("replica_desync").read(case(run, found))
    (steps, differing), *_ = proof.curves.values()
    assert list(zip(steps, differing, strict=True)) == [(0, 0), (100, 1), (200, 1)]


def test_every_problem_code_has_a_rule_and_a_map() -> None:
    codes = {problem for problem, _ in registered()[0]}
    assert codes == set(RULES)
    assert set(CAUSES) <= set(RULES)
    for rule in RULES.values():
        assert rule.metric in QUANTITIES
    assert rule_of("somebody's own").metric in QUANTITIES


@pytest.mark.parametrize("problem", [*RULES, "somebody's own"])
@pytest.mark.parametrize("steps", [None, (5.0, 25.0)])
def test_every_problem_code_has_evidence_that_can_be_drawn(
    library: Library, problem: str, steps: tuple[float, float] | None
) -> None:
    drawn = 0
    for name, layers in (("healthy", ("2.weight", "1")), ("nested/blow-up", ()), ("finetune", ("0.weight",))):
        found = rule_of(problem).read(
            case(library.run(name), finding(problem, layers, threshold=0.5), "", steps)
        )
        assert found.what
        figure = evidence(found, Region(10, 20, "critical"), Style(DARK), steps)
        assert go.Figure(figure)
        drawn += bool(figure["data"])
    lacking = {
        "over_clipping",
        "attention_collapse",
        "data_fault",
        "stale_gradients",
        "over_regularised",
        "replica_desync",
    }  # what these runs lack
    assert drawn or problem in lacking


def test_the_evidence_is_what_the_detector_has_computed(library: Library) -> None:
    run = library.run("vanishing")
    names = ("0.weight", "2.weight")
    found = vanishing(case(run, finding("vanishing_gradients", names, threshold=1e-3)))
    history = History(run)
    expected = leverage(history, names)[:, 0]
    steps, values = found.curves["0.weight"]
    np.testing.assert_array_equal(steps, history.steps)
    np.testing.assert_allclose(values, expected)
    (_, last), (_, limit) = found.typical.values()
    np.testing.assert_allclose(limit, last * 1e-3)
    assert np.nanmax(values) < np.nanmin(limit)


def test_a_range_reads_only_its_part_and_a_selected_layer_comes_first(library: Library) -> None:
    run = library.run("healthy")
    names = tuple(run.tensors()["tensor"])
    rule = rule_of("weight_growth")
    found = rule.read(case(run, finding("weight_growth", names, threshold=10.0), names[2], (20.0, 30.0)))
    assert next(iter(found.curves)) == names[2]
    steps = found.curves[names[2]][0]
    assert steps.min() >= 17
    assert steps.max() <= 33
    whole = rule.read(case(run, finding("weight_growth", names)))
    norms = run.stats("weight", names[0])["norm"].to_numpy()
    first = run.stats("initial_weight", names[0])["norm"].iloc[0]
    np.testing.assert_allclose(whole.curves[names[0]][1], norms / first)


def test_the_region_is_shaded_and_the_threshold_is_a_line() -> None:
    at = np.arange(40)
    found = Evidence(
        "update ratio", {"a": (at, np.full(40, 0.2)), "b": (at, np.full(40, 0.02))}, {}, {"limit": 0.1}, True
    )
    figure = evidence(found, Region(12, 20, "warning"), Style(LIGHT), (0, 39), "b")
    box, edge, limit = figure["layout"]["shapes"]
    assert (box["x0"], box["x1"], edge["x0"]) == (12, 20, 12)
    assert (limit["y0"], limit["y1"]) == (0.1, 0.1)
    assert figure["layout"]["annotations"][0]["text"] == "limit 0.1"
    assert figure["layout"]["annotations"][0]["y"] == pytest.approx(-1)  # plotly wants the logarithm here
    low, high = figure["layout"]["yaxis"]["range"]
    assert low < -1 < high
    widths = {trace["name"]: trace["line"]["width"] for trace in figure["data"]}
    assert widths["b"] > widths["a"]


def test_evidence_that_was_not_captured_is_said() -> None:
    nothing = Evidence("entropy", {"a": (np.arange(3), np.full(3, np.nan))})
    figure = evidence(nothing, Region(0, 2, "info"), Style())
    assert "entropy" in figure["layout"]["meta"]["said"]


# ---- the list


@pytest.mark.parametrize(
    ("first", "last", "end"), [(0, 399, 399), (94, 239, 239), (7, 7, 1000), (0, 0, 0), (990, 2000, 999)]
)
def test_the_range_of_a_finding_shows_its_steps(first: int, last: int, end: int) -> None:
    found = Finding("x", "loss_spike", "info", (), first, last, "")
    shown = step_range(panel.shown_range(found, end))
    assert shown is not None
    assert shown[0] <= first < shown[1]
    assert shown[0] >= 0


def test_a_finding_is_a_button_with_its_layer_and_range(library: Library, vanished: Finding) -> None:
    judged = library.judgement("vanishing", wait=150)
    items = panel.finding_list("vanishing", judged, 59)
    buttons = [p.to_plotly_json()["props"] for p in parts(items) if type(p).__name__ == "Button"]
    assert buttons[0]["data-finding"] == vanished.problem
    assert buttons[0]["data-tensor"] == vanished.layers[0]
    assert step_range(buttons[0]["data-range"])
    links = [getattr(p, "href", "") for p in parts(items) if type(p).__name__ == "A"]
    assert f"/run/vanishing/layer?tensor={vanished.layers[0]}" in links


def test_findings_stand_under_their_severity() -> None:
    from layerwatch.dashboard.judging import Judgement

    found = [finding("loss_spike", severity="info"), finding("overfitting"), finding("nonfinite")]
    items = panel.finding_list("x", Judgement("s", found), 59)
    heads = [text([item]) for item in items if type(item).__name__ == "H2"]
    assert heads == ["Critical 2", "Remarks 1"]
    (item,) = panel.finding_list("x", Judgement("s"), 59)
    assert "good" in item.className
    assert "No alarms" in text([item])


def test_texts_that_grow_do_not_change_the_shape_of_the_list() -> None:
    from layerwatch.dashboard.judging import Judgement

    one, two = (Judgement("s", [finding("overfitting", threshold=value)]) for value in (1.0, 2.0))
    assert panel.shape(one) == panel.shape(two)
    assert panel.said(one.findings[0]) != panel.said(two.findings[0])
    assert panel.shape(one) != panel.shape(Judgement("s"))
    ids = [p.to_plotly_json()["props"].get("id") for p in parts(panel.finding_list("x", one, 59))]
    named = [place["part"] for place in ids if isinstance(place, dict)]
    assert sorted(named) == sorted(panel.said(one.findings[0]))


def test_a_link_opens_a_finding_with_its_words(library: Library, vanished: Finding) -> None:
    _, _, body = open_page(library, View("overview", "vanishing", {"finding": vanished.problem}), {})
    said = text(body)
    assert problems()[vanished.problem].rule in said
    assert vanished.advice in said
    links = [getattr(p, "href", "") for p in parts(body) if type(p).__name__ == "A"]
    assert any(f"gradient-flow?metric={rule_of(vanished.problem).metric}&range=" in link for link in links)
    drawn = figures(library, "overview", "vanishing", WIDE, finding=vanished.problem)
    assert drawn["evidence-plot"]["layout"]["shapes"][0]["name"] == "region"
    assert drawn["loss-plot"]["layout"]["shapes"][0]["name"] == "region"


def test_without_a_choice_there_is_no_evidence(library: Library) -> None:
    assert figures(library, "overview", "vanishing", WIDE)["evidence-plot"]["data"] == []
    gone = figures(library, "overview", "vanishing", WIDE, finding="<script>")["evidence-plot"]
    assert "no such finding" in gone["layout"]["meta"]["said"]
    _, _, body = open_page(library, View("overview", "healthy"), {})
    assert controls(body)["finding"] == ""


# ---- scalars


def test_small_plots_are_named_in_order_pins_first() -> None:
    assert curves.ordered(["a", "b", "c"], ["c", "gone", "b", "c"]) == ["c", "b", "a"]
    scalars = {f"s{i}": frame([1, 2, 3]) for i in range(40)}
    figure = curves.small_multiples(scalars, Style())
    assert figure["layout"]["meta"]["panels"] == list(scalars)
    assert len([key for key in figure["layout"] if key.startswith("yaxis")]) == 40
    assert figure["layout"]["xaxis2"]["matches"] == "x"
    narrow = curves.small_multiples(scalars, Style(narrow=True))
    assert narrow["layout"]["xaxis2"]["domain"] == narrow["layout"]["xaxis"]["domain"]
    assert go.Figure(figure)


def test_a_filter_leaves_every_panel_its_size(library: Library) -> None:
    two = {"a": frame([1, 2]), "b": frame([1, 2])}
    one = curves.small_multiples({"a": two["a"]}, Style(), slots=9)
    both = curves.small_multiples(two, Style(), slots=9)
    assert one["layout"]["yaxis"]["domain"] == both["layout"]["yaxis"]["domain"]


def test_smoothing_keeps_the_raw_curve_faint_behind() -> None:
    traces, _ = curves.panel("x", frame([1, 3, 1, 3]), Style(), curves.Look(smoothing=0.9))
    assert traces[0]["y"] == [1, 3, 1, 3]
    assert max(traces[1]["y"]) < 3


def test_outliers_do_not_set_the_axis_when_ignored() -> None:
    values = [*np.linspace(1, 2, 200), 1e6]
    assert curves.limits(np.array(values)) == pytest.approx((1.02, 1.98), abs=0.02)
    _, shown = curves.panel("x", frame(values), Style(), curves.Look(axes="linear", robust=True))
    assert shown["range"][1] < 3
    _, whole = curves.panel("x", frame(values), Style(), curves.Look(axes="linear"))
    assert "range" not in whole
    assert curves.limits(np.linspace(0, 1, 100)) is None  # nothing lies outside
    drawn = loss.loss(frame(values), frame([]), [], Style(), robust=True)
    assert drawn["layout"]["yaxis"]["range"][1] < 3
    assert max(drawn["data"][0]["y"]) == 1e6  # the point itself stays


def test_nan_and_infinity_are_marked_in_red() -> None:
    traces, _ = curves.panel("x", frame([1, np.nan, np.inf, 2]), Style(), curves.Look())
    marks = traces[-1]
    assert marks["x"] == [1, 2]
    assert marks["marker"]["color"] == LIGHT.critical
    many, _ = curves.panel("x", frame([np.nan] * 5000), Style(), curves.Look())
    assert len(many[-1]["x"]) <= curves.MAX_MARKS


def test_a_zoomed_panel_is_read_again_point_by_point() -> None:
    traces, _ = curves.panel("x", frame(list(range(9000))), Style(), curves.Look(steps=(100, 200)))
    assert traces[0]["x"] == list(range(99, 202))


# ---- the gap


def test_the_noise_of_the_gap_is_a_standard_error() -> None:
    rng = np.random.default_rng(0)
    train = pd.DataFrame({"step": np.arange(60), "value": rng.normal(2, 1, 60)})
    val = pd.DataFrame({"step": [19, 19, 19, 39, 59], "value": [3.0, 4.0, 5.0, 6.0, 7.0]})
    found = loss.gap(train, val)
    assert found["step"].tolist() == [19, 39, 59]
    for row, (start, stop) in zip(found.itertuples(), ((0, 20), (20, 40), (40, 60)), strict=True):
        window = train["value"].to_numpy()[start:stop]
        repeats = val.loc[val["step"] == row.step, "value"].to_numpy()
        error = window.var(ddof=1) / len(window)
        error += repeats.var(ddof=1) / len(repeats) if len(repeats) > 1 else 0
        assert row.noise == pytest.approx(np.sqrt(error))
        assert row.gap == pytest.approx(repeats.mean() - window.mean())


def test_a_loss_that_blows_up_later_leaves_the_noise_before_it_alone() -> None:
    train = frame([1.0, 1.1, 0.9, 1e28])
    found = loss.gap(train, pd.DataFrame({"step": [2, 3], "value": [1.0, 2.0]}))
    assert found["noise"].iloc[0] == pytest.approx(np.std([1.0, 1.1, 0.9], ddof=1) / np.sqrt(3))
    assert np.isnan(found["noise"].iloc[1])


def test_key_figures_are_those_of_the_log(library: Library, runs_root: Path) -> None:
    run = Run(runs_root / "healthy")
    found = overview.numbers(run, library.judgement("healthy", wait=150))
    assert found["Steps"][0] == "60"
    assert found["Alarms"][0] == "0"
    json.dumps(found)
