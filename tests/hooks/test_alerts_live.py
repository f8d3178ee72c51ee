"""A training tells people what goes wrong: once, behind its back, and whatever the channels do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import batch, loss_of, mlp, weights_of

from layerwatch import Run, Watcher, watch
from layerwatch.hooks import alerting, live
from layerwatch.hooks.session import Session
from layerwatch.monitor.alerts.delivery import _Courier
from layerwatch.monitor.alerts.records import alerted
from tests.alert_servers import SECRET, HttpServer


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(live, "CHECK_SHARE", 1e9)
    monkeypatch.setattr(alerting, "CLOSE_SECONDS", 100.0)  # a channel that answers may be slow
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel waits an hour for its answer: who waits for the channel does not come back in this test."""
    monkeypatch.setattr(alerting, "CLOSE_SECONDS", 0.5)
    monkeypatch.setattr(_Courier._work, "__defaults__", (3600.0,))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    with HttpServer() as server:
        monkeypatch.setenv("HOOK_URL", server.url)
        yield server


def settings(**more: Any) -> dict[str, Any]:
    return {"channels": {"team": {"type": "webhook", "url_env": "HOOK_URL"}}, "digest": "0s", **more}


def sick_training(
    run: Path, steps: int = 8, *, broken_at: int = 3, seed: int = 0, **watching: Any
) -> dict[str, torch.Tensor]:
    """The loss stops being finite; the weights at its end."""
    model = mlp(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with watch(model, optimizer, run=run, every=1, **watching) as watcher:
        train(watcher, model, optimizer, steps, broken_at)
    return weights_of(model)


def train(watcher: Watcher, model: torch.nn.Module, optimizer: Any, steps: int, broken_at: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model(batch(step))) * (float("nan") if step >= broken_at else 1.0)
        loss.backward()
        optimizer.step()
        watcher.log(train_loss=loss)


def records(run: Path) -> list[str]:
    events = Run(run).events()
    return events.loc[events["event"] == "alert", "message"].tolist()


def assert_nothing_secret(folder: Path, *texts: str) -> None:
    """Not in any file below a folder."""
    found = [str(p) for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert found == []
    assert SECRET not in "".join(texts)


def test_a_problem_is_told_once_and_written_down(
    tmp_path: Path, server: HttpServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    run = tmp_path / "runs" / "exp1"
    sick_training(run, alerts=settings(dashboard="https://lw.example.org"), tags=["prod"], owner="ana")
    assert server.alerts == [("exp1", "critical", "nonfinite")]
    [alert] = [alert for message in server.got for alert in message["alerts"]]
    assert (alert["owner"], alert["tags"]) == ("ana", ["prod"])
    assert alert["link"] == "https://lw.example.org/run/exp1/overview?finding=nonfinite"
    assert alert["first_step"] == 3
    assert records(run) == ["sent to team: critical nonfinite"]
    assert Run(run).info["alerts"] == ["team"]
    [told] = alerted(Run(run).events())
    assert (told["problem"], told["severity"], told["channel"]) == ("nonfinite", "critical", "team")
    out, err = capfd.readouterr()
    assert_nothing_secret(tmp_path, caplog.text, out, err)


def test_a_resumed_training_does_not_say_it_again(tmp_path: Path, server: HttpServer) -> None:
    run = tmp_path / "exp1"
    sick_training(run, alerts=settings())
    sick_training(run, alerts=settings(), resume=5)
    assert len(server.alerts) == 1
    sick_training(run, alerts=settings(repeat="0s"), resume=5)  # as often as it is seen
    assert len(server.alerts) > 1


@pytest.mark.usefixtures("_patient")
@pytest.mark.parametrize("answer", ["hang", 500, 404])
def test_the_training_is_the_same_to_the_bit_and_ends_with_a_dead_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answer: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    expected = sick_training(tmp_path / "without", broken_at=99, alerts=False)
    with HttpServer(answer) as server:
        monkeypatch.setenv("HOOK_URL", server.url)
        sick = sick_training(tmp_path / "sick", alerts=settings())
        told = settings(severity="info")
        found = sick_training(tmp_path / "with", broken_at=99, alerts=told)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.isfinite(weight).all() for weight in sick.values())
    last = records(tmp_path / "sick")[-1]
    assert last.startswith("not sent to team (")
    assert last.endswith("the training has ended): critical nonfinite")
    assert "not sent to team" in caplog.text
    assert_nothing_secret(tmp_path, caplog.text)


@pytest.mark.usefixtures("_patient")
def test_asked_to_end_it_waits_a_moment_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HttpServer("hang") as server:
        monkeypatch.setenv("HOOK_URL", server.url)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        watcher = watch(model, optimizer, run=tmp_path / "exp1", every=1, alerts=settings())
        train(watcher, model, optimizer, 8, 3)
        assert watcher.terminate()  # the server still owes its answer
    assert records(tmp_path / "exp1") == [
        "not sent to team (the process was asked to end): critical nonfinite"
    ]
    watcher._detach()  # this process has other tests to run


def test_a_settings_file_above_the_run_is_found(tmp_path: Path, server: HttpServer) -> None:
    text = '[alerts.channels.team]\ntype = "webhook"\nurl_env = "HOOK_URL"\n'
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "layerwatch.toml").write_text(text)
    sick_training(tmp_path / "lab" / "group" / "exp1")
    assert server.alerts == [("exp1", "critical", "nonfinite")]
    sick_training(tmp_path / "lab" / "group" / "exp2", alerts=False)
    sick_training(tmp_path / "lab" / "group" / "exp3", live=False)
    sick_training(tmp_path / "exp4")
    assert len(server.alerts) == 1
    sick_training(tmp_path / "exp5", alerts=tmp_path / "lab" / "layerwatch.toml", live=False)
    assert len(server.alerts) == 2


def test_a_working_directory_that_was_removed_is_no_reason_not_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    sick_training(tmp_path / "a")
    assert Run(tmp_path / "a").info["alerts"] == []


def test_settings_that_are_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"expected layerwatch\.toml in a folder above the run"):
        watch(model, run=tmp_path / "a", alerts=True)
    with pytest.raises(ValueError, match='unknown key "chanels": did you mean "channels"'):
        watch(model, run=tmp_path / "b", alerts={"chanels": {}})
    with pytest.raises(TypeError, match="expected alerts as a path, a mapping"):
        watch(model, run=tmp_path / "c", alerts=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="does not exist"):
        watch(model, run=tmp_path / "d", alerts=tmp_path / "missing.toml")
    assert not list(tmp_path.iterdir())  # nothing was begun
    (tmp_path / "layerwatch.toml").write_text('[alerts]\nsevrity = "info"\n')
    sick_training(tmp_path / "e")  # it was only found: no reason not to train
    assert 'unknown key "sevrity"' in caplog.text
    assert any("nobody is alerted" in note for note in Run(tmp_path / "e").info["notes"])
    assert Run(tmp_path / "e").info["alerts"] == []


def test_an_environment_variable_that_is_not_set_is_told_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOOK_URL", raising=False)
    sick_training(tmp_path / "exp1", alerts=settings())
    assert "alerts to team cannot be sent: set HOOK_URL" in caplog.text
    assert "the environment variable HOOK_URL is not set" in records(tmp_path / "exp1")[-1]


def test_callbacks_pass_it_on(tmp_path: Path, server: HttpServer) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session = Session(tmp_path / "exp1", 1, {"alerts": settings()})
    train(session.begin(model, optimizer, {}), model, optimizer, 8, 3)
    session.end()
    assert server.alerts == [("exp1", "critical", "nonfinite")]
