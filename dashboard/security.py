"""What protects a reader on localhost: known host names, nothing from outside, files compressed once."""

from __future__ import annotations

import base64
import gzip
import hashlib
import ipaddress
import re
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flask import Flask, Response, abort, request

if TYPE_CHECKING:
    from collections.abc import Iterable

_INLINE = re.compile(r"<script(?![^>]*\bsrc=)[^>]*>(.*?)</script>", re.DOTALL)
_STATIC = ("/_dash-component-suites/", "/assets/")
_YEAR = "public, max-age=31536000, immutable"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


def protect(server: Flask, host: str) -> None:
    """Install the checks and headers on the server that will listen on `host`."""
    names = {"localhost", host.strip("[]").lower(), socket.gethostname().lower()}
    packed: dict[str, bytes] = {}

    @server.before_request
    def refuse_foreign_hosts() -> None:
        if not host_allowed(request.host, names):
            abort(400, "This server does not answer for that host name.")

    @server.after_request
    def harden(response: Response) -> Response:
        response.headers.update(_HEADERS)
        if response.mimetype == "text/html":
            response.headers["Content-Security-Policy"] = policy(response.get_data(as_text=True))
            response.headers["Cache-Control"] = "no-cache"
        elif request.path.startswith(_STATIC):
            _static(response, packed)
        return response


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


def policy(html: str) -> str:
    """The Content-Security-Policy of a page: only our own files, plus the hashes of its inline scripts."""
    hashes = [
        "'sha256-" + base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() + "'"
        for body in _INLINE.findall(html)
    ]
    return "; ".join(
        [
            "default-src 'self'",
            # 'unsafe-eval' is for the reader's own tools (Playwright's wait_for_function). Nothing of ours
            # evaluates text, and without 'unsafe-inline' a text from a log cannot become a script.
            " ".join(["script-src 'self' 'unsafe-eval'", *hashes]),
            "style-src 'self' 'unsafe-inline'",  # Mantine and Plotly write style attributes
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "connect-src 'self'",
            "object-src 'none'",
            "base-uri 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        ]
    )


def _static(response: Response, packed: dict[str, bytes]) -> None:
    """Compress a script or style once and keep it; a fingerprinted address may be cached for good."""
    if response.status_code != 200:
        return
    if "m" in request.args:
        response.headers["Cache-Control"] = _YEAR
    if "gzip" not in request.accept_encodings or (response.mimetype or "").startswith("image/"):
        return
    response.direct_passthrough = False
    body = response.get_data()
    key = hashlib.blake2b(body, digest_size=16).hexdigest()
    if key not in packed:
        packed[key] = gzip.compress(body, 6, mtime=0)
    response.set_data(packed[key])
    response.headers["Content-Encoding"] = "gzip"
    response.headers["Vary"] = "Accept-Encoding"
