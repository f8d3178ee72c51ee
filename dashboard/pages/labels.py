"""Tags, owner and note of a run, as the head of its page shows them."""

from __future__ import annotations

from typing import Any

from dash import html

from ...monitor import Run


def labels(run: Run) -> list[html.Div]:
    """Tags as chips, the owner, the note in full; nothing where a run has none of them."""
    tags, owner, note = (run.info.get(key) for key in ("tags", "owner", "note"))
    parts: list[Any] = []
    if tags:
        parts.append(html.Span([html.Span(tag, className="tag") for tag in tags], className="tags"))
    if owner:
        parts.append(html.Span([html.Span("owner ", className="dim"), owner]))
    if note:
        parts.append(html.Span(note, className="run-note", dir="auto"))
    return [html.Div(parts, className="run-labels")] if parts else []
