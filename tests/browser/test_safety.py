"""In a real browser: hostile names are text, the content policy holds, tokens, proxies and downloads work."""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from playwright.sync_api import Browser, Page, expect
from torch import nn

from layerwatch.dashboard.urls import RUN_PAGES
from layerwatch.hooks import watch
from tests.browser.conftest import answering
from tests.browser.reading import address, array, settled, traces, until

Open = Callable[..., Page]
EVIL = "https:&#47;&#47;evil"
NAMES = (
    "<img src=x onerror=hacked=1>",
    "</script><script>hacked=1</script>",
    f'<a href="{EVIL}">a link</a><b>bold</b><br>',
    "long" * 2500,
    "\u202eright to left \u05e9\u05dc\u05d5\u05dd",
    "\U0001f600 \"'`${1} &amp; %{y} \\",
    "a\nnew line",
)
RUN = "<img src=x onerror=hacked=1>\"'\U0001f600\u202e&\n%2e"


class Hostile(nn.Module):
    """Layers whose names would like to be more than names."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = torch.relu(layer(x))
        return x


@pytest.fixture(scope="module")
def hostile_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    torch.manual_seed(0)
    for name in (RUN, "plain"):
        net = Hostile()
        optimizer = torch.optim.SGD(net.parameters(), 1.0)
        config = {NAMES[0]: NAMES[1], "nested": {NAMES[2]: 1}}
        watcher = watch(net, optimizer, run=root / name, every=1, config=config)
        for step in range(20):
            optimizer.zero_grad()
            loss = net(torch.randn(8, 4)).square().mean()
            loss.backward()
            optimizer.step()
            watcher.log(train_loss=loss, **{NAMES[0]: float(step), NAMES[2]: 1.0, NAMES[3]: 2.0})
            if step % 5 == 4:
                watcher.log(val_loss=loss)
        watcher.close()
    return root


@pytest.fixture
def dashboard() -> Iterator[Callable[..., str]]:
    """Start a real `layerwatch dashboard`; the address that it prints."""
    with contextlib.ExitStack() as running:
        yield lambda *arguments: running.enter_context(
            answering("-m", "layerwatch", "dashboard", *arguments, "--port", "0")
        )


@pytest.fixture
def server(hostile_root: Path, dashboard: Callable[..., str]) -> str:
    """What `open_page` opens: the hostile runs."""
    return dashboard(str(hostile_root)).rstrip("/")


# ---- names


def drawn(page: Page) -> None:
    """All plots have been answered."""
    expect(page.locator(".plot-frame.waiting:visible")).to_have_count(0, timeout=120_000)


def untouched(page: Page) -> None:
    """No name became an element, a link to elsewhere or a script."""
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src='x'], [onerror]").count() == 0
    links = page.evaluate("[...document.querySelectorAll('a')].map(a => String(a.href.baseVal ?? a.href))")
    assert links
    assert all(link.startswith(address(page).split("/run")[0].rstrip("/") + "/") for link in links), links


def test_hostile_names_are_text_on_every_page(open_page: Open) -> None:
    page = open_page("/")
    page.on("dialog", lambda dialog: pytest.fail(f"a dialog: {dialog.message}"))
    link = page.locator(".run-link", has_text="<img")
    expect(link).to_be_visible()
    untouched(page)
    link.click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("<img src=x onerror=hacked=1>")
    for slug, word in RUN_PAGES.items():
        page.locator(".nav-link", has_text=re.compile(f"^{word}$")).click()
        page.wait_for_url(re.compile(rf"/run/.+/{slug}"))
        settled(page)
        expect(page.locator(".plot-frame.failed")).to_have_count(0)
        expect(page.locator("#error")).to_have_class("hidden")
        untouched(page)
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{slug} is {wide} px too wide"


def test_a_layer_of_any_name_has_its_page(open_page: Open) -> None:
    page = open_page("/")
    for name in (NAMES[0], NAMES[3], NAMES[5]):
        root = address(page).split("/run")[0].rstrip("/")
        page.goto(f"{root}/run/{quote(RUN)}/layer?tensor={quote(name + '.weight')}")
        expect(page.locator(".plot-frame").first).to_be_attached()
        drawn(page)
        marks = page.locator(".js-plotly-plot .trace:visible, .js-plotly-plot .heatmaplayer image")
        expect(marks.first).to_be_attached()
        assert page.evaluate("window.layerwatch.state.tensor") == f"{name}.weight"
        if len(name) < 100:
            expect(page.locator("#body")).to_contain_text(name, use_inner_text=True)
        untouched(page)


def test_names_in_plots_are_drawn_as_text(open_page: Open) -> None:
    page = open_page(f"/run/{quote(RUN)}/gradient-flow")
    until(lambda: traces(page, "flow-map"), "the map")
    labels = "[...document.querySelectorAll('#flow-map .ytick text')].map(e => e.textContent)"
    shown = until(lambda: [t for t in page.evaluate(labels) if t], "labels")
    assert any("<" in text for text in shown), shown
    assert max(map(len, shown)) < 120
    assert page.locator("#flow-map a, #flow-map image[*|href='x']").count() == 0
    box = page.locator("#flow-map .nsewdrag").first.bounding_box()
    assert box
    for part in (0.1, 0.3, 0.5, 0.7, 0.9):
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * part)
        page.wait_for_timeout(150)
        untouched(page)
    page.goto(f"{address(page).split('/run')[0]}/run/{quote(RUN)}/overview")
    until(lambda: traces(page, "scalars-plot"), "the scalars")
    untouched(page)


# ---- the content policy, tokens


def test_no_text_becomes_a_script(browser: Browser, server: str) -> None:
    page = browser.new_context().new_page()
    page.goto(f"{server}/run/plain/overview")
    until(lambda: traces(page, "loss-plot"), "the losses")
    page.evaluate(
        """() => {
          addEventListener("securitypolicyviolation", (event) => (window.refused = event.effectiveDirective));
          const script = document.createElement("script");
          script.textContent = "window.hacked = 1";
          document.body.append(script);
          document.body.insertAdjacentHTML("beforeend", "<img src='data:,' onerror='window.hacked = 1'>");
          setTimeout("window.hacked = 1", 0);
        }"""
    )
    until(lambda: page.evaluate("window.refused"), "a refusal")
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    page.context.close()


def test_a_token_opens_the_dashboard_and_leaves_the_address(
    browser: Browser, runs_root: Path, dashboard: Callable[..., str]
) -> None:
    locked = re.sub("//[^:/]+:", "//localhost:", dashboard(str(runs_root), "--host", "0.0.0.0"))
    context = browser.new_context()
    page = context.new_page()
    root = locked.partition("?")[0]
    answer = page.goto(root + "run/healthy/overview")
    assert answer
    assert answer.status == 401
    expect(page.get_by_role("heading")).to_have_text("A token is needed")
    assert "healthy" not in page.content()

    page.goto(f"{root}run/healthy/overview?{locked.partition('?')[2]}")
    until(lambda: traces(page, "loss-plot"), "the losses")
    assert "token" not in address(page)
    (cookie,) = [
        c for c in context.cookies() if c.get("name", "").startswith("layerwatch_") and c.get("httpOnly")
    ]
    assert cookie.get("sameSite") == "Strict"
    assert page.evaluate("document.cookie").count(str(cookie.get("value"))) == 0
    page.reload()
    until(lambda: traces(page, "loss-plot"), "the losses again")
    with page.expect_download() as saved:
        choose(page, "loss-plot", "csv")
    assert len(pd.read_csv(saved.value.path()))
    context.close()


# ---- a proxy


class Proxy(ThreadingHTTPServer):
    """A reverse proxy for everything below /x/, which takes the /x away or does not."""

    daemon_threads = True

    def __init__(self, target: str, strip: bool) -> None:
        super().__init__(("127.0.0.1", 0), Forward)
        self.target, self.strip = target, strip
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *raised: Any) -> None:
        self.shutdown()
        super().__exit__(*raised)


class Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        proxy = self.server
        assert isinstance(proxy, Proxy)
        if not self.path.startswith("/x/"):
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection(proxy.target, timeout=30)
        headers = {**dict(self.headers), "Host": "runs.example.org"}
        with contextlib.closing(connection):
            connection.request(self.command, self.path[2:] if proxy.strip else self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "connection", "date", "server", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        try:
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:  # the browser is on its next page already
            self.close_connection = True

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.mark.parametrize("strip", [True, False], ids=["path taken away", "path kept"])
def test_behind_a_proxy_s_path(
    browser: Browser, runs_root: Path, dashboard: Callable[..., str], strip: bool
) -> None:
    url = dashboard(str(runs_root), "--prefix", "/x/", "--allow-host", "runs.example.org")
    assert url.endswith("/x/")
    with Proxy(url.split("/")[2], strip) as proxy:
        root = f"http://127.0.0.1:{proxy.server_port}"
        context = browser.new_context()
        page = context.new_page()
        wrong: list[str] = []
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on(
            "request",
            lambda r: None if r.url.startswith((root + "/x/", "blob:", "data:")) else wrong.append(r.url),
        )
        page.goto(f"{root}/x/")
        page.get_by_role("link", name="healthy", exact=True).click()
        page.wait_for_url("**/x/run/healthy/overview*")
        until(lambda: traces(page, "loss-plot"), "the losses")
        for slug in ("gradient-flow", "layer", "alerts"):
            page.locator(".nav-link", has_text=re.compile(f"^{RUN_PAGES[slug]}$")).click()
            page.wait_for_url(f"**/x/run/healthy/{slug}*")
            drawn(page)
        with page.expect_response("**/x/api/live") as news:  # live updates go through the proxy, too
            page.wait_for_timeout(100)
        assert news.value.status == 200
        page.goto(f"{root}/x/run/vanishing/overview")
        until(lambda: traces(page, "loss-plot"), "the losses")
        with page.expect_download() as saved:
            choose(page, "loss-plot", "parquet")
        assert pq.read_table(saved.value.path()).num_rows
        icon = page.locator("link[rel=icon]").get_attribute("href")
        assert (icon or "").startswith("/x/assets/")
        assert {c.get("path") for c in context.cookies()} == {"/x/"}
        context.close()
    assert wrong == []


# ---- downloads


def choose(page: Page, plot: str, kind: str) -> None:
    """Click a file in the menu of a plot."""
    page.locator(f".menu-button[data-plot='{plot}']").click()
    item = page.locator(f".menu-item[data-format='{kind}']")
    item.click()


def test_downloads_hold_exactly_what_is_shown(
    browser: Browser, runs_root: Path, dashboard: Callable[..., str]
) -> None:
    url = dashboard(str(runs_root))
    page = browser.new_context(accept_downloads=True, color_scheme="dark").new_page()
    page.goto(f"{url}run/healthy/overview?smoothing=0.8&range=10:40")
    shown = {trace["name"]: trace for trace in until(lambda: traces(page, "loss-plot"), "the losses")}
    drawn(page)
    tables = {}
    for kind, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        with page.expect_download() as saved:
            choose(page, "loss-plot", kind)
        assert saved.value.suggested_filename == f"healthy-loss-plot.{kind}"
        tables[kind] = read(saved.value.path())
    pd.testing.assert_frame_equal(tables["csv"], tables["parquet"], check_dtype=False)
    for name in ("train", "train (raw)", "validation"):
        rows = tables["csv"][tables["csv"]["series"] == name]
        np.testing.assert_array_equal(rows["step"], array(shown[name]["x"]))
        np.testing.assert_array_equal(rows["value"], array(shown[name]["y"]))

    page.goto(f"{url}run/nested/blow-up/gradient-flow")
    until(lambda: traces(page, "flow-map"), "the map")
    drawn(page)
    heat = traces(page, "flow-map")[0]
    with page.expect_download() as saved:
        choose(page, "flow-map", "csv")
    assert saved.value.suggested_filename == "nested-blow-up-flow-map.csv"
    made = pd.read_csv(saved.value.path())
    cells = made[made["step"].notna() & (made["not_finite"] == 0)]
    values, meta = array(heat["z"]).astype(np.float64), heat["meta"]
    row, column = (pd.Index(heat[k]).get_indexer(cells[n]) for k, n in (("y", "layer"), ("x", "step")))
    told = meta["offset"] + meta["factor"] * values[row, column]
    np.testing.assert_allclose(cells["value"], 10**told if meta["log"] else told, rtol=1e-12)
    assert len(cells) == np.isfinite(values).sum()
    assert made["not_finite"].any()

    for kind, head in (("png", b"\x89PNG"), ("svg", b"<svg")):
        with page.expect_download() as saved:
            choose(page, "flow-map", kind)
        assert saved.value.suggested_filename == f"nested-blow-up-flow-map.{kind}"
        content = Path(saved.value.path()).read_bytes()
        assert content.startswith(head)
        assert len(content) > 5000
        if kind == "svg":
            card = page.evaluate(
                "getComputedStyle(document.querySelector('#flow-map').closest('.card')).backgroundColor"
            )
            assert card.replace(" ", "") in content.decode().replace(" ", "")
    page.context.close()
