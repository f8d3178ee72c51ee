"""What a test reads from a page: the traces as Plotly holds them, with typed arrays decoded."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from playwright.sync_api import Page

TRACES = """name => {
  const plot = document.querySelector(`[id="${name}"] .js-plotly-plot`);
  const plain = (key, value) => (key === "_inputArray" ? undefined : value);
  return plot && plot.data ? JSON.parse(JSON.stringify(plot.data, plain)) : null;
}"""
LAYOUT = """([name, path]) => {
  const plot = document.querySelector(`[id="${name}"] .js-plotly-plot`);
  return path.split(".").reduce((part, key) => part?.[key], plot?._fullLayout);
}"""

#: For a context: `window.flying` is the number of requests of scripts whose answers have not come in full.
FLYING = """(() => {
  const plain = window.fetch;
  window.flying = 0;
  window.fetch = async (...asked) => {
    window.flying += 1;
    try {
      const answer = await plain(...asked);
      await answer.clone().arrayBuffer();
      return answer;
    } finally {
      window.flying -= 1;
    }
  };
})()"""
STILL = """async names => {
  const plots = names.map(name => document.querySelector(`[id="${name}"] .js-plotly-plot`));
  const drawn = plots.every(plot => plot?.data?.length && plot._ev?._events?.plotly_relayout);
  const waiting = [...document.querySelectorAll(".plot-frame.waiting")].some(frame => frame.offsetParent);
  const once = one => one.playState === "running" && one.effect.getTiming().iterations !== Infinity;
  const fading = document.getAnimations().some(once);
  if (!drawn || waiting || fading || window.flying) return false;
  await new Promise(done => requestIdleCallback(done));
  return !window.flying;
}"""


def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = condition()
        if answer:
            return answer
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s for {what}")


def traces(page: Page, name: str) -> list[dict[str, Any]]:
    """The traces of a plot once it has any."""
    return until(lambda: page.evaluate(TRACES, name), f"data in the plot {name}")


def settled(page: Page, *names: str) -> None:
    """These plots are drawn and can be clicked and dragged, and nothing is on its way to any: what the reader
    does to a plot while it is being drawn is lost. In a context with FLYING."""
    still = lambda: page.evaluate(STILL, names) and page.evaluate(STILL, names)  # noqa: E731
    until(still, f"{', '.join(names) or 'the page'} to come to rest", 120)


def layout(page: Page, name: str, path: str) -> Any:
    """A value of a plot's finished layout."""
    return page.evaluate(LAYOUT, [name, path])


def array(value: Any) -> np.ndarray:
    """A plain list or a typed array of Plotly as numpy."""
    if isinstance(value, list):
        return np.array(value, dtype=float)
    flat = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
    return flat.reshape([int(n) for n in value["shape"].split(",")]) if "shape" in value else flat


def address(page: Page) -> str:
    """The address bar now. `page.url` lags: Playwright updates it only while it handles events."""
    return page.evaluate("location.href")
