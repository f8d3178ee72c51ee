"""Who is let in, what other sites and hostile names can do, and what errors tell: nothing."""

from __future__ import annotations

import html
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from werkzeug.test import Client, TestResponse

from layerwatch.dashboard import Access, create_app
from layerwatch.dashboard.figures.grid import matching
from layerwatch.dashboard.pages import overview
from layerwatch.dashboard.prefix import below, prefix_of
from layerwatch.dashboard.queries import Library
from layerwatch.dashboard.roots import public_url
from layerwatch.dashboard.security import host_allowed, loopback, policy
from layerwatch.monitor import StoreError

TOKEN = "correct-horse-battery"
LOCAL = {"Host": "localhost"}
PATHS = (
    "/",
    "/run/healthy/overview",
    "/_dash-layout",
    "/_dash-dependencies",
    "/assets/style.css",
    "/api/nothing",
)
JSON_PATHS = ("/_dash-update-component", "/api/live", "/api/plots", "/api/data")


@pytest.fixture
def client_of(runs_root: Path) -> Callable[..., Client]:
    """A client of an app with this access."""

    def make(access: Access | None = None, prefix: str = "", root: Path = runs_root) -> Client:
        return create_app(root, access=access, prefix=prefix).server.test_client()

    return make


# ---- hosts and tokens


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8050", "127.0.0.1:8050", "[::1]:8050", "192.168.0.7:80"]
)
def test_this_machine_answers(host: str) -> None:
    assert host_allowed(host, {"localhost", "127.0.0.1"})


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:8050", "", "127.0.0.1.evil.example", "[::1"]
)
def test_foreign_names_are_refused(host: str) -> None:
    assert not host_allowed(host, {"localhost", "127.0.0.1"})


def test_a_rebound_name_gets_400_everywhere(client: Client) -> None:
    for path in PATHS:
        assert client.get(path, headers={"Host": "evil.example"}).status_code == 400
    for path in JSON_PATHS:
        assert client.post(path, json={}, headers={"Host": "evil.example"}).status_code == 400


def test_a_proxy_s_name_is_answered_when_it_was_allowed(client_of: Callable[..., Client]) -> None:
    client = client_of(Access(names=("runs.example.org", "Other")))
    for name in ("runs.example.org", "runs.example.org:443", "other", "localhost"):
        assert client.get("/", headers={"Host": name}).status_code == 200
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400


@pytest.mark.parametrize(
    ("host", "only_here"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("LocalHost", True),
        ("0.0.0.0", False), ("", False), ("::", False), ("192.168.0.7", False), ("example.org", False),
        ("localhost.example.org", False),
    ],
)  # fmt: skip
def test_which_addresses_only_this_machine_can_reach(host: str, only_here: bool) -> None:
    assert loopback(host) is only_here
    if not only_here:
        with pytest.raises(ValueError, match="token"):
            Access(host)
    assert Access(host, TOKEN).token == TOKEN


def test_a_token_that_can_be_guessed_is_refused() -> None:
    with pytest.raises(ValueError, match="16 characters"):
        Access("0.0.0.0", "secret")
    with pytest.raises(ValueError, match="token"):
        Access(any_host=True)


def test_without_the_token_nothing_is_told(client_of: Callable[..., Client]) -> None:
    client = client_of(Access("0.0.0.0", TOKEN))
    wrong = (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Cookie": "x=" + TOKEN},
    )
    for headers in wrong:
        for path in (*PATHS, "/?token=wrong", "/?token=", f"/?token={TOKEN}x"):
            answer = client.get(path, headers={**LOCAL, **headers})
            assert answer.status_code == 401
            assert not re.search("healthy|vanishing|runs", answer.text)
            assert "Set-Cookie" not in answer.headers
        for path in JSON_PATHS:
            assert client.post(path, json={}, headers={**LOCAL, **headers}).status_code == 401
    assert "A token is needed" in client.get("/", headers=LOCAL).text


def test_health_is_told_to_everybody_and_nothing_else(client_of: Callable[..., Client]) -> None:
    for prefix in ("", "/x"):
        answer = client_of(Access("0.0.0.0", TOKEN), prefix=prefix).get(f"{prefix}/healthz", headers=LOCAL)
        assert (answer.status_code, answer.text, answer.mimetype) == (200, "ok\n", "text/plain")
        assert "Set-Cookie" not in answer.headers
    client = client_of(Access("0.0.0.0", TOKEN))
    assert client.get("/healthz", headers={"Host": "evil.example"}).status_code == 400
    assert client.post("/healthz", headers=LOCAL).status_code == 405
    for path in ("/healthz/", "/healthz/../", "/run/healthz", "//healthz"):
        assert client.get(path, headers=LOCAL).status_code in (401, 404), path


def test_the_token_becomes_a_cookie_and_leaves_the_address(client_of: Callable[..., Client]) -> None:
    client = client_of(Access("0.0.0.0", TOKEN), prefix="/x")
    answer = client.get(f"/run/healthy/overview?a=1&token={TOKEN}&b=%26", headers=LOCAL)
    assert answer.status_code == 303
    assert answer.headers["Location"] == "/x/run/healthy/overview?a=1&b=%26"
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert "Path=/x/" in cookie
    assert client.get("/x/", headers=LOCAL).status_code == 200
    assert client.post("/api/data", json={}, headers=LOCAL, base_url="http://localhost/x").status_code == 400


def test_a_link_on_another_site_still_sets_the_cookie_first(client_of: Callable[..., Client]) -> None:
    """A redirect of a request from another site would come without the cookie."""
    headers = {**LOCAL, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    answer = client_of(Access("0.0.0.0", TOKEN)).get(f"/?token={TOKEN}", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["Refresh"] == "0; url=/"
    assert TOKEN not in answer.text


def test_a_program_sends_the_token_in_a_header(client_of: Callable[..., Client]) -> None:
    client = client_of(Access("0.0.0.0", TOKEN))
    headers = {**LOCAL, "Authorization": f"Bearer {TOKEN}"}
    assert client.get("/", headers=headers).status_code == 200
    assert client.post("/api/data", json={}, headers=headers).status_code == 400


def test_the_redirect_leads_to_no_other_host(client_of: Callable[..., Client]) -> None:
    client = client_of(Access("0.0.0.0", TOKEN))
    for path in (
        "//evil.example/",
        "///evil.example",
        "/%2F/evil.example",
        "/\\evil.example",
        "/%5Cevil.example",
    ):
        place = client.get(f"{path}?token={TOKEN}", headers=LOCAL).headers["Location"]
        assert re.fullmatch(r"/[^/\\].*|/", place), place


def test_the_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr("hmac.compare_digest", compare)
    access = Access("0.0.0.0", TOKEN)
    assert access.shown(TOKEN)
    assert not access.shown("wrong")
    assert not access.shown(None)
    assert not access.shown("ü")
    assert len(compared) == 4


# ---- other sites


@pytest.mark.parametrize("path", JSON_PATHS)
@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost.evil.example"},
        {"Origin": "http://localhost:9999"},
    ],
)
def test_a_page_of_another_site_cannot_post(client: Client, path: str, headers: dict[str, str]) -> None:
    assert client.post(path, json={}, headers={**LOCAL, **headers}).status_code == 403


def test_our_own_pages_and_programs_can(client_of: Callable[..., Client]) -> None:
    client = client_of(Access(names=("runs.example.org",)))
    own = (
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://outside.example"},  # a proxy changed the host
        {"Origin": "http://localhost"},
        {"Origin": "https://runs.example.org"},
        {},
    )
    for headers in own:
        assert client.post("/api/data", json={}, headers={**LOCAL, **headers}).status_code == 400


def test_another_site_may_link_here_and_not_embed(client: Client) -> None:
    fetch = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert client.get("/", headers={**LOCAL, **fetch, "Sec-Fetch-Mode": "navigate"}).status_code == 200
    for path in PATHS:
        assert client.get(path, headers={**LOCAL, **fetch}).status_code == 403
    answer = client.get("/", headers=LOCAL)
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_a_text_body_is_no_way_around_the_preflight(client: Client) -> None:
    headers = {**LOCAL, "Content-Type": "text/plain"}
    for path in ("/api/live", "/api/plots", "/api/data"):
        assert client.post(path, data="{}", headers=headers).status_code == 415


def test_a_notebook_of_this_machine_may_frame_a_shown_dashboard(client_of: Callable[..., Client]) -> None:
    answer = client_of(Access(framed=True)).get("/", headers=LOCAL)
    assert "X-Frame-Options" not in answer.headers
    ancestors = re.search("frame-ancestors ([^;]*)", answer.headers["Content-Security-Policy"])
    assert ancestors
    assert ancestors[1] == "'self' http://localhost:* http://127.0.0.1:*"


# ---- the content policy


def test_pages_carry_the_security_headers(client: Client) -> None:
    answer = client.get("/run/healthy/overview", headers={"Host": "localhost:8050"})
    assert answer.status_code == 200
    content = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in content
    assert "frame-ancestors 'none'" in content
    assert not re.search(r"https?:|\*|unsafe-eval|script-src[^;]*'unsafe-inline'", content)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "same-origin"


def test_every_inline_script_is_in_the_policy(client: Client) -> None:
    answer = client.get("/", headers=LOCAL)
    inline = re.findall(r"<script(?![^>]*src=)[^>]*>(.*?)</script>", answer.text, re.DOTALL)
    assert inline
    hashes = re.findall(r"'sha256-[^']+'", answer.headers["Content-Security-Policy"])
    assert len(hashes) == len(inline)
    assert policy("<script>1</script>") != policy("<script>2</script>")


def test_the_page_names_no_other_host(client: Client) -> None:
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)""", client.get("/", headers=LOCAL).text)
    assert addresses
    places = [address for address in addresses if not address.startswith("#")]  # within the page
    assert all(address.startswith("/") and not address.startswith("//") for address in places)


# ---- paths


@pytest.mark.parametrize(
    "path",
    [
        "/assets/../app.py", "/assets/..%2fapp.py", "/assets/%2e%2e/app.py", "/assets/%2e%2e%2fapp.py",
        "/assets//etc/passwd", "/assets/....//app.py", "/static/../app.py",
        "/_dash-component-suites/dash/../../../etc/passwd", "/_dash-component-suites/dash/%2e%2e/dash.py",
        "/_dash-component-suites/os/os.py", "/run/..%2f..%2fetc/overview",
    ],
)  # fmt: skip
def test_no_path_leads_out(client: Client, path: str) -> None:
    answer = client.get(path, headers=LOCAL, buffered=True)
    assert b"def create_app" not in answer.data
    assert b"root:" not in answer.data
    assert b"import " not in answer.data
    assert answer.status_code in (200, 404)  # 200: the page that says that there is no such page


def test_run_names_are_looked_up_and_never_joined(client: Client, runs_root: Path) -> None:
    for name in (
        "../runs",
        "healthy/../healthy",
        str(runs_root / "healthy"),
        "/etc",
        "nested",
        "%00",
        ".",
        "",
    ):
        asked = {"run": name, "plot": "loss-plot", "format": "csv"}
        assert client.post("/api/data", json=asked, headers=LOCAL).status_code == 404
        if name:
            assert client.post("/api/live", json={"run": name}, headers=LOCAL).status_code == 404


# ---- errors


@pytest.fixture
def broken(tmp_path: Path, runs_root: Path) -> tuple[Path, Client]:
    """A root with runs that cannot be read."""
    root = tmp_path / "very-private-place" / "root"
    for name in ("future", "hollow", "gone"):
        (root / name).mkdir(parents=True)
    text = (runs_root / "healthy" / "run.json").read_text()
    (root / "hollow" / "run.json").write_text("{")
    (root / "gone" / "run.json").write_text(text)
    changed = re.sub(r' "checksum": "\w+",\n', "", text).replace(
        '"schema_version": 2', '"schema_version": 99'
    )
    (root / "future" / "run.json").write_text(changed)
    return root, create_app(root).server.test_client()


def test_no_page_says_where_the_runs_lie(broken: tuple[Path, Client]) -> None:
    root, client = broken
    dependencies = client.get("/_dash-dependencies", headers=LOCAL).json
    assert dependencies is not None
    for name in ("future", "hollow", "gone", "nothing", "../x"):
        for page in ("overview", "gradient-flow", "layer", "drift", "overfitting", "compare", "alerts"):
            answer = opened(client, f"/run/{name}/{page}", root)
            assert str(root.parent.parent) not in answer.text
            assert "very-private-place" not in html.unescape(answer.text)
            assert "Traceback" not in answer.text
    front = opened(client, "/", root)
    assert "future" in front.text
    assert "very-private-place" not in front.text


def opened(client: Client, path: str, root: Path) -> TestResponse:
    """What the callback that opens a page answers."""
    ids = [("nav", "children"), ("title", "children"), ("body", "children"), ("page", "data")]
    outputs = [{"id": i, "property": p} for i, p in ids]
    asked = {
        "output": ".." + "...".join(f"{i}.{p}" for i, p in ids) + "..",
        "outputs": outputs,
        "inputs": [{"id": "url", "property": "data", "value": {"path": path, "search": "", "count": 1}}],
        "state": [{"id": "screen", "property": "data", "value": {"theme": "light", "narrow": False}}],
        "changedPropIds": ["url.data"],
    }
    answer = client.post("/_dash-update-component", json=asked, headers=LOCAL)
    assert answer.status_code == 200
    return answer


def test_errors_of_the_server_are_short(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    for asked in ({}, {"output": "x"}, [], 3):
        answer = client.post("/_dash-update-component", json=asked, headers=LOCAL)
        assert answer.status_code in (400, 500)
        assert "layerwatch" not in answer.text
        assert "/" not in answer.text.replace("text/", "")
        assert len(answer.text) < 200
    assert caplog.records  # the server's own log says what it was


def test_a_failing_callback_tells_its_kind_only(
    runs_root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise KeyError(str(runs_root))

    monkeypatch.setattr(overview, "layout", fail)
    answer = opened(create_app(runs_root).server.test_client(), "/run/healthy/overview", runs_root)
    assert "KeyError" in answer.text
    assert str(runs_root) not in answer.text
    assert any(str(runs_root) in record.exc_text for record in caplog.records if record.exc_text)


def test_texts_are_shown_without_the_root(runs_root: Path) -> None:
    library = Library(runs_root)
    assert library.title == runs_root.name
    assert library.explain(PermissionError(13, "Permission denied", str(runs_root))) == (
        "PermissionError: Permission denied"
    )
    assert library.explain(StoreError(f"{runs_root}/healthy is odd")) == "healthy is odd"
    assert public_url("s3://me@bucket/runs?region=eu&secret=1") == "s3://bucket/runs"


# ---- size and time


def test_a_large_body_is_refused(client: Client) -> None:
    answer = client.post(
        "/api/data", data=b"[" * (5 << 20), headers={**LOCAL, "Content-Type": "application/json"}
    )
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|aa)+$",
        "(.*)*x",
        "((a{1,1000}){1,1000}){1,1000}",
        "(?:a?){900}a{900}",
        "(",
        "a" * 1_000_000,
    ],
)
def test_a_reader_s_pattern_cannot_hang_a_thread(pattern: str) -> None:
    """RE2 needs bounded memory and a time that grows with the names only; Python's own engine takes years."""
    names = ["a" * 60 + "!", "layer.0.weight"] * 300
    began = time.process_time()
    matching(names, pattern)
    assert time.process_time() - began < 5


# ---- a path prefix


@pytest.mark.parametrize(
    ("text", "expected"), [("", ""), ("/", ""), ("x", "/x"), ("/x/", "/x"), ("/a/b", "/a/b")]
)
def test_prefixes(text: str, expected: str) -> None:
    assert prefix_of(text) == expected


@pytest.mark.parametrize(
    "text", ["/run/", "/assets", "/_dash", "/api/x", "/a b/", "/../x", "/x?y", "https://x"]
)
def test_what_is_no_prefix(text: str) -> None:
    with pytest.raises(ValueError, match="expected a path"):
        prefix_of(text)


@pytest.mark.parametrize("asked", ["/x/assets/style.css", "/assets/style.css"])
def test_a_prefix_works_stripped_or_not(client_of: Callable[..., Client], asked: str) -> None:
    client = client_of(prefix="/x/")
    assert client.get(asked, headers=LOCAL, buffered=True).status_code == 200
    page = client.get("/x/", headers=LOCAL)
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)""", page.text)
    assert addresses
    assert all(address.startswith("/x/") for address in addresses)


def test_a_path_that_only_begins_like_the_prefix_is_another(client_of: Callable[..., Client]) -> None:
    seen: list[tuple[str, str]] = []

    def application(environ: dict[str, str], _start: object) -> list[bytes]:
        seen.append((environ["SCRIPT_NAME"], environ["PATH_INFO"]))
        return []

    for path in ("/x", "/x/", "/x/run/a", "/xy", "/run/x/y"):
        below(application, "/x")({"PATH_INFO": path}, lambda *_: None)
    assert seen == [("/x", "/"), ("/x", "/"), ("/x", "/run/a"), ("/x", "/xy"), ("/x", "/run/x/y")]
