"""Who may ask, what a browser may do with the answer: hosts, tokens, other sites, headers, errors."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import logging
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode, urlsplit

from dash.exceptions import DependencyException
from flask import Flask, Response, abort, redirect, request
from werkzeug.exceptions import HTTPException
from werkzeug.routing import RequestRedirect
from werkzeug.wrappers import Response as Answer

from .static import shrink

log = logging.getLogger(__name__)
#: A token that can be guessed protects nothing.
LEAST_TOKEN = 16
#: Whether the server answers at all: for whoever starts it again when it does not.
HEALTH = "/healthz"
MOST_BYTES = 4 << 20  # of a request; figures are drawn here, so little is sent to us
_INLINE = re.compile(r"<script(?![^>]*\bsrc=)[^>]*>(.*?)</script>", re.DOTALL)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_LOCKED = """<!DOCTYPE html>
<html lang="en"><head><title>layerwatch</title><meta name="viewport" content="width=device-width"></head>
<body><h1>A token is needed</h1>
<p>Open the address that the command printed when it was started; it ends with <code>?token=...</code>.
If you have done so before, reload this page.</p>
<p>A program sends the header <code>Authorization: Bearer ...</code> instead.</p></body></html>"""
_ONWARD = (
    '<!DOCTYPE html><html lang="en"><head><title>layerwatch</title></head><body>One moment ...</body></html>'
)


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        host: the address that is listened at.
        token: what a browser must have shown once; "" where none is needed.
        names: more host names that we are asked for, as a proxy passes them on.
        any_host: with a token, any host name will do: another site's page does not have the token.
        framed: pages may be shown inside a notebook of this machine.

    Raises:
        ValueError: an address that others can reach, and no token; or one that can be guessed.
    """

    host: str = "127.0.0.1"
    token: str = ""
    names: tuple[str, ...] = ()
    any_host: bool = False
    framed: bool = False
    known: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        if not self.token and (self.any_host or not loopback(self.host)):
            raise ValueError(f"expected a token, because others can reach {self.host or 'this machine'}")
        if self.token and len(self.token) < LEAST_TOKEN:
            raise ValueError(
                f"expected a token of at least {LEAST_TOKEN} characters: leave it out to get one"
            )
        names = {"localhost", self.host.strip("[]").lower(), socket.gethostname().lower()}
        object.__setattr__(self, "known", frozenset(names | {name.lower() for name in self.names}))

    @property
    def cookie(self) -> str:
        """Its name: dashboards on other ports of a machine have other tokens, but share the cookies."""
        return f"layerwatch_{hashlib.blake2b(self.token.encode(), digest_size=6).hexdigest()}"

    def shown(self, token: str | None) -> bool:
        """Whether this is the token; takes equally long for every wrong one."""
        return hmac.compare_digest((token or "").encode(), self.token.encode())

    @property
    def ancestors(self) -> str:
        """The pages that may have ours in a frame."""
        return "'self' http://localhost:* http://127.0.0.1:*" if self.framed else "'none'"


def loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def protect(server: Flask, access: Access) -> None:
    """Install the checks and headers."""
    server.config["MAX_CONTENT_LENGTH"] = MOST_BYTES
    packed: dict[str, bytes] = {}

    @server.before_request
    def check() -> Answer | None:
        if not access.any_host and not host_allowed(request.host, access.known):
            abort(400, "This server does not answer for that host name.")
        if not same_site(access):
            abort(403, "Another site's page must not ask this.")
        return _identify(access) if access.token and request.path != HEALTH else None

    server.add_url_rule(HEALTH, "health", lambda: Response("ok\n", mimetype="text/plain"))

    @server.after_request
    def harden(response: Response) -> Response:
        response.headers.update(_HEADERS)
        if not access.framed:
            response.headers["X-Frame-Options"] = "DENY"
        if response.mimetype == "text/html":
            html = response.get_data(as_text=True)
            response.headers["Content-Security-Policy"] = policy(html, access.ancestors)
            response.headers["Cache-Control"] = "no-cache"
        else:
            shrink(response, packed)
        return response

    @server.errorhandler(Exception)
    def failed(error: Exception) -> Answer | tuple[str, int, dict[str, str]]:
        """What a browser hears of an error: never a path, a traceback or a text of somebody else."""
        plain = {"Content-Type": "text/plain; charset=utf-8"}
        if isinstance(error, RequestRedirect):
            return error.get_response()
        if isinstance(error, HTTPException) and error.code and error.code < 500:
            return f"{error.code} {error.name}. {error.description or ''}\n", error.code, plain
        if isinstance(error, DependencyException):  # a file of Dash that does not exist
            return "404 Not Found.\n", 404, plain
        log.error("%s %s failed", request.method, request.path, exc_info=error)
        return "500 Internal Server Error. The log of the server says more.\n", 500, plain


def _identify(access: Access) -> Answer | None:
    """Let in who has the token; take it out of the address, where it would be copied and remembered."""
    if "token" in request.args:
        if not access.shown(request.args["token"]):
            return Response(_LOCKED, 401)
        rest = [(key, value) for key, value in request.args.items(multi=True) if key != "token"]
        # One slash: what begins with two would lead to another host.
        place = f"{request.script_root}/{quote(request.path.strip('/'))}" + (
            f"?{urlencode(rest)}" if rest else ""
        )
        # A link on another site: the browser keeps our cookie back until a page of ours asks.
        foreign = request.headers.get("Sec-Fetch-Site") == "cross-site"
        answer = (
            Response(_ONWARD, headers={"Refresh": f"0; url={place}"}) if foreign else redirect(place, 303)
        )
        answer.set_cookie(
            access.cookie, access.token, httponly=True, samesite="Strict", path=f"{request.script_root}/"
        )
        return answer
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    given = bearer.strip() if scheme.lower() == "bearer" else request.cookies.get(access.cookie)
    if access.shown(given):
        return None
    return Response(_LOCKED, 401, {"WWW-Authenticate": "Bearer"})


def host_allowed(header: str, names: Iterable[str]) -> bool:
    """Whether a Host header names this machine.

    A page of another site can point its own name at 127.0.0.1 (DNS rebinding), so unknown names are refused;
    an address cannot be pointed anywhere else and is allowed.
    """
    try:
        hostname = (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return False
    if hostname in names:
        return True
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        return False
    return True


def same_site(access: Access) -> bool:
    """Whether the request comes from a page of ours, a program, or the reader's own hand.

    A page of another site may link to us, and nothing else. Browsers say where a request comes from, in
    `Sec-Fetch-Site` where the connection is trusted, and in `Origin` of every POST.
    """
    site, mode = request.headers.get("Sec-Fetch-Site"), request.headers.get("Sec-Fetch-Mode")
    if site is not None and site not in ("same-origin", "none"):
        return request.method in ("GET", "HEAD") and mode == "navigate"
    origin = request.headers.get("Origin")
    if origin is None or site == "same-origin" or request.method in ("GET", "HEAD"):
        return True
    parts = urlsplit(origin)
    return parts.netloc == request.host or (parts.hostname or "") in {name.lower() for name in access.names}


def policy(html: str, ancestors: str = "'none'") -> str:
    """The Content-Security-Policy of a page: only our own files, plus the hashes of its inline scripts.

    Without 'unsafe-inline' and 'unsafe-eval' no text from a log can become a script.
    """
    hashes = [
        "'sha256-" + base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() + "'"
        for body in _INLINE.findall(html)
    ]
    return "; ".join(
        [
            "default-src 'self'",
            " ".join(["script-src 'self'", *hashes]),
            "style-src 'self' 'unsafe-inline'",  # Mantine and Plotly write style attributes
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "connect-src 'self'",
            "object-src 'none'",
            "base-uri 'none'",
            "form-action 'self'",
            f"frame-ancestors {ancestors}",
        ]
    )
