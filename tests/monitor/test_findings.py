"""Findings: JSON, folding consequences under their cause, order, detectors that fail."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from layerwatch.monitor import detectors, findings
from layerwatch.monitor.detectors import Arrays, History, Unjudged, detector, registry
from layerwatch.monitor.findings import CAUSES, Finding, judge

BASE = Finding(
    "run", "nonfinite", "critical", ("a",), 10, 20, "It is not finite.", {"n": 1}, "Try less.", 0.9
)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> dict:
    """An empty table of detectors that restores itself."""
    detectors.registered()
    table: dict = {}
    monkeypatch.setattr(registry, "_table", table)
    return table


def empty() -> History:
    return History(Arrays())


def test_json_has_plain_types_and_null_instead_of_nan() -> None:
    finding = replace(BASE, evidence={"a": math.nan, "b": np.float64(1.5), "c": np.int64(3), "d": "x"})
    text = json.dumps(finding.to_dict(), allow_nan=False)
    assert json.loads(text)["evidence"] == {"a": None, "b": 1.5, "c": 3, "d": "x"}
    assert json.loads(text)["layers"] == ["a"]


def test_a_chain_of_consequences_is_one_finding_at_its_root(only: dict) -> None:
    chain = [("learning_rate_too_high", 2), ("exploding_gradients", 5), ("nonfinite", 9), ("not_learning", 0)]
    for problem, step in chain:
        found = replace(
            BASE, problem=problem, first_step=step, severity="warning" if step == 2 else "critical"
        )
        detector(problem)(lambda history, found=found, problem=problem: found)
        only[problem, problem] = only.pop(next(k for k in only if k[0] == problem and k[1] != problem))
    result, notes = judge(empty())
    assert [f.problem for f in result] == ["learning_rate_too_high"]
    assert notes == []
    root = result[0]
    assert root.severity == "critical"  # as bad as what it led to
    assert root.evidence["led_to"] == "not_learning, exploding_gradients, nonfinite"
    assert "not learning (step 0), exploding gradients (step 5), nonfinite (step 9)" in root.summary


def test_an_effect_before_its_cause_or_a_mere_remark_is_not_folded(only: dict) -> None:
    detector("learning_rate_too_high")(
        lambda history: replace(BASE, problem="learning_rate_too_high", first_step=50)
    )
    detector("nonfinite")(lambda history: BASE)
    assert len(only) == 2
    assert len(judge(empty())[0]) == 2


def test_alarms_come_before_remarks_and_roots_before_leaves(only: dict) -> None:
    for problem, severity in [
        ("overfitting", "critical"),
        ("frozen_parameters", "info"),
        ("symmetric_units", "warning"),
    ]:
        finding = replace(BASE, problem=problem, severity=severity, first_step=0)
        registry._table[problem, problem] = (problem, lambda history, finding=finding: finding)
    assert [f.problem for f in judge(empty())[0]] == ["symmetric_units", "overfitting", "frozen_parameters"]


def test_the_worst_of_two_detectors_of_one_problem_counts(only: dict) -> None:
    for key, severity in (("one", "info"), ("two", "critical"), ("three", "warning")):
        finding = replace(BASE, severity=severity)
        registry._table["nonfinite", key] = ("nonfinite", lambda history, finding=finding: finding)
    assert [f.severity for f in judge(empty())[0]] == ["critical"]


def test_a_detector_that_raises_is_a_note(only: dict) -> None:
    @detector("broken")
    def broken(history: History) -> None:
        raise ZeroDivisionError("by nothing")

    @detector("blind")
    def blind(history: History) -> None:
        raise Unjudged("no activations were captured")

    result, notes = judge(empty())
    assert result == []
    assert notes == [
        "blind was not judged: no activations were captured",
        "the detector of broken failed: ZeroDivisionError: by nothing",
    ]


def test_notes_of_the_same_reason_are_one_line(only: dict) -> None:
    for problem in ("blind", "deaf", "lame"):

        @detector(problem)
        def judge_it(history: History, problem: str = problem) -> None:
            raise Unjudged("no legs" if problem == "lame" else "no activations were captured")

        only[problem, problem] = only.pop(next(k for k in only if k[0] == problem))
    assert judge(empty())[1] == [
        "blind, deaf were not judged: no activations were captured",
        "lame was not judged: no legs",
    ]


def test_a_broken_plugin_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        value = "somebody.detectors"

        def load(self) -> None:
            raise ImportError("no module named somebody")

    monkeypatch.setattr(
        registry, "entry_points", lambda group: [Entry()] if group == "layerwatch.detectors" else []
    )
    registry._load_plugins.cache_clear()
    try:
        table, notes = detectors.registered()
        assert len(table) > 10
        assert notes == [
            "the detectors of 'somebody.detectors' could not be loaded: ImportError: no module named somebody"
        ]
    finally:
        registry._load_plugins.cache_clear()


def test_the_table_of_causes_has_no_circle_and_knows_every_detector() -> None:
    for problem in CAUSES:
        seen, frontier = set(), set(CAUSES[problem])
        while frontier:
            cause = frontier.pop()
            assert cause != problem, f"{problem} explains itself"
            if cause not in seen:
                seen.add(cause)
                frontier |= set(CAUSES[cause])
    assert {problem for problem, _ in detectors.registered()[0]} <= set(CAUSES)


def test_severities_ascend() -> None:
    assert findings.SEVERITIES == ("info", "warning", "critical")


def test_detectors_come_in_one_order_whatever_was_imported_first() -> None:
    ask = "print([p for p, f in registered()[0]])"
    imports = ["from layerwatch.monitor.detectors import registered"]
    backwards = [f"import layerwatch.monitor.detectors.{family}" for family in reversed(registry.FAMILIES)]
    told = []
    for lines in (imports, backwards + imports):
        command = [sys.executable, "-c", "; ".join([*lines, ask])]
        told.append(subprocess.run(command, check=True, capture_output=True).stdout)
    assert told[0] == told[1]
    assert b"exploding_gradients" in told[0]
