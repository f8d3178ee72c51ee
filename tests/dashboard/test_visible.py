"""The route that draws the plots in view: the figures of the page's callbacks, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from werkzeug.test import Client, TestResponse

from layerwatch.dashboard import create_app, plots
from layerwatch.dashboard.figures.cells import values_of
from layerwatch.dashboard.pages import PAGES
from layerwatch.dashboard.queries import Library
from tests.dashboard.made_runs import LAYERS, write_run

LOCAL = {"Host": "localhost"}
STATE = {"tensor": LAYERS[0], "view": "map", "scale": "log", "kind": "weight", "axis": "step", "first": ""}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_run(folder, "base")
    return folder


@pytest.fixture(scope="module")
def client(root: Path) -> Client:
    return create_app(root).server.test_client()


def ask(client: Client, names: list[str], **more: Any) -> TestResponse:
    asked = {"page": "layer", "run": "base", "state": STATE, "screen": {"theme": "light"}, "plots": names}
    return client.post("/api/plots", json=asked | more, headers=LOCAL)


def test_the_plots_asked_for_are_those_that_a_callback_would_draw(client: Client, root: Path) -> None:
    names = ["histogram-weight", "history-plot"]
    answer = ask(client, names)
    assert answer.headers["Cache-Control"] == "no-store"
    found = json.loads(answer.data)
    assert sorted(found) == names
    known = {plot.id: plot for plot in PAGES["layer"].PLOTS}
    for name in names:
        values = [STATE.get(key) or None for key in known[name].controls]
        figure = plots.draw(known[name], Library(root), {"run": "base"}, {"theme": "light"}, values)
        shown = found[name]["figure"]
        assert shown["layout"]["uirevision"] == figure["layout"]["uirevision"]
        assert [trace["name"] for trace in shown["data"]] == [trace["name"] for trace in figure["data"]]
        assert (found[name]["className"], found[name]["said"]) == ("plot-frame", "")
    shares = values_of(found["histogram-weight"]["figure"]["data"][0])
    assert shares.sum(axis=0) == pytest.approx(1, abs=0.01)


def test_a_plot_without_data_answers_in_words(client: Client) -> None:
    found = json.loads(ask(client, ["optimizer-plot"]).data)["optimizer-plot"]
    assert found["className"] == "plot-frame empty"
    assert found["said"]
    gone = json.loads(ask(client, ["history-plot"], run="gone").data)["history-plot"]
    assert gone["className"] == "plot-frame failed"


def test_what_is_no_plot_of_the_page_is_left_out(client: Client) -> None:
    assert ask(client, ["flow-map"]).data == b"{}"
    assert ask(client, [], page="none").data == b"{}"
    assert client.post("/api/plots", json=[], headers=LOCAL).status_code == 400


def test_no_figure_is_a_callback_of_its_own_and_every_card_says_what_it_follows(root: Path) -> None:
    app = create_app(root)
    assert not [key for key in app.callback_map if ".figure" in key]
    for plot in (plot for page in PAGES.values() for plot in page.PLOTS):
        frame = next(
            part
            for part in plots.plot_card(plot, plots.style_of({}))._traverse()
            if getattr(part, "id", "") == f"{plot.id}-frame"
        )
        assert json.loads(frame.to_plotly_json()["props"]["data-controls"]) == list(plot.controls)
