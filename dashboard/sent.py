"""The figures that browsers hold, so that a live update can send what changed instead of the whole."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from typing import Any

from plotly.io.json import to_json_plotly

from .figures.diff import Patch, difference
from .figures.theme import Figure

MOST_BYTES = 64 << 20


class Sent:
    """Figures by their tag, as JSON text. Those used longest ago are forgotten; they are then sent whole.

    A tag is "<stamp>.<digest>": the state of the log that the figure was drawn from, and its content.
    """

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._texts: OrderedDict[str, str] = OrderedDict()
        self._bytes = 0

    def tag(self, figure: Figure, stamp: str, keep: bool) -> Figure:
        """The figure with its tag in `layout.meta`; remembered when its run may grow."""
        text = _text(figure) if keep else ""
        tag = f"{stamp}.{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}" if keep else f"{stamp}."
        if keep:
            self._keep(tag, text)
        layout = figure["layout"]
        return {**figure, "layout": {**layout, "meta": {**layout.get("meta", {}), "tag": tag}}}

    def patch(self, tag: str, figure: Figure) -> Patch | None:
        """From the figure of this tag to a tagged one; the whole one when the former is forgotten."""
        with self._lock:
            text = self._texts.get(tag)
            if text is not None:
                self._texts.move_to_end(tag)
        new = json.loads(_text(figure))
        if text is None:
            return {"set": new}
        old = json.loads(text)
        old["layout"].setdefault("meta", {})["tag"] = tag
        return difference(old, new)

    def _keep(self, tag: str, text: str) -> None:
        with self._lock:
            self._bytes -= len(self._texts.pop(tag, ""))
            self._texts[tag] = text
            self._bytes += len(text)
            while self._bytes > self._most and len(self._texts) > 1:
                self._bytes -= len(self._texts.popitem(last=False)[1])


def _text(figure: Figure) -> str:
    """As Dash sends it."""
    return str(to_json_plotly(figure))


def stamp_of(tag: Any) -> str:
    """The state of the log in a tag."""
    return str(tag or "").partition(".")[0]
