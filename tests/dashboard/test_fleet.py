"""The Fleet page without a browser: what it counts, and runs that stay closed until somebody opens them."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from layerwatch.dashboard import create_app, fleet
from layerwatch.dashboard.fleet import Narrowed, shown, toggled
from layerwatch.dashboard.pages.runs import table_of
from layerwatch.dashboard.queries import Library
from layerwatch.dashboard.shell import open_page
from layerwatch.dashboard.urls import View
from layerwatch.monitor import Run, RunError
from layerwatch.monitor.fleet import COLUMNS, TABLE, ScanTable, scan, write_table
from layerwatch.monitor.fleet.search import parse
from tests.dashboard.test_pages import text
from tests.monitor.rights import without_rights

NOW = 1_800_000_000.0
EMPTY: dict[str, Any] = {field.name: [] if str(field.type).startswith("list") else None for field in COLUMNS}


def made(name: str, health: str = "healthy", problems: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    """A row of a scan table."""
    findings = [
        {
            "problem": problem, "severity": health, "first_step": 3, "last_step": 9, "layers": ["0.weight"],
            "summary": f"{problem} it is", "advice": "", "noticed": NOW,
        }
        for problem in problems
    ]  # fmt: skip
    own = {
        "run": name, "url": f"/elsewhere/{name}", "health": health, "findings": findings,
        "alarms": len(findings), "health_before": health, "closed": True, "live": False,
        "config": '{"lr": 0.1}', "scanned": NOW, "steps": 10, "created": NOW - 100, "ended": NOW - 50,
    }  # fmt: skip
    return EMPTY | own | more


ROWS = [
    made("a", "critical", ("nonfinite", "dead_units"), owner="ana", model="ResNet50", tags=["base", "x y"]),
    made("b", "warning", ("dead_units",), owner="ana", model="ViT", worse=NOW, health_before="healthy"),
    made("c", owner="bo", model="ViT", tags=["base"], val_loss=0.5, ended=NOW - 10, note="kept"),
    made("d", val_loss=float("nan"), live=True, closed=False, copy_of="c"),
    made("e/f", "unreadable", error="run.json is empty", steps=None, health_before=None, worse=NOW),
]


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """Over a table alone: none of its runs exists."""
    write_table(ScanTable("/elsewhere", ROWS, NOW, NOW - 3600, ["a note"]), tmp_path / "all.parquet")
    return Library(tmp_path / "all.parquet")


def counts(data: dict[str, Any], key: str) -> dict[str, int]:
    return {entry["value"]: entry["count"] for entry in data["facets"][key]}


def test_runs_are_counted_by_everything(library: Library) -> None:
    data = shown(library, "", "scan", "health", 50)
    assert (data["total"], data["fits"], data["wrong"], data["notes"]) == (5, 5, "", ["a note"])
    assert counts(data, "health") == {"critical": 1, "warning": 1, "unreadable": 1, "healthy": 2}
    assert counts(data, "problem") == {"dead_units": 2, "nonfinite": 1}
    assert counts(data, "model") == {"ViT": 2, "ResNet50": 1, "none": 2}
    assert counts(data, "owner") == {"ana": 2, "bo": 1, "none": 2}
    assert counts(data, "tag") == {"base": 2, "x y": 1, "none": 3}
    assert {key: entry["count"] for key, entry in data["states"].items()} == {"live": 1, "new": 1, "copy": 1}
    assert [line["run"] for line in data["rows"]] == ["a", "b", "e/f", "c", "d"]
    assert data["rows"][2]["reason"] == ["run.json is empty"]
    json.dumps(data, allow_nan=False)


def test_a_facet_counts_what_its_own_values_would_leave(library: Library) -> None:
    data = shown(library, "owner:ana health:critical", "scan", "health", 50)
    assert data["fits"] == 1
    assert counts(data, "owner") == {"ana": 1}
    assert counts(data, "health") == {"critical": 1, "warning": 1, "healthy": 0}
    chosen = {entry["value"]: entry["chosen"] for entry in data["facets"]["health"]}
    assert chosen == {"critical": True, "warning": False, "healthy": False}
    lost = shown(library, "owner:nobody", "scan", "health", 50)
    assert (lost["fits"], counts(lost, "owner")["nobody"]) == (0, 0)  # it can be taken away again


@pytest.mark.parametrize(
    ("before", "key", "value", "after"),
    [
        ("", "tag", "base", "tag:base"),
        ("tag:base", "tag", "base", ""),
        ("tag:base lr>0", "tag", "x y", 'tag:base,"x y" lr>0'),
        ('tag:base,"x y" lr>0', "tag", "base", 'tag:"x y" lr>0'),
        ("word -tag:base", "tag", "base", "word -tag:base tag:base"),
        ("health:Critical", "health", "critical", ""),
    ],
)
def test_a_click_adds_a_value_or_takes_it_away(before: str, key: str, value: str, after: str) -> None:
    assert toggled(parse(before), key, ":", value) == after
    assert toggled(parse(toggled(parse(after), key, ":", value)), key, ":", value) == after


def test_every_count_is_what_its_link_finds(library: Library) -> None:
    rows = list(library.table.rows.values())
    for key in fleet.FACETS:
        for entry in fleet.facet(Narrowed.of(rows, parse("")), key):
            query = parse(entry["next"])
            assert sum(query.fits(row) for row in rows) == entry["count"], entry


def test_what_got_worse(library: Library, tmp_path: Path) -> None:
    news = shown(library, "", "scan", "health", 50)["news"]
    assert [(run["run"], run["before"]) for run in news["runs"]] == [
        ("a", "critical"), ("b", "healthy"), ("e/f", None),
    ]  # fmt: skip
    assert news["runs"][0]["alarms"] == ["Nonfinite", "Dead units"]
    assert shown(library, "owner:bo", "scan", "health", 50)["news"]["total"] == 0
    write_table(ScanTable("/elsewhere", ROWS, NOW, None), tmp_path / "first.parquet")
    first = Library(tmp_path / "first.parquet")
    assert shown(first, "", "week", "health", 50)["news"] == {"first": True, "total": 0, "runs": []}


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("val", "c"),
        ("-age", "a"),
        ("age", "c"),
        ("run", "a"),
        ("-run", "e/f"),
        ("owner", "a"),
        ("model", "a"),
    ],
)
def test_the_table_is_sorted(library: Library, sort: str, order: str) -> None:
    assert shown(library, "", "scan", sort, 1)["rows"][0]["run"] == order


def test_a_wrong_filter_is_explained_and_leaves_all_runs(library: Library) -> None:
    data = shown(library, "tga:x", "scan", "health", 50)
    assert "did you mean tag" in data["wrong"]
    assert data["fits"] == 5
    _, _, body = open_page(library, View("fleet", "", {"filter": "tga:x", "rows": "-1", "since": "?"}), {})
    assert text(body)


def test_runs_of_a_table_are_listed_without_being_opened(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(Run, "__init__", never)
    rows, _ = table_of(library).all(library)
    assert [row["run"] for row in rows] == ["a", "b", "c", "d"]
    assert rows[0]["finding"] == "Nonfinite +1"
    assert (rows[2]["owner"], rows[2]["note"], rows[2]["config.lr"]) == ("bo", "kept", 0.1)
    assert library.broken() == {"e/f": "run.json is empty"}
    assert library.live()
    assert table_of(library).fitting(library, "tag:base lr>0.01 is:closed") == ["a", "c"]
    for page in ("runs", "fleet"):
        _, title, body = open_page(library, View(page), {})
        assert "5 runs" in text(title) or "4 runs" in text(title)
        assert body


def test_a_run_of_a_table_opens_where_it_lies(runs_root: Path, tmp_path: Path) -> None:
    rows = [made("group/one", url=str(runs_root / "healthy")), made("gone", url=str(tmp_path / "gone"))]
    write_table(ScanTable(str(runs_root), rows, NOW), tmp_path / "t.parquet")
    library = Library(tmp_path / "t.parquet")
    assert library.run("group/one").last_step == 59
    assert list(library.runs()) == ["group/one", "gone"]
    with pytest.raises(RunError):
        library.run("gone")
    with pytest.raises(RunError, match="no run named"):
        library.run("healthy")


def until(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_root_with_a_table_finds_what_is_newer_behind_it(
    runs_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwatch.dashboard.roots.SCAN_SECONDS", 0.0)
    for name in ("healthy", "finetune", "vanishing"):
        shutil.copytree(runs_root / name, tmp_path / name)
    table = scan(tmp_path)
    write_table(table, tmp_path / TABLE)
    shutil.copytree(runs_root / "healthy", tmp_path / "new")
    (tmp_path / "finetune" / "run.json").write_bytes(
        (tmp_path / "finetune" / "run.json").read_bytes() + b"\n"
    )
    shutil.rmtree(tmp_path / "vanishing")
    library = Library(tmp_path)
    assert set(library.runs()) == {"healthy", "finetune", "vanishing"}  # at once, as they were scanned
    until(lambda: library.newer() == 2)
    assert set(library.runs()) == {"healthy", "finetune", "new"}
    assert library.asleep("healthy")
    assert not library.asleep("finetune")
    assert table_of(library).fitting(library, "name:new lr=0.1") == ["new"]
    summary, scanned = Library(runs_root).summary("healthy"), library.summaries()["healthy"]
    for key in ("step", "train", "val", "gap", "drift", "drift_layer", "config", "live", "closed"):
        assert scanned[key] == pytest.approx(summary[key]), key
    write_table(scan(tmp_path, before=table), tmp_path / TABLE)
    until(lambda: library.runs() is not None and "new" in library.table.rows and library.newer() == 0)


def test_runs_of_a_table_in_a_folder_that_may_not_be_listed_stay(
    runs_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwatch.dashboard.roots.SCAN_SECONDS", 0.0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("a", "team/b", "gone"):
            shutil.copytree(runs_root / "healthy", root / name)
        root.chmod(0o755)
        write_table(scan(root), root / TABLE)
        shutil.copytree(runs_root / "healthy", root / "new")
        shutil.rmtree(root / "gone")
        (root / "team").chmod(0)
        with without_rights():
            library = Library(root)
            until(lambda: set(library.runs()) == {"a", "team/b", "new"})
            with pytest.raises(PermissionError):
                library.run("team/b")


def test_names_of_a_table_in_a_root_do_not_lead_out_of_it(runs_root: Path, tmp_path: Path) -> None:
    shutil.copytree(runs_root / "healthy", tmp_path / "secret")
    root = tmp_path / "root"
    root.mkdir()
    write_table(ScanTable(str(root), [made("../secret"), made("/etc"), made("fine")], NOW), root / TABLE)
    library = Library(root)
    assert list(library.runs()) == ["fine"]
    with pytest.raises(RunError):
        library.run("../secret")


def test_a_table_that_cannot_be_read_leaves_the_folders(runs_root: Path, tmp_path: Path) -> None:
    shutil.copytree(runs_root / "healthy", tmp_path / "healthy")
    (tmp_path / TABLE).write_bytes(b"nonsense")
    library = Library(tmp_path)
    assert list(library.runs()) == ["healthy"]
    _, _, body = open_page(library, View("fleet"), {})
    assert "cannot be read" in text(body)
    assert str(tmp_path) not in text(body)
    for wrong in (tmp_path / TABLE, tmp_path / "none.parquet"):
        with pytest.raises(RunError, match="expected a scan table"):
            create_app(wrong)


def test_without_a_scan_the_page_says_how_to_make_one(runs_root: Path) -> None:
    _, _, body = open_page(Library(runs_root), View("fleet"), {})
    assert "layerwatch scan" in text(body)
