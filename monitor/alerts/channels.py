"""Channels: how a message leaves. Commands and the desktop are here, `webhook` and `mail` stand beside it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from .message import Message, cut
from .settings import ConfigError, Table

#: What one attempt may take, in seconds.
TIMEOUT = 10.0
#: Characters of an environment variable: with longer ones a program may not start.
LONGEST = 30_000


class Undelivered(Exception):
    """A message was not taken. The text says why in a few words, without anything secret.

    Args:
        lasting: the same attempt would fail again, somebody has to change something.
        after: seconds that the receiver asks to wait.
    """

    def __init__(self, reason: str, *, lasting: bool = False, after: float = 0.0) -> None:
        super().__init__(reason)
        self.lasting, self.after = lasting, after


@dataclass(frozen=True)
class Channel:
    """A way to people. `name`: what the settings file calls it. Secrets are the names of environment
    variables, read when something is sent, and kept nowhere."""

    name: str

    def send(self, message: Message, timeout: float = TIMEOUT) -> str:
        """Send it now. Returns a remark on how it went, mostly "".

        Args:
            timeout: how long the other side may say nothing, or a program may take, in seconds.

        Raises:
            Undelivered: it did not arrive.
        """
        raise NotImplementedError

    def words(self) -> str:
        """What it is, for people."""
        raise NotImplementedError

    def variables(self) -> Sequence[str]:
        """The environment variables that it needs."""
        return ()


def secret(variable: str) -> str:
    """What an environment variable holds.

    Raises:
        Undelivered: it is not set.
    """
    value = os.environ.get(variable, "").strip()
    if not value:
        raise Undelivered(f"the environment variable {variable} is not set", lasting=True)
    return value


@dataclass(frozen=True)
class Command(Channel):
    """A program of the user's: no shell, the message as JSON on its standard input."""

    command: tuple[str, ...]

    @classmethod
    def of(cls, name: str, table: Table) -> Command:
        """As the settings file says."""
        command = table.texts("command", needed=True)
        if not command[0].strip():
            raise table.wrong("command", "a program and its arguments", command[0])
        return cls(name, command)

    def words(self) -> str:
        """The program; its arguments may be secret."""
        rest = len(self.command) - 1
        more = "" if not rest else " with 1 argument" if rest == 1 else f" with {rest} arguments"
        return f"command {self.command[0]}{more}"

    def send(self, message: Message, timeout: float = TIMEOUT) -> str:
        """Run it; it is ended, with all that it has started, when it takes too long."""
        first = message.alerts[0]
        about = {
            "TITLE": message.title, "TEXT": message.text(), "SEVERITY": message.severity,
            "COUNT": str(len(message.alerts)), "RUN": first.run, "PROBLEM": first.problem,
            "STEP": str(first.first_step), "LAYER": first.layers[0] if first.layers else "",
            "LINK": first.link, "OWNER": first.owner, "TAGS": ",".join(first.tags),
        }  # fmt: skip
        environment = {f"LAYERWATCH_{key}": text[:LONGEST].replace("\0", "") for key, text in about.items()}
        document = json.dumps(message.to_dict(), allow_nan=False).encode()
        run_program(self.command, document, environment, timeout)
        return ""


@dataclass(frozen=True)
class Desktop(Channel):
    """A notification on the screen of this machine."""

    def words(self) -> str:
        """What it is."""
        return "desktop notification"

    def send(self, message: Message, timeout: float = TIMEOUT) -> str:
        """By notify-send, or by osascript on a Mac."""
        title, body = message.title, cut(message.text(), 400)
        if platform.system() == "Darwin":
            script = "display notification (item 2 of argv) with title (item 1 of argv)"
            command = ["osascript", "-e", "on run argv", "-e", script, "-e", "end run", title, body]
        else:
            urgency = {"critical": "critical", "info": "low"}.get(message.severity, "normal")
            command = ["notify-send", "--app-name=layerwatch", f"--urgency={urgency}", "--", title, body]
        if shutil.which(command[0]) is None:
            raise Undelivered(f"{command[0]} is not installed here", lasting=True)
        run_program(command, b"", {}, timeout)
        return ""


def run_program(command: Sequence[str], document: bytes, environment: dict[str, str], timeout: float) -> None:
    """Run a program in a session of its own and wait for it.

    Raises:
        Undelivered: it cannot be started, fails, or takes too long.
    """
    program = os.path.basename(command[0])
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "its arguments"
        raise Undelivered(f"{program} cannot be started: {reason}", lasting=True) from None
    try:
        process.communicate(document, timeout)
    except subprocess.TimeoutExpired:
        _end(process)
        raise Undelivered(f"{program} was ended after {round(timeout, 1):g} s") from None
    if process.returncode:
        raise Undelivered(f"{program} ended with exit code {process.returncode}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """With what it has started, which may hold the pipe open."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, OSError):  # no process groups here, or it has just ended
        process.kill()
    process.wait()


def channel_of(name: str, table: Table) -> Channel:
    """The channel that a table of the settings file describes.

    Raises:
        ConfigError: it describes none.
    """
    from .mail import Email
    from .webhook import Webhook

    kinds = {"command": Command.of, "webhook": Webhook.of, "email": Email.of}
    kind = table.choice("type", [*kinds, "desktop"])
    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise ConfigError(f'expected letters, digits, "-" and "_" in the name of {table.where}')
    channel = kinds[kind](name, table) if kind in kinds else Desktop(name)
    table.done()
    return channel
