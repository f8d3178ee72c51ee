"""The address of a view: everything that is on screen can be said in a URL, and a URL opens exactly that."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote, urlencode

from flask import has_request_context, request

#: The pages of a run in the order of the navigation: slug -> the word in the navigation.
RUN_PAGES = {
    "overview": "Overview",
    "gradient-flow": "Gradient flow",
    "layer": "Layer",
    "drift": "Drift",
    "overfitting": "Overfitting",
    "compare": "Compare",
    "alerts": "Alerts",
}


@dataclass(frozen=True)
class View:
    """One page of one run ("runs", "fleet" and "problems" have none) and the choices made on it."""

    page: str = "runs"
    run: str = ""
    params: dict[str, str] = field(default_factory=dict)


def parse(path: str, search: str = "") -> View:
    """Read an address. An unknown path is the page "missing"."""
    params = dict(parse_qsl(search.lstrip("?")))
    parts = [part for part in path.split("/") if part]
    if not parts:
        return View("runs", "", params)
    if parts == ["fleet"]:
        return View("fleet", "", params)
    if parts[0] == "problems" and len(parts) <= 2:
        return View("problems", "", params | {"code": unquote(parts[1])} if len(parts) > 1 else params)
    if parts[0] != "run" or len(parts) == 1:
        return View("missing", unquote(path), params)
    page = parts.pop() if len(parts) > 2 and parts[-1] in RUN_PAGES else "overview"
    return View(page, unquote("/".join(parts[1:])), params)


def href(page: str, run: str = "", **params: str) -> str:
    """Write an address below the path that we are served at. `run` is relative to the root."""
    query = "?" + urlencode(params) if params else ""
    if page == "fleet":
        return f"{base()}/fleet{query}"
    if page == "runs" or not run:
        return f"{base()}/{query}"
    return f"{base()}/run/{quote(run)}/{page}{query}"


def problem_href(code: str = "") -> str:
    """The address of the page about a problem code, or of the list of all problems."""
    return f"{base()}/problems{'/' + quote(code, safe='') if code else ''}"


def base() -> str:
    """The path that a proxy serves the dashboard at, without the slash at its end; mostly ""."""
    return request.script_root if has_request_context() else ""


def step_range(text: str | None) -> tuple[float, float] | None:
    """Read a step range "low:high"; None when it is absent or makes no sense (a URL is user input)."""
    try:
        low, high = (float(part) for part in (text or "").split(":"))
    except ValueError:
        return None
    return (low, high) if math.isfinite(low) and math.isfinite(high) and low < high else None


def fraction(text: object, default: float = 0.0, limit: float = 0.99) -> float:
    """Read a share between 0 and `limit`; the default when the text is no number."""
    try:
        value = float(text)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return default
    return min(max(value, 0.0), limit) if math.isfinite(value) else default
