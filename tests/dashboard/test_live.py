"""The live route: what a run that grew changes on a page, and no more."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plotly.io.json import to_json_plotly
from torch import nn
from werkzeug.test import Client

from layerwatch.dashboard import create_app, plots
from layerwatch.dashboard.pages import PAGES
from layerwatch.dashboard.plots import current
from layerwatch.dashboard.queries import Library
from layerwatch.dashboard.sent import MOST_BYTES, Sent, stamp_of
from layerwatch.hooks import watch
from tests.dashboard.patches import apply

HERE = {"Host": "localhost"}
Step = Callable[[], None]


def ask(client: Client, **asked: Any) -> dict[str, Any]:
    answer = client.post("/api/live", json=asked, headers=HERE)
    assert answer.status_code == 200, answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.json is not None
    return answer.json


def plain(figure: Any) -> Any:
    return json.loads(str(to_json_plotly(figure)))


@pytest.fixture
def step(tmp_path: Path) -> Iterator[Step]:
    """One more optimizer step of a run named one, with its loss."""
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    # Nothing writes into its log between two steps.
    watcher = watch(net, optimizer, run=tmp_path / "one", every=1, system=False, live=False)

    def more() -> None:
        loss = net(torch.randn(8, 4)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        watcher.log(train_loss=loss)

    more()
    yield more
    watcher.close()


def grown(library: Library, before: str) -> None:
    deadline = time.monotonic() + 60
    while library.cursor("one")[0] == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert library.cursor("one")[0] != before


def test_the_live_route_knows_runs_and_only_runs(client: Client, library: Library) -> None:
    library.judgement("healthy", wait=150)
    answer = ask(client, run="healthy")
    assert set(answer) == {"cursor", "said", "live", "plots", "texts"}
    assert answer["live"] is False
    assert ask(client)["cursor"] != answer["cursor"]
    for name in ("../healthy", "/etc/passwd", "nested", "%00"):
        refused = client.post("/api/live", json={"run": name}, headers=HERE)
        assert refused.status_code == 404
        assert "/" not in refused.text.replace("</", "")


@pytest.mark.parametrize("body", [[], "x", 3])
def test_what_is_no_question_is_refused(client: Client, body: Any) -> None:
    assert client.post("/api/live", json=body, headers=HERE).status_code == 400
    assert client.post("/api/live", data="run=healthy", headers=HERE).status_code == 415


def test_odd_questions_get_an_answer(client: Client) -> None:
    odd = {
        "run": "healthy",
        "page": "overview",
        "state": 3,
        "screen": [],
        "plots": {"loss-plot": {"a": 1}, "x": 2},
    }
    figure = ask(client, **odd)["plots"]["loss-plot"]["set"]
    assert figure["data"]
    assert "x" not in ask(client, **odd)["plots"]
    for page in (None, 7, "nowhere", {"a": 1}):
        assert ask(client, run="healthy", page=page, plots={"loss-plot": ""})["plots"] == {}


def test_the_cursor_changes_when_the_run_grows_and_only_then(tmp_path: Path, step: Step) -> None:
    library = Library(tmp_path)
    library.judgement("one", wait=150)
    before = library.cursor("one")
    assert library.cursor("one") == before
    step()
    grown(library, before[0])


@pytest.mark.parametrize("page", [page for page in PAGES if page != "runs"])
def test_patches_make_the_figures_that_a_fresh_page_shows(tmp_path: Path, step: Step, page: str) -> None:
    library, sent = Library(tmp_path), Sent()
    client = create_app(tmp_path).server.test_client()
    state = {"axis": "relative", "smoothing": 0.5, "tensor": "0.weight", "range": "", "scale": "log"}
    for _ in range(12):
        step()
    library.judgement("one", wait=150)

    def drawn() -> dict[str, Any]:
        values = {plot.id: [state.get(key) or None for key in plot.controls] for plot in PAGES[page].PLOTS}
        return {
            plot.id: current(plot, library, sent, {"run": "one"}, {}, values[plot.id])
            for plot in PAGES[page].PLOTS
        }

    first = ask(client, run="one", page=page, state=state, plots={plot.id: "" for plot in PAGES[page].PLOTS})
    shown = {name: patch["set"] for name, patch in first["plots"].items()}
    tags = {name: figure["layout"]["meta"]["tag"] for name, figure in shown.items()}
    again = ask(client, run="one", page=page, state=state, plots=tags)
    moved = {name for name, tag in tags.items() if stamp_of(tag) not in again["cursor"] + "-" + again["said"]}
    assert set(again["plots"]) <= moved  # nothing, unless the detectors have come to a conclusion
    before = library.cursor("one")[0]
    for _ in range(3):
        step()
    grown(library, before)
    deadline = time.monotonic() + 120
    while True:
        news = ask(client, run="one", page=page, state=state, plots=tags)
        shown = {name: apply(figure, news["plots"].get(name)) for name, figure in shown.items()}
        tags = {name: figure["layout"]["meta"]["tag"] for name, figure in shown.items()}
        fresh = plain(drawn())
        if shown == fresh or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert shown == fresh


def test_figures_that_are_forgotten_are_sent_whole() -> None:
    small, large = Sent(most=1000), Sent()
    old, new = ({"data": [{"y": [*range(300), n]}], "layout": {}} for n in (1, 2))
    for sent, whole in ((small, True), (large, False)):
        first, second = (sent.tag(figure, "a", keep=True) for figure in (old, new))
        patch = sent.patch(first["layout"]["meta"]["tag"], second)
        assert patch is not None
        assert ("set" in patch) is whole
        assert apply(plain(first), patch) == plain(second)
    assert MOST_BYTES < 100e6


def test_a_finished_run_is_not_remembered() -> None:
    sent = Sent()
    figure = sent.tag({"data": [], "layout": {}}, "a", keep=False)
    assert figure["layout"]["meta"]["tag"] == "a."
    assert "set" in (sent.patch("a.", figure) or {})


def test_plots_do_not_listen_to_the_pulse(tmp_path: Path) -> None:
    app = create_app(tmp_path)
    for key, callback in app.callback_map.items():
        if key.startswith("..") and ".figure." in key:
            assert "pulse" not in {part["id"] for part in callback["inputs"]}
    assert plots.ON_STEPS == ("range", "axis")
