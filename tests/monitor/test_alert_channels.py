"""Channels against real servers: what they post, and what they say when it goes wrong."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerwatch.monitor.alerts.alert import Alert
from layerwatch.monitor.alerts.channels import Channel, Command, Undelivered
from layerwatch.monitor.alerts.config import config_of
from layerwatch.monitor.alerts.message import Message
from tests.alert_servers import PASSWORD, SECRET, HttpServer, MailServer, certificate
from tests.object_server import reserved_port

ONE = Alert(
    run="group/exp1", key="k", problem="exploding_gradients", severity="critical",
    summary="the norm grew by 1e6 & more within 10 steps", layers=("conv_1.weight", "fc*2", "c", "d"),
    first_step=120, last_step=160, advice="clip gradients at 1.0", owner="ana", tags=("prod", "v2"),
    link="https://example.org/run/group/exp1/overview?finding=exploding_gradients", time=1.7e9,
)  # fmt: skip
NASTY = "<!channel> @everyone **b** [x](http://evil) \x00 \"quote\" 'q' `t`\nnew line"


def many(count: int) -> list[Alert]:
    about: dict[str, Any] = {"severity": "warning", "summary": "half of the units are dead", "first_step": 7}
    return [Alert(run=f"exp{i}", key=f"k{i}", problem="dead_units", **about) for i in range(count)]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def channel(kind: str, **options: Any) -> Channel:
    return config_of({"channels": {"c": {"type": kind, **options}}}).channels["c"]


def webhook(monkeypatch: pytest.MonkeyPatch, url: str, form: str = "json", **more: Any) -> Channel:
    monkeypatch.setenv("HOOK_URL", url)
    return channel("webhook", format=form, url_env="HOOK_URL", **more)


def refusal(sender: Channel, *, timeout: float = 30.0) -> Undelivered:
    """What it says, which holds nothing secret, nor does what it came from."""
    with pytest.raises(Undelivered) as caught:
        sender.send(Message([ONE]), timeout)
    cause: BaseException | None = caught.value
    while cause is not None:
        assert SECRET not in repr(cause)
        assert PASSWORD not in repr(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return caught.value


# Webhooks


def test_our_own_form_holds_all_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_TOKEN", "bearer-of-news")
    with HttpServer() as server:
        webhook(monkeypatch, server.url, token_env="HOOK_TOKEN").send(Message([ONE]))
    [got] = server.got
    assert got["title"] == "critical: exploding gradients in group/exp1"
    assert got["severity"] == "critical"
    assert got["alerts"] == [ONE.to_dict()]
    assert "Layers: conv_1.weight, fc*2, c and 1 more" in got["text"]
    assert server.headers[0]["Authorization"] == "Bearer bearer-of-news"


def texts(value: Any) -> list[str]:
    """Every text in a JSON document."""
    if isinstance(value, dict):
        return [text for one in value.values() for text in texts(one)]
    if isinstance(value, list):
        return [text for one in value for text in texts(one)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("form", ["slack", "discord", "teams"])
@pytest.mark.parametrize("count", [1, 2, 20, 500])
def test_every_form_says_what_and_where_within_its_limits(
    monkeypatch: pytest.MonkeyPatch, form: str, count: int
) -> None:
    alerts = [ONE, *many(count - 1)]
    with HttpServer(204) as server:
        webhook(monkeypatch, server.url, form).send(Message(alerts))
    [got] = server.got
    words = "\n".join(texts(got))
    if count == 1:
        assert "critical: exploding gradients in group/exp1" in words
        assert "clip gradients at 1.0" in words
    else:
        assert f"{count} alerts in {count} runs: 1 critical, {count - 1} warning" in words
    assert ONE.link in words
    if form == "slack":
        assert len(got["blocks"]) <= 50
        assert len(got["blocks"][0]["text"]["text"]) <= 150
        assert all(len(block["text"]["text"]) <= 3000 for block in got["blocks"])
        assert "1e6 &amp; more" in words
    elif form == "discord":
        [embed] = got["embeds"]
        assert len(embed["title"]) <= 256
        assert len(embed["description"]) <= 4096
        assert got["allowed_mentions"] == {"parse": []}
    else:
        card = got["attachments"][0]["content"]
        assert got["type"] == "message"
        assert got["attachments"][0]["contentType"] == "application/vnd.microsoft.card.adaptive"
        assert (card["type"], card["version"]) == ("AdaptiveCard", "1.4")
        assert len(json.dumps(got)) <= 28_000


@pytest.mark.parametrize("count", [1, 3, 100])
def test_long_alerts_in_another_alphabet_fit_into_a_card(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    alerts = [
        Alert(
            run=f"{number} " + "ж" * 250, key=str(number), problem="nonfinite", severity="critical",
            summary="损" * 2000, link="https://x.org/" + "%D0" * 200,
        )
        for number in range(count)
    ]  # fmt: skip
    with HttpServer() as server:
        webhook(monkeypatch, server.url, "teams").send(Message(alerts))
    [got] = server.got
    assert len(json.dumps(got)) <= 28_000
    words = texts(got)
    told = sum("损" in text for text in words)
    assert told >= min(count, 3)
    left = [int(found[1]) for text in words if (found := re.match(r"and (\d+) more", text))]
    assert told + sum(left) == count


@pytest.mark.parametrize("others", [0, 1, 30])
def test_an_odd_alert_is_within_the_limits_and_takes_no_other_along(
    others: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tags = ("&" * 60, *[f"t{number}" * 10 for number in range(5000)])
    odd = Alert(
        run="<" * 300, key="k", problem="nonfinite", severity="critical", summary="&<" * 900, tags=tags,
        link="https://x.org/" + "%3C" * 800,
    )  # fmt: skip
    with HttpServer() as server:
        webhook(monkeypatch, server.url, "slack").send(Message([odd, *many(others)]))
    [got] = server.got
    assert len(got["blocks"][0]["text"]["text"]) <= 150
    assert all(len(block["text"]["text"]) <= 3000 for block in got["blocks"])
    assert not any(re.search("&(?!amp;|lt;|gt;)", text) for text in texts(got))
    told = tmp_path / "told"
    Command("c", (sys.executable, "-c", f"open({str(told)!r}, 'w')")).send(Message([odd, *many(others)]))
    assert told.exists()


@pytest.mark.parametrize("form", ["json", "slack", "discord", "teams"])
def test_a_run_with_an_evil_name_calls_nobody(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    evil = Alert(run=NASTY, key="k", problem="nonfinite", severity="critical", summary=NASTY * 200)
    with HttpServer() as server:
        webhook(monkeypatch, server.url, form).send(Message([evil]))
    [got] = server.got
    words = texts(got)
    if form == "slack":
        assert not any("<!channel>" in text for text in words)
    elif form == "discord":
        assert got["allowed_mentions"] == {"parse": []}
        assert not any(re.search(r"(?<!\\)\*\*b", text) or "](http" in text for text in words)
    elif form == "teams":
        kinds = {block["type"] for block in got["attachments"][0]["content"]["body"]}
        assert kinds == {"RichTextBlock"}  # which knows no Markdown


@pytest.mark.parametrize(
    ("answer", "words", "lasting"),
    [
        (500, "the server answered 500", False),
        (503, "the server answered 503", False),
        (404, "the server answered 404 (there is no such webhook)", True),
        (403, "the server answered 403 (it refuses the sender)", True),
        ((301, {"Location": "http://127.0.0.1:9/x"}), "the server answered 301 (it has moved)", True),
        ((307, {"Location": f"http://127.0.0.1:9/{SECRET}"}), "the server answered 307 (it has moved)", True),
    ],
)
def test_answers_that_are_none(
    monkeypatch: pytest.MonkeyPatch, answer: Any, words: str, lasting: bool
) -> None:
    with HttpServer(answer) as server:
        error = refusal(webhook(monkeypatch, server.url))
    assert (str(error), error.lasting) == (words, lasting)


def test_too_many_messages_says_when_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    for text, low, high in (("7", 7, 7), ("0.5", 0.5, 0.5), (later, 55, 61), ("soon", 0, 0), ("-4", 0, 0)):
        with HttpServer((429, {"Retry-After": text})) as server:
            error = refusal(webhook(monkeypatch, server.url))
        assert str(error) == "the server answered 429 (too many messages)"
        assert not error.lasting
        assert low <= error.after <= high


def test_nobody_there_a_hanging_server_and_a_host_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with reserved_port() as free:
        port = free.getsockname()[1]
        assert str(refusal(webhook(monkeypatch, f"http://127.0.0.1:{port}/{SECRET}"))) == "connection refused"
    with HttpServer("hang") as server:
        assert str(refusal(webhook(monkeypatch, server.url), timeout=0.3)) == "no answer within 0.3 s"

    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, f"Name or service not known: {SECRET}")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = refusal(webhook(monkeypatch, f"http://hooks.invalid/{SECRET}"))
    assert str(error) == "its host name is not known"


@pytest.mark.parametrize("url", [f"ftp://x/{SECRET}", SECRET, f"http:///{SECRET}", f"http://[x/{SECRET}"])
def test_a_url_that_is_none(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    error = refusal(webhook(monkeypatch, url))
    assert str(error) == "HOOK_URL does not hold an http or https URL"
    assert error.lasting


def test_a_url_that_cannot_be_asked_for_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refusal(webhook(monkeypatch, f"http://127.0.0.1:1/{SECRET} with\tblanks"))
    assert str(error) == "its address is not valid"


def test_without_the_environment_variable() -> None:
    error = refusal(channel("webhook", url_env="NOT_SET_ANYWHERE"))
    assert str(error) == "the environment variable NOT_SET_ANYWHERE is not set"
    assert error.lasting


def test_tls_is_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pem = certificate(tmp_path / "server.pem")
    with HttpServer(certificate=pem) as server:
        error = refusal(webhook(monkeypatch, server.url))
        assert str(error) == "no secure connection (certificate verify failed)"
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))  # a company's own authority
        webhook(monkeypatch, server.url).send(Message([ONE]))
    assert server.alerts == [("group/exp1", "critical", "exploding_gradients")]
    with HttpServer() as plain:
        error = refusal(webhook(monkeypatch, plain.url.replace("http:", "https:")))
    assert "no secure connection" in str(error)


# E-mail


def mailbox(server: MailServer, **more: Any) -> Channel:
    about = {"host": "127.0.0.1", "port": server.port, "from": "lw@example.org", "security": "none"}
    return channel("email", **{**about, "to": ["ana@example.org", "ben@example.org"], **more})


def test_a_mail_arrives_as_it_should() -> None:
    with MailServer() as server:
        assert mailbox(server).send(Message([ONE])) == ""
        mailbox(server).send(Message(many(30)))
        name = Alert(run=NASTY, key="k", problem="nonfinite", severity="critical", summary="ü ☃ in a name")
        mailbox(server).send(Message([name]))
    first, second, third = server.mails
    assert first["Subject"] == "[layerwatch] critical: exploding gradients in group/exp1"
    assert first["To"] == "ana@example.org, ben@example.org"
    assert first["Auto-Submitted"] == "auto-generated"
    assert first["Message-ID"].endswith("@example.org>")
    assert "Try first: clip gradients at 1.0" in first.get_content()
    assert ONE.link in first.get_content()
    assert second["Subject"] == "[layerwatch] 30 alerts in 30 runs: 30 warning"
    assert "and 10 more: 10 × dead units" in second.get_content()
    assert "ü ☃ in a name" in third.get_content()


def test_a_mail_server_with_tls_and_a_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pem = certificate(tmp_path / "mail.pem")
    monkeypatch.setenv("MAIL_PASSWORD", PASSWORD)
    login = {"user": "bot", "password_env": "MAIL_PASSWORD", "security": "starttls"}
    with MailServer(login=True, starttls=pem) as server:
        error = refusal(mailbox(server, **login))
        assert str(error) == "no secure connection (certificate verify failed)"
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        mailbox(server, **login).send(Message([ONE]))
        assert server.logins == [("bot", PASSWORD)]
        monkeypatch.setenv("MAIL_PASSWORD", f"not-{PASSWORD}")
        error = refusal(mailbox(server, **login))
        assert str(error) == "the mail server answered 535 (it refuses the login)"
        assert error.lasting
    assert len(server.mails) == 1
    with MailServer() as server:  # one that would take the password in plain text
        error = refusal(mailbox(server, **login))
    assert str(error) == "the mail server offers no STARTTLS, or no login"
    assert not server.mails


def test_mail_servers_that_refuse_fail_and_hang() -> None:
    with MailServer("451 try later", "554 no", "250 OK") as server:
        assert [(str(e), e.lasting) for e in (refusal(mailbox(server)), refusal(mailbox(server)))] == [
            ("the mail server answered 451", False),
            ("the mail server answered 554", True),
        ]
    with MailServer(refused=("ana@example.org",)) as server:
        assert mailbox(server).send(Message([ONE])) == "1 of 2 addresses were refused"
        assert server.to == [["ben@example.org"]]
        error = refusal(mailbox(server, to="ana@example.org"))
        assert str(error) == "the mail server refuses every address"
    with MailServer(delay=1.0) as server:
        assert "no answer within 0.2 s" in str(refusal(mailbox(server), timeout=0.2))
    with reserved_port() as free:
        error = refusal(mailbox(server, port=free.getsockname()[1]))
        assert str(error) == "connection refused"


# Commands and the desktop

SHOW = """
import json, os, sys
about = {k: v for k, v in os.environ.items() if k.startswith("LAYERWATCH_")}
open(sys.argv[1], "w").write(json.dumps([json.load(sys.stdin), about, sys.argv[2:]]))
"""


def test_a_command_gets_the_message_and_no_shell_sees_it(tmp_path: Path) -> None:
    out, words = tmp_path / "out.json", "$(touch evil); `touch evil` > evil"
    program = [sys.executable, "-c", SHOW, str(out), words]
    named = Alert(run=NASTY, key="k", problem="nonfinite", severity="critical", summary=words)
    channel("command", command=program).send(Message([named, *many(2)]))
    document, about, rest = json.loads(out.read_text())
    assert document["alerts"][0]["run"] == NASTY
    assert about["LAYERWATCH_RUN"] == NASTY.replace("\0", "")
    assert about["LAYERWATCH_COUNT"] == "3"
    assert about["LAYERWATCH_SEVERITY"] == "critical"
    assert about["LAYERWATCH_PROBLEM"] == "nonfinite"
    assert rest == [words]
    assert not Path("evil").exists()


def test_commands_that_fail_hang_or_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = channel("command", command=[sys.executable, "-c", "raise SystemExit(3)", SECRET])
    assert str(refusal(sender)) == f"{Path(sys.executable).name} ended with exit code 3"
    error = refusal(channel("command", command=["/no/such/program", SECRET]))
    assert str(error) == "program cannot be started: No such file or directory"
    assert error.lasting
    child = tmp_path / "child"
    hang = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); "
    hang += "open(sys.argv[1], 'w').write(str(p.pid)); p.wait()"
    communicate = subprocess.Popen.communicate

    def once_it_hangs(process: subprocess.Popen[bytes], *more: Any) -> Any:
        until(lambda: child.exists() and child.read_text())
        return communicate(process, *more)

    monkeypatch.setattr(subprocess.Popen, "communicate", once_it_hangs)
    error = refusal(channel("command", command=[sys.executable, "-c", hang, str(child)]), timeout=2.0)
    assert "was ended after 2 s" in str(error)
    until(lambda: not running(int(child.read_text())))  # what it had started has ended with it


def until(done: Callable[[], object]) -> None:
    limit = time.monotonic() + 60
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.05)


def running(pid: int) -> bool:
    """It has not ended, nor is it a zombie that nobody waits for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_notification_on_the_desktop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = refusal(channel("desktop"))
    assert re.fullmatch("(notify-send|osascript) is not installed here", str(error))
    for name, system in (("notify-send", "Linux"), ("osascript", "Darwin")):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/{name}.out\n')
        program.chmod(0o755)
        monkeypatch.setattr("platform.system", lambda system=system: system)
        channel("desktop").send(Message([ONE]))
        said = (tmp_path / f"{name}.out").read_text()
        assert "critical: exploding gradients in group/exp1\n" in said
        assert "the norm grew by 1e6 & more within 10 steps" in said
