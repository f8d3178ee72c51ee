"""Scripts and styles: compressed once, kept by the browser for good where their address changes with them."""

from __future__ import annotations

import gzip
import hashlib
import re
from pathlib import Path

from flask import Flask, Response, request

_STATIC = ("/_dash-component-suites/", "/assets/")
_YEAR = "public, max-age=31536000, immutable"


def together(server: Flask, folder: Path) -> dict[str, str]:
    """Serve all our scripts as one file, and all our styles: what is small is slow by being many.

    Returns: "js" and "css" -> the file's name in /assets/, with a mark of its content.
    """
    names = {}
    for kind, mimetype in (("js", "text/javascript"), ("css", "text/css")):
        body = "\n".join(path.read_text("utf-8") for path in sorted(folder.glob(f"*.{kind}")))
        mark = hashlib.blake2b(body.encode(), digest_size=6).hexdigest()
        names[kind] = f"all.{kind}?m={mark}"
        server.add_url_rule(
            f"/assets/all.{kind}",
            f"all-{kind}",
            lambda body=body, mimetype=mimetype: Response(body, mimetype=mimetype),
        )
    return names


def alone(tags: str) -> str:
    """The script and style tags of a page without those of single files of ours."""
    return re.sub(r'<script src="[^"]*/assets/[^"]*"></script>|<link[^>]*/assets/[^>]*\.css[^>]*>', "", tags)


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
