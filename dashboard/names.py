"""The route that fills the search of assets/palette.js: everything on these pages that has a name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Flask, Response, jsonify, request

from ..monitor import RunError
from .pages.layer_facts import selectable
from .text import words

if TYPE_CHECKING:
    from .queries import Library

PATH = "/api/names"


def register(server: Flask, library: Library) -> None:
    """`GET /api/names?run=<name>` -> {"runs", "layers", "findings"}; without a run the first of them only."""

    @server.get(PATH)
    def names() -> tuple[Response, int]:
        name = request.args.get("run", "")
        try:
            answer = jsonify({"runs": list(library.runs()), **(_of(library, name) if name else {})})
        except (RunError, OSError):
            return jsonify({"error": "There is no such run, or it cannot be read."}), 404
        answer.headers["Cache-Control"] = "no-store"
        return answer, 200


def _of(library: Library, name: str) -> dict[str, Any]:
    """Layers and findings of a run; no findings while the detectors are at work."""
    judged = library.judgement(name)
    findings = [
        {
            "text": words(finding.problem),
            "severity": finding.severity,
            "step": finding.first_step,
            "layers": finding.layers[:1],
        }
        for finding in (judged.findings if judged else [])
    ]
    return {"layers": selectable(library.run(name)), "findings": findings}
