"""Scripts and styles: compressed once, kept by the browser for good where their address changes with them."""

from __future__ import annotations

import gzip
import hashlib

from flask import Response, request

_STATIC = ("/_dash-component-suites/", "/assets/")
_YEAR = "public, max-age=31536000, immutable"


def shrink(response: Response, packed: dict[str, bytes]) -> None:
    """Make a script or style small. `packed`: what was compressed before, by the digest of its content."""
    if not request.path.startswith(_STATIC) or response.status_code != 200:
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
