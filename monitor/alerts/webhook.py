"""Webhooks: a message as JSON to a URL, in the form that Slack, Discord or Teams takes, or in our own."""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from .channels import TIMEOUT, Channel, Undelivered, secret
from .message import Item, Message, cut
from .settings import Table

#: Answers after which the same request may succeed later; of the others somebody has to change something.
_AGAIN = {408, 425, 429}
_WORDS = {
    301: "it has moved", 302: "it has moved", 307: "it has moved", 308: "it has moved",
    400: "it does not take this form of message", 401: "it refuses the sender", 403: "it refuses the sender",
    404: "there is no such webhook", 410: "there is no such webhook any more", 429: "too many messages",
}  # fmt: skip
_COLOURS = {"critical": 0xD32F2F, "warning": 0xED9C00, "info": 0x3B82F6}


@dataclass(frozen=True)
class Webhook(Channel):
    """The URL is a secret: who knows it can post. `token_env`: of a bearer token, where one is wanted."""

    format: str
    url_env: str
    token_env: str = ""

    @classmethod
    def of(cls, name: str, table: Table) -> Webhook:
        """As the settings file says."""
        form = table.choice("format", list(FORMATS), "json")
        return cls(name, form, table.variable("url_env"), table.variable("token_env", ""))

    def words(self) -> str:
        """What it is."""
        return f"webhook ({self.format}), URL in {self.url_env}"

    def variables(self) -> Sequence[str]:
        """URL and token."""
        return [name for name in (self.url_env, self.token_env) if name]

    def send(self, message: Message, timeout: float = TIMEOUT) -> str:
        """Post it; a redirect is not followed, since the message was not meant for there."""
        url = secret(self.url_env)
        headers = {"Content-Type": "application/json", "User-Agent": "layerwatch"}
        if self.token_env:
            headers["Authorization"] = f"Bearer {secret(self.token_env)}"
        body = json.dumps(FORMATS[self.format](message), allow_nan=False).encode()
        try:
            good = urlsplit(url).scheme in ("http", "https") and bool(urlsplit(url).hostname)
        except ValueError:
            good = False
        if not good:
            raise Undelivered(f"{self.url_env} does not hold an http or https URL", lasting=True)
        _post(url, body, headers, timeout)
        return ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _post(url: str, body: bytes, headers: dict[str, str], timeout: float) -> None:
    """Errors of the library hold the URL: their own words are not passed on."""
    try:
        request = urllib.request.Request(url, body, headers, method="POST")
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout):
            return
    except urllib.error.HTTPError as answer:
        answer.close()
        code, after = answer.code, _retry_after(answer.headers.get("Retry-After"))
        words = f" ({_WORDS[code]})" if code in _WORDS else ""
        lasting = code < 500 and code not in _AGAIN
        failure = Undelivered(f"the server answered {code}{words}", lasting=lasting, after=after)
    except (OSError, http.client.HTTPException, ValueError) as error:
        failure = Undelivered(network_words(error, timeout), lasting=isinstance(error, ValueError))
    raise failure


def network_words(error: BaseException, timeout: float) -> str:
    """What went wrong on the way, without what the error itself says: that may hold a URL or a login."""
    while isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        error = error.reason
    if isinstance(error, TimeoutError):
        return f"no answer within {round(timeout, 1):g} s"
    if isinstance(error, ssl.SSLError):
        reason = error.reason or "handshake failed"
        return f"no secure connection ({reason.replace('_', ' ').lower()})"
    if isinstance(error, socket.gaierror):
        return "its host name is not known"
    if isinstance(error, http.client.InvalidURL | ValueError):
        return "its address is not valid"
    if isinstance(error, OSError) and error.errno and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    return f"the connection broke ({type(error).__name__})"


def _retry_after(text: str | None) -> float:
    """Seconds; a date is turned into them. 0 where nothing sound is said."""
    if not text:
        return 0.0
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text.strip()):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _slack(message: Message) -> dict[str, Any]:
    """Block Kit: at most 150 characters in a header, 3,000 in a section, 50 blocks. `&`, `<` and `>` are
    Slack's own, and would let a run's name call everybody (docs.slack.dev, formatting message text)."""

    def section(item: Item) -> dict[str, Any]:
        head = f"*{_slack_text(item.head, 400)}*\n" if item.head else ""
        url = item.link if len(item.link) < 1000 else ""
        link = f"\n<{url.replace('&', '&amp;').replace('|', '%7C')}|Open in the dashboard>" if url else ""
        text = head + _slack_text(item.body, 1500) + link
        return {"type": "section", "text": {"type": "mrkdwn", "text": text, "verbatim": True}}

    title = {"type": "plain_text", "text": _slack_text(message.title, 150), "emoji": False}
    blocks = [{"type": "header", "text": title}, *map(section, message.items)]
    if message.rest:
        text = {"type": "mrkdwn", "text": _slack_text(message.rest, 1500), "verbatim": True}
        blocks.append({"type": "section", "text": text})
    return {"text": title["text"], "blocks": blocks}


def _slack_text(text: str, most: int) -> str:
    """Escaped, and of at most so many characters then: else Slack refuses the message with all others."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text if len(text) <= most else re.sub("&[a-z]*$", "", text[: most - 1]) + "…"


def _discord(message: Message) -> dict[str, Any]:
    """An embed: title up to 256 characters, description up to 4,096. Nobody is mentioned, whatever a run is
    called (discord.com/developers, execute webhook)."""
    parts = []
    for item in message.items:
        head = f"**{_markdown(item.head)}**\n" if item.head else ""
        link = f"\n[Open in the dashboard](<{item.link}>)" if item.link else ""
        parts.append(head + _markdown(_shorter(item.body, 1500)) + link)
    whole = _fitting([*parts, *([_markdown(message.rest)] if message.rest else [])], 4096)
    embed = {
        "title": cut(_markdown(message.title), 256),
        "description": whole,
        "color": _COLOURS[message.severity],
    }
    return {"embeds": [embed], "allowed_mentions": {"parse": []}}


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_~|>\[\]()#@])", r"\\\1", text)


def _teams(message: Message) -> dict[str, Any]:
    """An adaptive card in the envelope of Teams' workflow "when a webhook request is received", at most 28 KB
    (learn.microsoft.com, incoming webhooks): of many long alerts as many as fit, with a word on the rest."""
    told = len(message.items)
    while len(json.dumps(posted := _card(message, told))) > 28_000 and told > 1:
        told -= 1
    return posted


def _card(message: Message, told: int) -> dict[str, Any]:
    """Text runs know no Markdown, so that names stay as they are."""

    def block(*runs: dict[str, Any]) -> dict[str, Any]:
        inlines = [{"type": "TextRun", **run} for run in runs]
        return {"type": "RichTextBlock", "inlines": inlines, "spacing": "Medium"}

    colour = {"critical": "Attention", "warning": "Warning"}.get(message.severity, "Accent")
    body = [block({"text": cut(message.title, 300), "weight": "Bolder", "size": "Medium", "color": colour})]
    for item in message.items[:told]:
        open_it = {"selectAction": {"type": "Action.OpenUrl", "url": item.link}} if item.link else {}
        if item.head:
            body.append(block({"text": cut(item.head, 300), "weight": "Bolder", **open_it}))
        body.append(block({"text": _shorter(item.body, 1500 if len(message.items) == 1 else 300)}))
    if told < len(message.items):
        body.append(block({"text": f"and {len(message.items) - told} more"}))
    if message.rest:
        body.append(block({"text": cut(message.rest, 1000)}))
    card: dict[str, Any] = {
        "$schema": "http://adaptivecards.io/schemas/adaptive-card.json", "type": "AdaptiveCard",
        "version": "1.4", "msteams": {"width": "Full"}, "body": body,
    }  # fmt: skip
    if len(message.items) == 1 and message.items[0].link:
        link = {"type": "Action.OpenUrl", "title": "Open in the dashboard", "url": message.items[0].link}
        card["actions"] = [link]
    content = {"contentType": "application/vnd.microsoft.card.adaptive", "contentUrl": None, "content": card}
    return {"type": "message", "attachments": [content]}


def _shorter(text: str, most: int) -> str:
    """With its lines."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _fitting(parts: Sequence[str], most: int) -> str:
    """As many parts as fit, with a word on the rest."""
    for count in range(len(parts), 0, -1):
        left = len(parts) - count
        text = "\n\n".join([*parts[:count], *([f"and {left} more"] if left else [])])
        if len(text) <= most:
            return text
    return _shorter(parts[0], most)


#: What each receiver wants to have posted.
FORMATS: dict[str, Callable[[Message], dict[str, Any]]] = {
    "json": Message.to_dict,
    "slack": _slack,
    "discord": _discord,
    "teams": _teams,
}
