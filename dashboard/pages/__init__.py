"""The pages. Each module says its title, lays itself out for a view, and declares its plots and callbacks."""

from __future__ import annotations

from types import ModuleType

from . import alerts, compare, drift, fleet, gradient_flow, layer, overfitting, overview, problems, runs

#: Slug in the URL -> page.
PAGES: dict[str, ModuleType] = {
    "runs": runs,
    "fleet": fleet,
    "overview": overview,
    "gradient-flow": gradient_flow,
    "layer": layer,
    "drift": drift,
    "overfitting": overfitting,
    "compare": compare,
    "alerts": alerts,
    "problems": problems,
}
