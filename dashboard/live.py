"""The route that assets/live.js asks: has this run grown since the cursor that the page shows?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Flask, Response, jsonify, request

from ..monitor import RunError

if TYPE_CHECKING:
    from .queries import Library

PATH = "/api/live"


def register(server: Flask, library: Library) -> None:
    """`GET /api/live?run=<name>` -> {"cursor", "said", "live"}; no name: all runs; unknown: 404."""

    @server.get(PATH)
    def live() -> tuple[Response, int]:
        name = request.args.get("run", "")
        try:
            cursor, said = library.cursor(name)
            going = library.run(name).live if name else any(run.live for run in library.runs().values())
        except (RunError, OSError) as error:
            return jsonify({"error": str(error)}), 404
        answer = jsonify({"cursor": cursor, "said": said, "live": going})
        answer.headers["Cache-Control"] = "no-store"
        return answer, 200
