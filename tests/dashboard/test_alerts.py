"""Alerts: events as ranges and kinds, the list that stays short, the timeline."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwatch.dashboard.figures.theme import LIGHT, Style
from layerwatch.dashboard.figures.timeline import MOST, lanes, timeline
from layerwatch.dashboard.happenings import KINDS, Happening, collapsed, happenings, narrowed
from layerwatch.dashboard.judging import Judgement
from layerwatch.dashboard.pages import alerts
from layerwatch.dashboard.queries import Library
from layerwatch.dashboard.shell import open_page
from layerwatch.dashboard.urls import View
from layerwatch.monitor.findings import Finding
from tests.dashboard.test_pages import controls, figures, parts

WIDE = {"theme": "light", "narrow": False}


class Logged:
    """A run with these events and no scalars."""

    last_step = 1000

    def __init__(self, events: list[tuple[int, str, str]]) -> None:
        rows = [(step, 1.7e9 + place, event, message) for place, (step, event, message) in enumerate(events)]
        self._events = pd.DataFrame(rows, columns=["step", "time", "event", "message"])

    def events(self) -> pd.DataFrame:
        return self._events

    def scalar_names(self) -> list[str]:
        return []


def read(*events: tuple[int, str, str]) -> list[Happening]:
    return happenings(Logged(list(events)), None)  # pyright: ignore[reportArgumentType]


@given(st.lists(st.integers(0, 300), max_size=120))
def test_skipped_steps_become_ranges(steps: list[int]) -> None:
    found = collapsed(steps, most=1000)
    expected: list[list[int]] = []
    for step in sorted(set(steps)):
        if expected and step == expected[-1][1] + 1:
            expected[-1][1] = step
        else:
            expected.append([step, step])
    assert [[first, last] for first, last, _ in found] == expected
    assert sum(count for _, _, count in found) == len(set(steps))


@given(st.sets(st.integers(0, 10_000), min_size=1, max_size=300), st.integers(1, 20))
def test_many_ranges_are_joined_and_no_step_is_lost(steps: set[int], most: int) -> None:
    found = collapsed(sorted(steps), most)
    assert 1 <= len(found) <= most
    assert sum(count for _, _, count in found) == len(steps)
    assert all(any(first <= step <= last for first, last, _ in found) for step in steps)
    assert all(one[1] < two[0] for one, two in pairwise(found))


def test_an_event_says_its_steps_and_its_kind() -> None:
    gap = "15 captures could not be written from step 60 to 74 (No space left); written again from step 75"
    found = {
        h.title: h
        for h in read(
            (0, "start", "process 1"),
            (75, "gap", gap),
            (166, "thinning ended", "30 captures were left out since step 136"),
            (200, "accident", "the loss is nan"),
            (201, "skipped", "overflow"),
            (202, "skipped", "overflow"),
            (250, "checkpoint", "out/step250.pt, 45,210 bytes"),
            (260, "alert", "sent to team: critical nonfinite"),
            (270, "alert", "not sent to mail (connection refused; 4 attempts): critical nonfinite"),
            (300, "never heard of", "?"),
            (301, "critical", "an event that is named like a severity"),
            (-1, "note", "before the first step"),
        )
    }
    lost, thinned, skipped = found["Lost captures"], found["Thinning ends"], found["2 skipped steps"]
    assert (lost.kind, lost.first, lost.last, lost.tone) == ("gap", 60, 74, "warning")
    assert (thinned.kind, thinned.first, thinned.last) == ("thinned", 136, 166)
    assert (skipped.first, skipped.last, skipped.text) == (201, 202, "overflow")
    assert found["Accident"].tone == "critical"
    assert (found["Checkpoint"].kind, found["Checkpoint"].tone) == ("checkpoint", "event")
    sent, lost = found["Alert sent"], found["Alert not sent"]
    assert (sent.kind, sent.tone, sent.text) == ("alert", "event", "to team: critical nonfinite")
    assert (lost.kind, lost.tone) == ("untold", "warning")
    assert lost.text == "to mail (connection refused; 4 attempts): critical nonfinite"
    assert found["Never heard of"].kind == "other"
    assert found["Critical"].kind == "other"
    assert {h.kind for h in found.values()} <= set(KINDS)


def test_the_list_is_narrowed_by_kind_severity_and_word() -> None:
    made = [
        Happening("critical", 5, 9, None, "Dead units", "most are silent", ("net.3",), "dead_units"),
        Happening("info", 4, 9, None, "Loss spike", "it comes back", (), "loss_spike"),
        Happening("restart", 0, 0, 1.0, "Start", "process 1"),
    ]
    assert narrowed(made, "all", "any", "") == made
    assert [h.title for h in narrowed(made, "alarms", "any", "")] == ["Dead units"]
    assert [h.title for h in narrowed(made, "findings", "any", "")] == ["Dead units", "Loss spike"]
    assert [h.title for h in narrowed(made, "events", "any", "")] == ["Start"]
    assert [h.title for h in narrowed(made, "all", "restart", "")] == ["Start"]
    assert [h.title for h in narrowed(made, "all", "nonsense", " NET.3 ")] == ["Dead units"]
    assert narrowed(made, "alarms", "any", "nothing like it") == []


def test_thousands_of_events_stay_short_and_fast() -> None:
    events = [(step, "note", f"note {step}") for step in range(20_000)]
    events += [(step, "skipped", "overflow") for step in range(0, 20_000, 3)]
    run: Any = Logged(events)
    began = time.process_time()
    data = alerts.listed(run, "x", Judgement("s"), "all", "any", "")
    figure = timeline(happenings(run, None), 20_000, Style())
    assert time.process_time() - began < 5
    assert len(data["rows"]) == alerts.MOST
    assert f"the latest {alerts.MOST} are shown" in data["said"]
    assert len(json.dumps(data)) < 120_000
    assert all(len(trace["x"]) <= 3 * MOST for trace in figure["data"])
    found = alerts.listed(run, "x", Judgement("s"), "all", "any", "note 777")
    assert {row["text"] for row in found["rows"]} == {"note 777", *(f"note 777{i}" for i in range(10))}


def test_every_line_leads_to_its_evidence() -> None:
    f = Finding("x", "dead_units", "critical", ("a", "b", "c", "d"), 100, 200, "silent")
    run: Any = Logged([(300, "restart", "again")])
    rows = alerts.listed(run, "x", Judgement("s", [f]), "all", "any", "")["rows"]
    event, alarm = rows
    assert alarm["link"]["href"].startswith("/run/x/overview?finding=dead_units&range=60%3A215&tensor=a")
    assert [layer["text"] for layer in alarm["layers"]] == ["a", "b", "c"]
    assert alarm["more"] == "and 1 more"
    assert event["link"]["href"].startswith("/run/x/overview?range=")
    assert len({row["key"] for row in rows}) == 2


def test_the_same_list_is_not_sent_twice(library: Library) -> None:
    run, judged = library.run("healthy"), library.judgement("healthy", wait=150)
    one, two = (alerts.listed(run, "healthy", judged, "all", "any", "") for _ in range(2))
    assert one["stamp"] == two["stamp"]
    other = alerts.listed(run, "healthy", judged, "events", "any", "start")
    assert other["stamp"] != one["stamp"]


def test_what_could_not_be_judged_is_listed() -> None:
    run: Any = Logged([])
    data = alerts.listed(run, "x", Judgement("s", notes=["no losses"]), "all", "any", "")
    assert data["notes"] == ["no losses"]
    assert "Nothing to report" in data["said"]
    assert "still reading" in alerts.listed(run, "x", None, "all", "any", "")["said"]
    assert "stopped: oh" in alerts.listed(run, "x", Judgement("s", error="oh"), "all", "any", "")["said"]


def test_the_timeline_has_a_lane_for_each_kind() -> None:
    found = read((0, "start", "<b>x</b>"), (50, "error", "disk"), (60, "restart", "y"))
    found.append(Happening("warning", 10, 40, None, "Overfitting", "why", (), "overfitting"))
    assert lanes(found) == ["warning", "error", "restart"]
    figure = timeline(found, 99, Style())
    assert go.Figure(figure)
    assert figure["layout"]["yaxis"]["ticktext"] == [KINDS[kind] for kind in lanes(found)]
    bar, errors, starts = figure["data"]
    assert (bar["x"], bar["y"]) == ([10, 40], [0, 0])
    assert bar["line"]["color"] == LIGHT.warning
    assert errors["x"] == [50, 50]
    assert starts["x"] == [0, 0, None, 60, 60]
    assert "<b>" not in starts["customdata"][0][2]
    low, high = figure["layout"]["xaxis"]["range"]
    assert low < 0
    assert high > 99
    assert timeline(found, 99, Style(), (5.0, 20.0))["layout"]["xaxis"]["range"] == [5.0, 20.0]


def test_nothing_at_all_is_said_in_words() -> None:
    assert "Nothing happened" in timeline([], 9, Style())["layout"]["meta"]["said"]


@pytest.mark.parametrize("run", ["healthy", "vanishing", "nested/blow-up"])
def test_the_page_opens_with_its_filters(library: Library, run: str) -> None:
    library.judgement(run, wait=150)
    params = {"show": "events", "kind": "restart", "filter": "process"}
    _, _, body = open_page(library, View("alerts", run, params), {})
    values = controls(body)
    assert (values["show"], values["kind"], values["filter"]) == ("events", "restart", "process")
    (store,) = [p for p in parts(body) if getattr(p, "id", "") == "alerts-data"]
    rows = store.to_plotly_json()["props"]["data"]["rows"]
    assert [row["title"] for row in rows] == ["Start"]
    drawn = figures(library, "alerts", run, WIDE, **params)["timeline-plot"]
    assert [trace["name"] for trace in drawn["data"]] == [KINDS["restart"]]
