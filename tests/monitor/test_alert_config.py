"""layerwatch.toml: what it may say, and the words about what it may not."""

from __future__ import annotations

import datetime as dt
import os
import re
from pathlib import Path
from typing import Any

import pytest

from layerwatch.monitor.alerts.alert import Alert
from layerwatch.monitor.alerts.config import Config, config_of, find_config, read_config
from layerwatch.monitor.alerts.routing import receivers
from layerwatch.monitor.alerts.settings import ConfigError

WHOLE = """
[alerts]
severity = "warning"
repeat = "6h"
silent = "10m"
digest = "30s"
give_up = "1d"
dashboard = "https://layerwatch.example.org/team/"
root = "runs"

[alerts.quiet]
hours = "22:00-07:00"
days = ["sat", "sun"]
timezone = "Europe/Berlin"
critical = true

[alerts.channels.team]
type = "webhook"
format = "slack"
url_env = "SLACK_URL"

[alerts.channels.mail]
type = "email"
host = "smtp.example.org"
user = "bot"
password_env = "SMTP_PASSWORD"
from = "layerwatch@example.org"
to = ["ana@example.org", "Ben <ben@example.org>"]

[alerts.channels.pager]
type = "command"
command = ["page", "--now", "s3cret-argument"]

[alerts.channels.screen]
type = "desktop"

[[alerts.routes]]
channels = ["team", "mail"]

[[alerts.routes]]
channels = "pager"
severity = "critical"
problems = ["nonfinite", "silent"]
tags = ["prod", "nightly"]
runs = "prod-*"
owners = ["ana"]

[[alerts.routes]]
channels = "screen"
severity = "info"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "layerwatch.toml"
    path.write_text(text)
    return path


def alert(**changes: Any) -> Alert:
    base: dict[str, Any] = {
        "run": "group/prod-7", "key": "k", "problem": "nonfinite", "severity": "critical",
        "summary": "NaN in the loss", "owner": "ana", "tags": ("prod",),
    }  # fmt: skip
    return Alert(**{**base, **changes})


def test_everything_that_can_be_said(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, WHOLE))
    assert list(config.channels) == ["team", "mail", "pager", "screen"]
    assert (config.repeat, config.silent, config.digest, config.give_up) == (21600, 600, 30, 86400)
    assert config.quiet is not None
    assert config.quiet.hours == (22 * 60, 7 * 60)
    assert config.quiet.days == {5, 6}
    assert config.quiet.critical
    assert config.name_of(tmp_path / "runs" / "group" / "exp1") == "group/exp1"
    assert config.name_of("/elsewhere/exp1") == "exp1"
    link = "https://layerwatch.example.org/team/run/group/a%20b"
    assert config.link("group/a b", "nonfinite") == f"{link}/overview?finding=nonfinite"
    assert config.link("group/a b", "silent") == f"{link}/alerts"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["team", "mail", "pager", "screen"]),
        ({"severity": "warning"}, ["team", "mail", "screen"]),
        ({"severity": "info"}, ["screen"]),
        ({"problem": "dead_units"}, ["team", "mail", "screen"]),
        ({"problem": "silent"}, ["team", "mail", "pager", "screen"]),
        ({"tags": ("baseline",)}, ["team", "mail", "screen"]),
        ({"tags": ("x", "nightly")}, ["team", "mail", "pager", "screen"]),
        ({"run": "prod-1"}, ["team", "mail", "pager", "screen"]),
        ({"run": "group/exp1"}, ["team", "mail", "screen"]),
        ({"owner": "ben"}, ["team", "mail", "screen"]),
    ],
)
def test_a_route_takes_what_fits_all_its_conditions(
    tmp_path: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    config = read_config(written(tmp_path, WHOLE))
    assert receivers(config.routes, alert(**changes)) == expected


def test_without_routes_every_channel_is_told_of_alarms() -> None:
    config = minimal()
    assert receivers(config.routes, alert(severity="warning")) == ["a"]
    assert receivers(config.routes, alert(severity="info")) == []
    assert config.silent == 1800
    assert config.repeat is None
    assert config.quiet is None


def minimal(**more: Any) -> Config:
    return config_of({"channels": {"a": {"type": "desktop"}}, **more})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[alert]\n", 'unknown table or key "alert": did you mean "alerts"?'),
        ("", r"the table \[alerts\] is missing"),
        ("[alerts]\n", "has no channel"),
        ('[alerts]\nsevrity="info"\n', 'unknown key "sevrity": did you mean "severity"?'),
        ('[alerts]\nseverity="fatal"\n', 'severity in .alerts. is "fatal"; known: info, warning, critical'),
        ('[alerts]\nseverity="critcal"\n', 'did you mean "critical"?'),
        ("[alerts]\nrepeat=5\n", "repeat in .alerts. as a time such as .*; it is a number"),
        ('[alerts]\nrepeat="6 hours"\n', "repeat in .alerts. as a time such as .*'6 hours'"),
        ('[alerts]\nchannels="x"\n', "channels. as a table, got a text"),
        ('[alerts.channels.b]\ntype="webhok"\n', 'type in .alerts.channels.b. is "webhok": did you mean "we'),
        ('[alerts.channels.b]\ntype="webhook"\n', "channels.b. lacks url_env: add it"),
        ('[alerts.channels.b]\ntype="command"\n', "channels.b. lacks command: add it"),
        ('[alerts.channels.b]\ntype="command"\ncomand="x"\n', '"comand": did you mean "command"?'),
        ('[alerts.channels.b]\ntype="command"\ncommand=["a", 1]\n', "not all of them are texts"),
        ('[alerts.channels.b]\ntype="desktop"\nsound=true\n', 'channels.b. has an unknown key "sound"'),
        ('[alerts.channels."b c"]\ntype="desktop"\n', "letters, digits"),
        ('[[alerts.routes]]\nchannels="tem"\n', 'routes.. number 1 names "tem"; known: a'),
        ('[[alerts.routes]]\nproblems="nonfinit"\n', 'names "nonfinit": did you mean "nonfinite"?'),
        ('[[alerts.routes]]\nproblem="nonfinite"\n', 'unknown key "problem": did you mean "problems"?'),
        ('[alerts.quiet]\nhours="22-7"\n', "a span of the day"),
        ('[alerts.quiet]\nhours="22:00-24:00"\n', "a span of the day"),
        ('[alerts.quiet]\ncritical=true\n', "lacks hours"),
        ('[alerts.quiet]\ndays=["sat", "sonntag"]\n', 'names "sonntag"'),
        ('[alerts.quiet]\ndays=["mon","tue","wed","thu","fri","sat","sun"]\n', "fewer than all seven"),
        ('[alerts.quiet]\nhours="22:00-07:00"\ntimezone="Berlin"\n', "a time zone"),
        ('[alerts]\ndashboard="example.org"\n', "an address such as https"),
        ("[alerts\n", "is no TOML"),
        ('[alerts.channels.b]\ntype="email"\nhost="h"\nfrom="x"\nto="y@z"\n', "from in .* as addresses"),
        ('[alerts.channels.b]\ntype="email"\nhost="h"\nport=0\nfrom="x@y"\nto="y@z"\n', "from 1 to 65535"),
        ('[alerts.channels.b]\ntype="email"\nhost="h"\nuser="u"\nfrom="x@y"\nto="y@z"\n', "password_env"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_the_closest_known_word(tmp_path: Path, text: str, words: str) -> None:
    if "[alerts]\n" in text and "no channel" not in words and "channels=" not in text:
        text += '[alerts.channels.a]\ntype="desktop"\n'
    elif "routes" in text or "quiet" in text:
        text = f'[alerts.channels.a]\ntype="desktop"\n{text}'
    with pytest.raises(ConfigError, match=words) as caught:
        read_config(written(tmp_path, text))
    assert str(caught.value).startswith(str(tmp_path / "layerwatch.toml"))
    assert "\n" not in str(caught.value)


LITERALS = {
    'type="webhook"\nurl="https://hooks.example.org/T0PS3CR3T"': 'url_env = "LAYERWATCH_URL"',
    'type="webhook"\nurl_env="https://hooks.example.org/T0PS3CR3T"': 'url_env = "LAYERWATCH_SECRET"',
    'type="webhook"\nurl_env="URL"\ntoken="T0PS3CR3T"': 'token_env = "LAYERWATCH_TOKEN"',
    'type="email"\nhost="h"\nfrom="x@y"\nto="y@z"\nuser="u"\npassword="T0PS3CR3T"': "password_env =",
    'type="email"\nhost="h"\nfrom="x@y"\nto="y@z"\nuser="u"\npassword_env="t0ps3cr3t"': "password_env =",
    'type="webhook"\nurl_env="URL"\nheaders={A="T0PS3CR3T"}': 'unknown key "headers"',
}


@pytest.mark.parametrize("table", LITERALS)
def test_a_secret_in_the_file_is_refused_and_not_repeated(tmp_path: Path, table: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(written(tmp_path, f"[alerts.channels.b]\n{table}\n"))
    assert LITERALS[table] in str(caught.value)
    assert "t0ps3cr3t" not in str(caught.value).lower()
    assert caught.value.__suppress_context__  # nor in a traceback


def test_the_dashboard_address_holds_no_login_and_a_password_goes_over_tls() -> None:
    for address in ("https://ana:pw@example.org", "https://example.org/?token=abc"):
        with pytest.raises(ConfigError, match="without login") as caught:
            minimal(dashboard=address)
        assert address not in str(caught.value)
    mail = {
        "type": "email", "host": "smtp.example.org", "security": "none", "user": "u", "password_env": "P",
        "from": "a@b", "to": "c@d",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="would send the password unprotected"):
        config_of({"channels": {"m": mail}})


def test_nothing_secret_is_in_what_a_config_shows_of_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLACK_URL", "https://hooks.example.org/T0PS3CR3T")
    config = read_config(written(tmp_path, WHOLE))
    shown = [channel.words() for channel in config.channels.values()]
    assert not re.search("T0PS3CR3T", repr(config) + str(shown))
    assert "s3cret-argument" not in str(shown)
    assert shown[0] == "webhook (slack), URL in SLACK_URL"
    assert shown[2] == "command page with 2 arguments"
    assert config.unset() == {"mail": ["SMTP_PASSWORD"]}


def test_the_nearest_file_above_counts_then_that_of_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "project" / "runs" / "group").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    above = written(tmp_path / "project", WHOLE)
    here = written(Path.cwd(), WHOLE)
    assert find_config(tmp_path / "project" / "runs" / "group") == above
    assert find_config("s3://bucket/runs") == here
    assert find_config() == here
    nearer = written(tmp_path / "project" / "runs", WHOLE)
    assert find_config(tmp_path / "project" / "runs") == nearer


def test_a_file_of_another_user_is_not_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, WHOLE)
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    if owner == 0:  # root's may be obeyed
        os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        find_config(tmp_path)


def test_quiet_hours_on_a_wall_clock(tmp_path: Path) -> None:
    quiet = read_config(written(tmp_path, WHOLE)).quiet
    assert quiet is not None

    def at(text: str) -> float:
        return dt.datetime.fromisoformat(text).timestamp()

    assert not quiet.at(at("2026-11-19T21:59:59+01:00"))  # a Thursday
    assert quiet.at(at("2026-11-19T22:00:00+01:00"))
    assert quiet.at(at("2026-11-20T06:59:59+01:00"))
    assert not quiet.at(at("2026-11-20T07:00:00+01:00"))
    assert quiet.at(at("2026-11-21T12:00:00+01:00"))  # Saturday
    assert quiet.ends(at("2026-11-19T23:30:12+01:00")) == at("2026-11-20T07:00:00+01:00")
    assert quiet.ends(at("2026-11-20T23:00:00+01:00")) == at("2026-11-23T07:00:00+01:00")  # the week-end, too
    assert quiet.clock(at("2026-11-20T01:00:00+01:00")) == "07:00"
    assert quiet.clock(at("2026-11-20T23:00:00+01:00")) == "Mon 07:00"
    assert quiet.ends(at("2026-03-28T12:00:00+01:00")) == at("2026-03-30T07:00:00+02:00")  # clocks change
    assert not quiet.holds(alert(), at("2026-11-19T23:00:00+01:00"))  # critical passes
    assert quiet.holds(alert(severity="warning"), at("2026-11-19T23:00:00+01:00"))
    noon = minimal(quiet={"hours": "12:00-13:30", "timezone": "UTC"}).quiet
    assert noon is not None
    assert noon.at(at("2026-11-19T13:29:00+00:00"))
    assert not noon.at(at("2026-11-19T13:30:00+00:00"))
    assert noon.holds(alert(), at("2026-11-19T13:00:00+00:00"))
