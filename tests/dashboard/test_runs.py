"""The table of runs: what a row says, which rows are sent again, and what a link chooses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from dash import Dash

from layerwatch.dashboard.figures.theme import LIGHT, Style
from layerwatch.dashboard.judging import Judgement
from layerwatch.dashboard.pages import runs_columns as runs
from layerwatch.dashboard.queries import Library
from layerwatch.dashboard.rows import Rows, config_names, row, total_steps, worst
from layerwatch.dashboard.shell import open_page
from layerwatch.dashboard.urls import View
from layerwatch.monitor.findings import Finding
from tests.dashboard.test_pages import controls, parts, text

WIDE = Style(LIGHT)


def finding(problem: str, severity: Any) -> Finding:
    return Finding("x", problem, severity, (), 0, 9, "why")


def test_a_row_holds_the_numbers_of_its_run(library: Library) -> None:
    rows = {row["run"]: row for row in Rows().all(library, patience=30)[0]}
    assert set(rows) == {"healthy", "vanishing", "nested/blow-up", "finetune"}
    healthy, run = rows["healthy"], library.run("healthy")
    assert healthy["step"] == 59
    assert healthy["train"] == run.scalars("train_loss")["value"].iloc[-1]
    drift = run.drift()
    last = drift[drift["step"] == drift["step"].max()]
    assert healthy["drift"] == last["relative_l2"].max()
    assert healthy["layer"] == last.loc[last["relative_l2"].idxmax(), "tensor"]
    assert healthy["config.lr"] == 0.1
    assert rows["nested/blow-up"]["train"] is None  # NaN is no number for a grid
    assert rows["nested/blow-up"]["texts"]["train"] == "NaN"
    assert rows["finetune"]["texts"]["val"] == "–"
    json.dumps(list(rows.values()), allow_nan=False)


def test_the_worst_finding_is_the_most_severe_one() -> None:
    judged = Judgement("s", [finding("overfitting", "warning"), finding("nonfinite", "critical")])
    assert worst(judged) == "Nonfinite +1"
    assert row("x", {"read": True, "step": 1}, judged)["rank"] == 3
    assert worst(Judgement("s", [finding("loss_spike", "info")])) == ""
    assert row("x", {"read": True, "step": 1}, None)["health"] == "checking"


@pytest.mark.parametrize(
    ("config", "total"),
    [
        ({"max_steps": 800}, 800),
        ({"trainer.total_steps": 10.0}, 10),
        ({"warmup_steps": 5}, None),
        ({"max_steps": "many"}, None),
        ({"max_steps": float("nan")}, None),
        ({"max_steps": -1}, None),
    ],
)
def test_the_length_of_a_training_comes_from_its_configuration(
    config: dict[str, Any], total: int | None
) -> None:
    assert total_steps(config) == total
    shown = row("x", {"read": True, "step": 7, "config": config}, None)["texts"]["step"]
    assert shown == (f"7 of {total}" if total else "7")


def test_a_run_that_cannot_be_read_says_why() -> None:
    line = row("x", {"read": False, "error": "the disk is gone"}, None)
    assert (line["health"], line["finding"]) == ("unknown", "the disk is gone")
    assert set(line) >= {"step", "train", "texts", "tags", "updated"}


def test_only_rows_that_changed_are_sent_again(runs_root: Path, tmp_path: Path) -> None:
    for name in ("healthy", "finetune"):
        shutil.copytree(runs_root / name, tmp_path / name)
    library, table = Library(tmp_path), Rows()
    for name in ("healthy", "finetune"):
        library.judgement(name, wait=150)
    before, cursor = table.all(library, patience=30)
    assert len(before) == 2
    assert table.since(library, cursor)[:2] == ([], [])
    assert len(table.since(library, "")[0]) == 2
    assert len(table.since(library, "other:7")[0]) == 2  # a server before this one
    shutil.copytree(runs_root / "vanishing", tmp_path / "new")
    shutil.rmtree(tmp_path / "finetune")
    library._scanned = float("-inf")
    changed, gone, after = table.since(library, cursor, patience=30)
    assert [line["run"] for line in changed] == ["new"]
    assert gone == ["finetune"]
    assert table.since(library, after)[1] == []
    assert [line["run"] for line in table.since(library, cursor)[0]] == ["new"]


def test_the_callback_sends_news_and_no_table(app: Dash) -> None:
    ids = [key for key in app.callback_map if "runs-grid" in key]
    assert all("rowData" not in key for key in ids)


def test_a_link_chooses_columns_and_order() -> None:
    rows = [row("a", {"read": True, "step": 1, "config": {"lr": 0.1, "name": "x"}, "tags": ["t"]}, None)]
    view = View("runs", "", {"sort": "rank:desc,config.lr:asc,oops", "columns": "rank,config.lr,nonsense"})
    assert runs.sorting(view) == {"rank": "desc", "config.lr": "asc"}
    shown = runs.columns_of(view, rows, WIDE)
    assert shown == ["rank", "config.lr"]
    defs = {d.get("field", ""): d for d in runs.column_defs(view, config_names(rows), shown, WIDE)}
    assert not defs["rank"]["hide"]
    assert defs["step"]["hide"]
    assert not defs["run"].get("hide")
    assert (defs["config.lr"]["sort"], defs["config.lr"]["sortIndex"]) == ("asc", 1)
    assert defs["config.lr"]["filter"] == "agNumberColumnFilter"
    assert "filter" not in defs["config.name"]


def test_a_column_of_a_link_is_offered_even_if_no_run_has_it() -> None:
    fields = {d.get("field") for d in runs.column_defs(View(), {}, ["config.gone"], WIDE)}
    assert "config.gone" in fields


def test_the_owner_is_a_column_only_where_there_are_several() -> None:
    plain = row("a", {"read": True, "step": 1}, None)
    owned = row("b", {"read": True, "step": 1, "owner": "ana", "tags": ["sweep"]}, None)
    assert "owner" not in runs.columns_of(View(), [plain], WIDE)
    assert "owner" not in runs.columns_of(View(), [owned, owned], WIDE)
    assert "owner" in runs.columns_of(View(), [plain, owned], WIDE)
    assert not {"tags", "note", "model"} & set(runs.columns_of(View(), [owned], WIDE))  # below the name
    assert runs.columns_of(View("runs", "", {"columns": "tags,note"}), [plain], WIDE) == ["tags", "note"]
    assert runs.columns_of(View(), [owned], Style(LIGHT, narrow=True)) == runs.ON_A_PHONE


def _named(item: Any) -> bool:
    return isinstance(getattr(item, "id", None), str)


def test_an_empty_folder_shows_the_lines_that_write_a_log(tmp_path: Path) -> None:
    _, _, body = open_page(Library(tmp_path), View(), {})
    assert "from layerwatch import watch" in text(body)
    found = {getattr(item, "id", ""): getattr(item, "className", "") for item in parts(body) if _named(item)}
    shown = {key: found[key] for key in ("runs-empty", "runs-card")}
    assert shown == {"runs-empty": "", "runs-card": "card hidden"}


def test_the_state_of_the_table_is_in_the_address(library: Library) -> None:
    _, _, body = open_page(library, View("runs", "", {"filter": "heal", "pins": "healthy"}), {})
    values = controls(body)
    assert (values["filter"], values["pins"], values["sort"], values["where"]) == ("heal", "healthy", "", "")
