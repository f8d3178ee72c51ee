"""The watchman: what trainings cannot tell, told once, over restarts, by scans of tables."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_logs import info, make_run, write_step

from layerwatch.monitor import LogWriter, RunError
from layerwatch.monitor.alerts import outbox
from layerwatch.monitor.alerts.config import Config, config_of
from layerwatch.monitor.alerts.watchman import LEAVE_SECONDS, Watchman
from layerwatch.monitor.fleet.scanning import scan
from layerwatch.monitor.fleet.table import COLUMNS, ScanTable
from tests.alert_servers import SECRET, HttpServer
from tests.object_server import ObjectServer

NOON = 1_800_000_000.0
Told = list[tuple[str, str, str]]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    monkeypatch.setenv("no_proxy", "*")
    with HttpServer() as server:
        monkeypatch.setenv("HOOK_URL", server.url)
        yield server


def settings(**more: Any) -> Config:
    channels = {"team": {"type": "webhook", "url_env": "HOOK_URL"}}
    return config_of({"channels": channels, "digest": "0s", "silent": "10m", **more})


def finding(problem: str = "dead_units", severity: str = "warning", noticed: float = NOON) -> dict[str, Any]:
    return {
        "problem": problem, "severity": severity, "first_step": 3, "last_step": 9, "layers": ["a.weight"],
        "summary": "units are dead", "advice": "look", "noticed": noticed,
    }  # fmt: skip


def row(run: str = "exp1", *findings: dict[str, Any], live: bool = True, **more: Any) -> dict[str, Any]:
    """A row of a scan table."""
    empty = dict.fromkeys(COLUMNS.names)
    told = {
        "run": run, "url": f"/runs/{run}", "closed": False, "live": live, "tags": [], "health": "healthy",
        "findings": list(findings), "steps": 10, "bytes": 1000, "wrote": NOON, "alerts": [], "alerted": [],
    }  # fmt: skip
    return {**empty, **told, **more}


class Watch:
    """A watchman with a clock of its own, whose process may end at any time."""

    def __init__(self, server: HttpServer, path: Path, config: Config | None = None) -> None:
        self.now, self._server, self._path = NOON, server, path
        self._config = config or settings()
        self.watchman = self._begin()

    def _begin(self) -> Watchman:
        return Watchman(self._config, self._path, clock=lambda: self.now)

    def __call__(self, *rows: dict[str, Any], after: float = 60.0) -> Told:
        """What a look told, so much later."""
        self.now += after
        before = len(self._server.alerts)
        self.watchman.look(ScanTable("/runs", list(rows), self.now), timeout=60.0)
        return self._server.alerts[before:]

    def restart(self, config: Config | None = None) -> None:
        self.watchman.close()
        self._config = config or self._config
        self.watchman = self._begin()


@pytest.fixture
def look(server: HttpServer, tmp_path: Path) -> Iterator[Watch]:
    watch = Watch(server, tmp_path / "state.json")
    yield watch
    watch.watchman.close()


def test_each_finding_once_over_restarts_and_again_when_it_is_worse(look: Watch) -> None:
    assert look(row("a", finding())) == [("a", "warning", "dead_units")]
    assert look(row("a", finding())) == []
    look.restart()
    assert look(row("a", finding()), row("b", finding())) == [("b", "warning", "dead_units")]
    worse = finding(severity="critical")
    assert look(row("a", worse), row("b")) == [("a", "critical", "dead_units")]
    assert look(row("a", finding()), row("b", finding())) == []  # it came back: no news
    look.restart()
    assert look(row("a", worse, finding("nonfinite", "critical"))) == [("a", "critical", "nonfinite")]
    assert look(row("a", finding("unused_parameters", "info"))) == []  # no alarm


def test_the_first_look_is_silent_about_what_has_ended(look: Watch) -> None:
    old = row("old", finding(), live=False, closed=True)
    assert look(old, row("now", finding())) == [("now", "warning", "dead_units")]
    assert look(old, row("later", finding(), live=False, closed=True)) == [("later", "warning", "dead_units")]
    channels = {"team": {"type": "webhook", "url_env": "HOOK_URL"}}
    more = {**channels, "second": channels["team"]}
    look.restart(config_of({"channels": more, "digest": "0s"}))  # a new channel is not told old stories
    assert look(old, row("now", finding())) == [("now", "warning", "dead_units")]  # it lives: by the new one
    assert look(row("x", finding("nonfinite"))) == [("x", "warning", "nonfinite")] * 2


def test_many_are_one_message(look: Watch, server: HttpServer) -> None:
    rows = [row(f"run{i}", finding()) for i in range(300)]
    assert len(look(*rows)) == 300
    [message] = server.got
    assert message["title"] == "300 alerts in 300 runs: 300 warning"
    assert "and 280 more: 280 × dead units" in message["text"]


def test_copies_and_moved_folders_are_one_training(look: Watch) -> None:
    assert look(row("a", finding(), id="1"), row("b", finding(), id="1", copy_of="a")) == [
        ("a", "warning", "dead_units")
    ]
    assert look(row("moved", finding(), id="1", url="/elsewhere")) == []


def test_what_the_training_told_itself_is_not_told_again(look: Watch) -> None:
    own: dict[str, Any] = {"alerts": ["team"]}
    assert look(row("a", finding(noticed=look.now + 60), **own)) == []  # it is about to
    told = [{"problem": "dead_units", "severity": "warning", "channel": "team", "time": look.now}]
    known = row("a", finding(noticed=NOON), alerted=told, steps=20, **own)
    assert look(known, after=2 * LEAVE_SECONDS) == []
    worse = finding(severity="critical", noticed=look.now + 60)
    assert look(row("a", worse, alerted=told, steps=30, **own)) == []
    late = row("a", worse, alerted=told, steps=40, **own)
    assert look(late, after=LEAVE_SECONDS) == [("a", "critical", "dead_units")]  # it did not
    assert look(row("b", finding(noticed=look.now + 60), live=False, **own)) == [
        ("b", "warning", "dead_units")  # nor will one that has ended
    ]


def test_a_live_run_that_stopped_writing_is_told_once_and_so_is_that_it_goes_on(look: Watch) -> None:
    assert look(row("a", steps=10)) == []
    assert look(row("a", steps=20), after=300) == []
    assert look(row("a", steps=20), after=500) == []
    assert look(row("a", steps=20, live=False), after=100) == [("a", "critical", "silent")]
    look.restart()
    assert look(row("a", steps=20, live=False), after=86400) == []
    assert look(row("a", steps=30)) == [("a", "info", "writes_again")]
    assert look(row("a", steps=30), after=599) == []
    assert look(row("a", steps=30), after=1) == [("a", "critical", "silent")]
    assert look(row("a", steps=31, closed=True, live=False)) == [("a", "info", "writes_again")]
    assert look(row("a", steps=31, closed=True, live=False), after=86400) == []


def test_who_was_dead_before_is_no_news_but_who_died_between_two_looks_is(look: Watch) -> None:
    old = row("old", live=False)
    assert look(old, after=0) == []
    assert look(old, row("new", live=False, wrote=NOON + 30)) == []
    copied = row("copied", live=False, wrote=NOON - 30 * 86400)  # dates are kept: it is old
    assert look(old, row("new", live=False, wrote=NOON + 30), copied, after=900) == [
        ("new", "critical", "silent")
    ]
    assert look(old, copied, after=86400) == []


def test_labelling_and_compacting_is_no_sign_of_life(look: Watch) -> None:
    old, died = row("old", live=False), row("died", steps=20)
    assert look(old, died, after=0) == []
    died |= {"live": False}
    assert look(old, died, after=900) == [("died", "critical", "silent")]
    for bytes_ in (1040, 300):  # a note was added, then what was left behind became Parquet
        old, died = old | {"bytes": bytes_}, died | {"bytes": bytes_}
        assert look(old, died) == []
    assert look(old, died, after=86400) == []
    assert look(old, died | {"steps": 21, "live": True}) == [("died", "info", "writes_again")]


def test_a_long_validation_that_logs_is_not_silent(look: Watch) -> None:
    for size in (1000, 1100, 1200, 1300):
        assert look(row("a", bytes=size), after=400) == []
    assert look(row("a", bytes=1300), after=600) == [("a", "critical", "silent")]


@pytest.mark.parametrize("skew", [-86400.0, -600.0, 600.0, 86400.0])
def test_a_writer_whose_clock_is_wrong_is_not_silent_and_its_silence_is_seen(
    look: Watch, skew: float
) -> None:
    """Its files are dated in the past or in the future, and whether it lives is judged by that."""
    seems_live = skew >= 0
    for step in range(10, 40, 10):
        seen = row("a", steps=step, wrote=look.now + skew, live=seems_live)
        assert look(seen, after=599) == []
    last = row("a", steps=30, wrote=look.now + skew, live=seems_live)
    assert look(last, after=599) == []
    assert look(last, after=60) == [("a", "critical", "silent")]


def test_a_closed_run_an_unreadable_one_and_one_out_of_sight_are_not_silent(look: Watch) -> None:
    assert look(row("a", closed=True, live=False), row("b")) == []
    broken = row("b", health="unreadable", steps=None, live=False)
    assert look(row("a", closed=True, live=False), broken, after=3600) == []
    assert look(after=3600) == []  # the store could not be listed, say
    assert look(row("b"), after=60) == [("b", "critical", "silent")]  # as it was more than two hours ago


def test_silence_has_its_route_and_can_be_switched_off(server: HttpServer, tmp_path: Path) -> None:
    never = Watch(server, tmp_path / "never.json", settings(silent="never"))
    assert never(row("a")) == []
    assert never(row("a"), after=1e6) == []
    never.watchman.close()
    routed = Watch(server, tmp_path / "b.json", settings(routes=[{"problems": ["silent"]}]))
    assert routed(row("a", finding())) == []
    assert routed(row("a", finding()), after=3600) == [("a", "critical", "silent")]
    assert "Nothing was written for 60 min since step 9" in server.got[-1]["text"]
    assert routed(row("a", finding(), steps=11)) == [("a", "info", "writes_again")]  # to whom it was told
    routed.watchman.close()


def test_repeats_are_for_live_runs(server: HttpServer, tmp_path: Path) -> None:
    look = Watch(server, tmp_path / "state.json", settings(repeat="6h", silent="never"))
    assert len(look(row("a", finding()))) == 1
    assert look(row("a", finding()), after=6 * 3600 - 1) == []
    assert len(look(row("a", finding()), after=1)) == 1
    assert look(row("a", finding(), live=False), after=86400) == []
    look.watchman.close()


def test_what_could_not_be_sent_is_sent_by_the_next_watchman(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(outbox, "FIRST_PAUSE", 1000.0)
    path = tmp_path / "state.json"
    with HttpServer(500) as down:
        monkeypatch.setenv("HOOK_URL", down.url)
        with Watchman(settings(), path) as watchman:
            [record] = watchman.look(ScanTable("/runs", [row("a", finding())], time.time()))
            assert record.outcome == "delayed"
    with HttpServer() as up:
        monkeypatch.setenv("HOOK_URL", up.url)
        with Watchman(settings(), path) as watchman:
            [record] = watchman.look(ScanTable("/runs", [row("a", finding())], time.time()))
            assert record.line(runs=True) == "sent to team: warning dead_units of a"
        assert up.alerts == [("a", "warning", "dead_units")]
        with Watchman(settings(), path) as watchman:
            assert watchman.look(ScanTable("/runs", [row("a", finding())], time.time())) == []
    state = path.read_text()
    assert SECRET not in state
    assert "sent to team: warning dead_units of a" in [one["text"] for one in json.loads(state)["records"]]


def test_quiet_hours_outlive_the_watchman(server: HttpServer, tmp_path: Path) -> None:
    quiet = {"hours": "22:00-07:00", "timezone": "UTC"}
    look = Watch(server, tmp_path / "state.json", settings(quiet=quiet, silent="never"))
    evening = 23 * 3600 - NOON % 86400 + 86400
    assert look(row("a", finding()), after=evening) == []
    look.restart()
    assert look(row("a", finding()), row("b", finding()), after=3600) == []
    look.restart()
    assert look(after=8 * 3600) == [("a", "warning", "dead_units"), ("b", "warning", "dead_units")]
    assert len(server.got) == 1
    look.watchman.close()


def test_a_state_that_is_damaged_in_use_or_has_no_place(
    look: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look(row("a", finding()))
    with pytest.raises(RunError, match="to be the only watchman"):
        Watchman(settings(), tmp_path / "state.json")
    for number, content in enumerate(("{", "[]", '{"version": 1}', '{"version": 9}')):
        path = tmp_path / f"{number}.json"
        path.write_text(content)
        with pytest.raises(RunError, match=r"is damaged, so that nobody knows|of a newer layerwatch"):
            Watchman(settings(), path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="expected a folder for the watchman's state"):
        Watchman(settings(), tmp_path / "file" / "state.json")


def test_real_scans_of_real_logs(server: HttpServer, tmp_path: Path) -> None:
    """A run that is written by another machine, killed, and resumed."""
    root = tmp_path / "runs"
    make_run(root / "done", 3)
    log = LogWriter(root / "exp1", info(host="elsewhere", id="1", tags=["prod"], owner="ana"))
    now = [time.time()]

    def seen(after: float) -> Told:
        now[0] += after
        before = len(server.alerts)
        table = scan(root)
        watchman.look(ScanTable(table.root, table.rows, now[0]), timeout=60.0)
        return server.alerts[before:]

    with Watchman(settings(), tmp_path / "state.json", clock=lambda: now[0]) as watchman:
        write_step(log, 0)
        assert seen(0) == []
        write_step(log, 1)
        assert seen(900) == []
        assert seen(900) == [("exp1", "critical", "silent")]
        write_step(log, 2)
        assert seen(60) == [("exp1", "info", "writes_again")]
        log.event(2, "alert", "sent to team: warning dead_units, critical nonfinite")
        told = next(r for r in scan(root).rows if r["run"] == "exp1")["alerted"]
        assert [(t["severity"], t["problem"], t["channel"]) for t in told] == [
            ("warning", "dead_units", "team"), ("critical", "nonfinite", "team"),
        ]  # fmt: skip
        log.close()
        assert seen(86400) == []
    assert (server.got[0]["alerts"][0]["owner"], server.got[0]["alerts"][0]["tags"]) == ("ana", ["prod"])


def test_the_state_may_lie_on_an_object_store(server: HttpServer, object_server: ObjectServer) -> None:
    url = f"{object_server.make_bucket()}/state.json"
    for expected in (["sent"], []):
        with Watchman(settings(), url) as watchman:
            found = watchman.look(ScanTable("s3://x", [row("a", finding())], time.time()))
            assert [record.outcome for record in found] == expected
