"""Messages on their way: nothing twice, nothing lost, whatever the channels do."""

from __future__ import annotations

import datetime as dt
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwatch.monitor.alerts import outbox as outbox_module
from layerwatch.monitor.alerts.alert import Alert
from layerwatch.monitor.alerts.channels import Undelivered
from layerwatch.monitor.alerts.config import Config, config_of
from layerwatch.monitor.alerts.delivery import Delivery
from layerwatch.monitor.alerts.outbox import LONGEST_PAUSE, Outbox
from layerwatch.monitor.alerts.records import EVENT, Record, alerted
from layerwatch.monitor.alerts.routing import Quiet
from layerwatch.monitor.alerts.teller import Teller
from tests.alert_servers import SECRET, HttpServer

MIDNIGHT = dt.datetime(2026, 11, 19, tzinfo=dt.timezone.utc).timestamp()
NIGHT = Quiet(hours=(22 * 60, 7 * 60), zone=dt.timezone.utc)


def alert(number: int = 0, severity: Any = "warning", **more: Any) -> Alert:
    return Alert(
        run=f"run{number}", key=f"k{number}", problem="dead_units", severity=severity, summary="x", **more
    )


def config(url: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Config:
    monkeypatch.setenv("HOOK_URL", url)
    monkeypatch.setenv("no_proxy", "*")
    channels = {"team": {"type": "webhook", "url_env": "HOOK_URL"}}
    return config_of({"channels": channels, "digest": "0s", **more})


# The outbox: no thread, no clock


def outcome(records: list[Record]) -> list[tuple[str, int, str]]:
    return [(r.outcome, len(r.alerts), r.reason) for r in records]


def test_failures_are_tried_again_ever_more_rarely_and_given_up() -> None:
    box = Outbox("team", give_up=3600.0, draw=lambda: 1.0)
    now, tries, records = 0.0, [], list(box.put([alert()], 0.0))
    while (wait := box.wait(now)) is not None:
        now += wait
        tries.append(now)
        records += box.failed(box.due(now), Undelivered("it is down"), now)
    assert tries[:5] == [0, 2, 6, 14, 30]
    pauses = [b - a for a, b in itertools.pairwise(tries)]
    assert max(pauses) == LONGEST_PAUSE
    assert 3600 <= tries[-1] <= 3600 + LONGEST_PAUSE
    first, last = outcome(records)
    assert first == ("delayed", 1, "it is down; it is tried again")
    assert last == ("not sent", 1, f"it is down; {len(tries)} attempts")


def test_jitter_lasting_errors_and_the_servers_own_wish() -> None:
    def pause(error: Undelivered, draw: float) -> float:
        box = Outbox("team", give_up=10_000.0, draw=lambda: draw)
        box.put([alert()], 0.0)
        box.failed(box.due(0.0), error, 0.0)
        return box.wait(0.0) or 0.0

    assert pause(Undelivered("x"), 0.0) == 1.0
    assert pause(Undelivered("x"), 1.0) == 2.0
    assert pause(Undelivered("x", lasting=True), 1.0) == LONGEST_PAUSE
    assert pause(Undelivered("x", after=90.0), 0.5) == 90.0
    assert pause(Undelivered("x", after=1e9), 0.5) == 10_000.0  # not longer than anything is tried


def test_what_comes_in_between_is_one_message() -> None:
    box = Outbox("team", digest=60.0)
    box.put([alert(1)], 0.0)
    box.sent(box.due(0.0), 0.0)
    box.put([alert(2)], 10.0)
    box.put([alert(3)], 20.0)
    assert box.due(59.0) == ()
    assert box.wait(20.0) == 40.0
    assert [a.run for a in box.due(60.0)] == ["run2", "run3"]
    assert [a.run for a in box.due(30.0, last=True)] == ["run2", "run3"]  # the training ends


def test_a_clock_that_is_set_back_holds_nothing() -> None:
    told, failed = Outbox("team", digest=60.0), Outbox("team", give_up=3600.0)
    for box in (told, failed):
        box.put([alert(1)], 9e5)
    told.sent(told.due(9e5), 9e5)
    told.put([alert(2)], 9e5)
    failed.failed(failed.due(9e5), Undelivered("it is down"), 9e5)
    for box in (told, failed):
        assert box.due(9e5) == ()
        assert len(box.due(1e5)) == 1


def test_quiet_hours_hold_and_end_with_one_digest() -> None:
    box = Outbox("team", quiet=NIGHT, digest=60.0)
    late = MIDNIGHT + 23 * 3600
    [held] = box.put([alert(1), alert(2, "critical")], late)
    assert held.line() == "held for team (quiet until Fri 07:00): warning dead_units, critical dead_units"
    assert box.due(late + 3600) == ()
    assert box.due(late + 3600, last=True) == ()  # not even then: people sleep
    box.put([alert(3)], late + 7200)
    assert box.wait(late + 7200) == 6 * 3600
    assert len(box.due(late + 8 * 3600)) == 3
    passing = Outbox("team", quiet=Quiet(NIGHT.hours, zone=NIGHT.zone, critical=True))
    assert len(passing.put([alert(1), alert(2, "critical")], late)[0].alerts) == 1
    assert [a.run for a in passing.due(late)] == ["run2"]


def test_there_is_room_for_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "ROOM", 3)
    box = Outbox("team")
    [full] = box.put([alert(i) for i in range(5)], 0.0)
    assert outcome([full]) == [("not sent", 2, "3 others wait already")]
    assert len(box.waiting) == 3


Event = st.one_of(
    st.tuples(st.just("put"), st.integers(1, 4), st.sampled_from(["warning", "critical"])),
    st.tuples(st.just("wait"), st.integers(1, 40_000), st.just("")),
    st.tuples(st.just("answer"), st.sampled_from([0, 1, 2, 3]), st.just("")),
    st.tuples(st.just("restart"), st.just(0), st.just("")),
)


@given(st.lists(Event, max_size=40), st.booleans(), st.sampled_from([0.0, 60.0]))
def test_nothing_twice_nothing_lost(events: list[tuple[str, int, str]], quiet: bool, digest: float) -> None:
    """Every alert ends in exactly one record `sent` or `not sent`, in any order of what can happen."""
    now, number = MIDNIGHT, 0
    options: dict[str, Any] = {"quiet": NIGHT if quiet else None, "digest": digest, "give_up": 7200.0}
    box = Outbox("team", **options)
    given_in: list[str] = []
    records: list[Record] = []
    for what, amount, severity in events:
        if what == "put":
            new = [alert(number + i, severity) for i in range(amount)]
            number += amount
            given_in += [a.run for a in new]
            records += box.put(new, now)
        elif what == "wait":
            now += amount
        elif what == "restart":  # a watchman's
            state = box.state()
            box = Outbox("team", **options)
            box.restore(state)
        elif batch := box.due(now):
            assert not (quiet and NIGHT.at(now))
            error = Undelivered("down", lasting=amount == 2, after=100.0 if amount == 3 else 0.0)
            records += box.failed(batch, error, now) if amount else [box.sent(batch, now)]
    waiting = [a.run for a in box.waiting]
    records += box.give_up(now, "it ends")
    ends = Counter(a.run for r in records if r.outcome in ("sent", "not sent") for a in r.alerts)
    assert ends == Counter(given_in)
    assert box.wait(now) is None
    assert set(waiting) <= set(given_in)


# Threads and a real server


def told(records: list[Record], outcome: str) -> list[str]:
    return [a.run for r in records if r.outcome == outcome for a in r.alerts]


def eventually(what: Callable[[], Any]) -> None:
    limit = time.monotonic() + 60
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.02)


def couriers() -> set[threading.Thread]:
    """The threads that send."""
    return {t for t in threading.enumerate() if t.name.startswith("layerwatch-alerts")}


def test_a_message_is_taken_at_once_and_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[Record] = []
    go = threading.Event()
    with HttpServer(after=go) as server:
        delivery = Delivery(config(server.url, monkeypatch), records.append)
        delivery.put({"team": [alert(1), alert(2, "critical")]})
        assert server.alerts == []  # nobody has waited for its answer
        go.set()
        delivery.settle(60.0)
        assert server.alerts == [("run2", "critical", "dead_units"), ("run1", "warning", "dead_units")]
        delivery.close(1.0, "the training has ended")
    assert [r.line(runs=True) for r in records] == [
        "sent to team: warning dead_units of run1, critical dead_units of run2"
    ]


def test_a_server_that_recovers_gets_everything_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox_module, "FIRST_PAUSE", 0.02)
    records: list[Record] = []
    busy = (429, {"Retry-After": "0.3"})
    with HttpServer(500, 503, busy, 500, 200) as server:
        delivery = Delivery(config(server.url, monkeypatch), records.append)
        delivery.put({"team": [alert(1)]})
        time.sleep(0.1)
        delivery.put({"team": [alert(2)]})
        eventually(lambda: len(server.alerts) >= 2)
        delivery.close(60.0, "the training has ended")
        assert sorted(run for run, _, _ in server.alerts) == ["run1", "run2"]
        assert server.times[3] - server.times[2] >= 0.3  # as it had asked
    assert sorted(told(records, "sent")) == ["run1", "run2"]
    assert told(records, "not sent") == []
    assert "delayed for team (the server answered 500; it is tried again)" in caplog.text
    assert SECRET not in caplog.text


def test_a_hanging_channel_delays_neither_the_others_nor_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    records: list[Record] = []
    with HttpServer("hang") as hanging, HttpServer() as good:
        monkeypatch.setenv("HANGING_URL", hanging.url)
        monkeypatch.setenv("GOOD_URL", good.url)
        monkeypatch.setenv("no_proxy", "*")
        channels = {
            "bad": {"type": "webhook", "url_env": "HANGING_URL"},
            "good": {"type": "webhook", "url_env": "GOOD_URL"},
        }
        teller = Teller(config_of({"channels": channels}), records.append)
        before = couriers()
        teller.tell([alert(1, "critical")])
        teller.tell([alert(1, "critical")])  # it lasts: no news
        eventually(lambda: told(records, "sent"))
        assert good.alerts == [("run1", "critical", "dead_units")]
        teller.delivery.close(1.0, "the training has ended")
        [waits] = couriers() - before  # nobody has waited for it
        assert waits.name == "layerwatch-alerts-bad"
    waits.join(60)
    assert sorted((r.outcome, r.channel) for r in records) == [("not sent", "bad"), ("sent", "good")]
    assert "not sent to bad (the training has ended): critical dead_units of run1" in caplog.text
    assert SECRET not in caplog.text


def test_no_thread_is_left_and_none_begins_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = couriers()
    with HttpServer() as server:
        delivery = Delivery(config(server.url, monkeypatch), lambda record: None)
        assert couriers() <= before
        delivery.put({"team": [alert()]})
        delivery.settle(60.0)
        assert len(couriers() - before) == 1
        delivery.close(60.0, "end")
        delivery.put({"team": [alert(2)]})  # too late: nobody sends it
        assert couriers() <= before
        assert len(server.alerts) == 1


def test_where_no_thread_can_be_had_the_end_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.12 on there is none when a training that nobody has closed is closed at exit."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    records: list[Record] = []
    with HttpServer() as server, HttpServer("hang") as hanging:
        delivery = Delivery(config(server.url, monkeypatch), records.append)
        slow = Delivery(config(server.url, monkeypatch), records.append)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        delivery.put({"team": [alert()]})
        delivery.put({"team": [alert(2)]})
        slow.put({"team": [alert(3)]})
        monkeypatch.undo()
        config(server.url, monkeypatch)
        delivery.close(60.0, "the training has ended")
        assert [run for run, *_ in server.alerts] == ["run0", "run2"]
        config(hanging.url, monkeypatch)
        clock = SimpleNamespace(monotonic=lambda: 0.0)  # until the attempt begins, no time passes
        monkeypatch.setattr("layerwatch.monitor.alerts.delivery.time", clock)
        slow.close(0.5, "the training has ended")
    assert outcome(records) == [
        ("sent", 2, ""), ("delayed", 1, "no answer within 0.5 s; it is tried again"),
        ("not sent", 1, "no answer within 0.5 s; the training has ended"),
    ]  # fmt: skip


@pytest.mark.parametrize("remark", ["", "attempt 2", "attempt 3, 1 of 2 addresses were refused"])
def test_what_was_sent_is_read_from_its_line_whatever_is_remarked(remark: str) -> None:
    alerts = (alert(severity="critical"), replace(alert(), problem="nonfinite"))
    line = Record("sent", "team", alerts, 1.0, remark).line()
    events = pd.DataFrame({"event": [EVENT, "note"], "time": [5.0, 6.0], "message": [line, line]})
    assert alerted(events) == [
        {"problem": "dead_units", "severity": "critical", "channel": "team", "time": 5.0},
        {"problem": "nonfinite", "severity": "warning", "channel": "team", "time": 5.0},
    ]
    held = Record("held", "team", alerts, 1.0, "quiet until 07:00").line()
    assert alerted(events.assign(message=held)) == []


def test_once_a_run_problem_and_severity_and_again_after_the_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [MIDNIGHT]
    with HttpServer() as server:
        settings = config(server.url, monkeypatch, repeat="6h", severity="info")
        teller = Teller(settings, lambda record: None, clock=lambda: now[0])
        for hours, severity in ((0, "info"), (0, "warning"), (0, "info"), (0, "warning"), (5, "warning")):
            now[0] = MIDNIGHT + hours * 3600
            teller.tell([alert(1, severity)])
            teller.delivery.settle(60.0)
        assert [severity for _, severity, _ in server.alerts] == ["info", "warning"]
        now[0] = MIDNIGHT + 6 * 3600
        teller.tell([alert(1)])
        teller.delivery.settle(60.0)
        assert [severity for _, severity, _ in server.alerts] == ["info", "warning", "warning"]
        teller.ledger.note("k1", "dead_units", "critical", "team", now[0])  # somebody else told it
        teller.tell([alert(1, "critical")])
        teller.delivery.close(60.0, "end")
        assert len(server.alerts) == 3


def test_an_error_of_ours_does_not_end_the_channel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from layerwatch.monitor.alerts import delivery as module

    def broken(batch: Any) -> None:
        raise ZeroDivisionError(SECRET)

    records: list[Record] = []
    with HttpServer() as server:
        delivery = Delivery(config(server.url, monkeypatch), records.append)
        monkeypatch.setattr(module, "Message", broken)
        delivery.put({"team": [alert()]})
        delivery.settle(60.0)
        delivery.close(60.0, "the training has ended")
    assert "an error of layerwatch: ZeroDivisionError" in records[0].line()
    assert SECRET not in str([r.line() for r in records])
    assert told(records, "not sent") == ["run0"]
